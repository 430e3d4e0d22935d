"""A checkpoint -> files for others, proved on fixed inputs."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from flip_jax import config
from flip_jax.checkpoint import load_momentum, load_params, read_meta
from flip_jax.config import ModelConfig
from flip_jax.convert import torch_flip
from flip_jax.convert.check import (
    compare,
    compare_bits,
    fixed_inputs,
    our_outputs,
    with_twins,
)
from flip_jax.convert.clip import openai_state
from flip_jax.convert.conversion import ConversionError, import_torch, whole_or_absent
from flip_jax.convert.weight_files import read_tensors
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip
from flip_jax.step_folder import step_folder
from flip_jax.weights import Weights, is_export, read_tokenizer, read_weights, write_export

KINDS = ("flip", "hf", "clip", "farl", "safetensors")


def export_weights(kind: str, source: Path, out: Path, tokenizer: str | None = None) -> str:
    """Writes the weights of a checkpoint for others and proves that they are the same.

    `flip` and `hf` run on the same inputs as ours; `safetensors` is compared bit for bit.

    Args:
      kind: `flip`, a .pth file with the official names; `hf`, a folder for `transformers`; `clip`
        and `farl`, the image tower as a .pth file with OpenAI's names, which `farl` has under
        `state_dict`; `safetensors`, the plain tree.
      source: as `read_weights` takes it.
      out: file or folder to be made.
      tokenizer: the vocabulary, where the name in the checkpoint no longer leads to it.

    Returns:
      What was done and how far both agree, for the user.

    Raises:
      ConversionError: outputs or arrays differ; no `out` then.
      FileExistsError: `out` is there before.
      OSError: the source or the vocabulary cannot be read, `out` cannot be written.
      ValueError: the source holds only a part of a model, or the vocabulary is another one.
    """
    if not is_export(source):
        source = step_folder(source, None)  # a training may write the next step meanwhile
    with whole_or_absent(out) as partial:
        if kind in ("clip", "farl"):
            return "\n".join([*_openai(partial, source, kind), f"written: {out}"])
        weights = read_weights(source)
        if kind == "flip":
            lines = _flip(partial, source, weights)
        else:
            write = _hugging_face if kind == "hf" else _safetensors
            lines = write(partial, weights, read_tokenizer(source, weights, tokenizer))
        left_out = [
            name for name in ("logit_bias", "mim", "caption_head") if name in weights.params
        ]
        if kind != "safetensors" and left_out:
            lines.append(f"left out, as the layout has none: {', '.join(left_out)}")
    return "\n".join([*lines, f"written: {out}"])


def _safetensors(out: Path, weights: Weights, vocabulary: Tokenizer) -> list[str]:
    write_export(out, weights, vocabulary)
    return [compare_bits(weights.params, read_weights(out).params)]


def _hugging_face(out: Path, weights: Weights, vocabulary: Tokenizer) -> list[str]:
    import_torch()
    from flip_jax.convert import hugging_face

    inputs = fixed_inputs(weights.cfg.model)
    hugging_face.write_hugging_face(out, weights, vocabulary)
    expected = our_outputs(weights.params, weights.cfg.model, inputs)
    return [compare(expected, hugging_face.hugging_face_outputs(out, inputs))]


def _openai(out: Path, source: Path, kind: str) -> list[str]:
    torch = import_torch()
    from flip_jax.convert import torch_models

    params, model = _image_tower(source)
    state = openai_state(params, model)
    tensors = {n: torch.from_numpy(np.array(v)) for n, v in state.items()}
    with out.open("wb") as file:
        torch.save({"state_dict": tensors} if kind == "farl" else tensors, file)
    del state, tensors
    inputs = fixed_inputs(model)
    expected = {"image_tokens": our_outputs(params, model, inputs)["image_tokens"]}
    written = read_tensors(out, under=("state_dict",))
    projection = written.pop("visual.proj", None)
    found = torch_models.openai_outputs(written, model.vision, inputs, keep_post_norm=True)
    notes = ["the image tower alone is written"]
    if projection is not None:
        kernel = params["image_proj"]["kernel"]
        expected["image_feature"] = expected["image_tokens"][:, 0] @ kernel
        found["image_feature"] = found["image_tokens"][:, 0] @ projection
        notes.append("visual.proj: the kernel of image_proj; its bias has no place there")
    width, heads = model.vision.width, model.vision.heads
    if width != 64 * heads:
        notes.append(f"{heads} heads: readers of this layout take one per 64 of the width {width}")
    return [*notes, compare(expected, found)]


def _image_tower(source: Path) -> tuple[dict, ModelConfig]:
    """`vit`, and `image_proj` if there, of a whole model or of an imported tower; their sizes."""
    if is_export(source):
        weights = read_weights(source)
        params, model = weights.params, weights.cfg.model
    else:
        params = load_params(source)
        model = config.from_dict(read_meta(source)["config"]).model
    if "vit" not in params:
        raise ConversionError(f"{source} has no image tower, only {', '.join(sorted(params))}")
    return {name: params[name] for name in ("vit", "image_proj") if name in params}, model


def _flip(out: Path, source: Path, weights: Weights) -> list[str]:
    torch = import_torch()
    from flip_jax.convert import torch_models

    cfg, model = weights.cfg, weights.cfg.model
    inputs, notes = fixed_inputs(model), []
    # An export in safetensors holds no momentum.
    momentum = {} if is_export(source) else load_momentum(source)
    twins, queue = momentum.get("twins"), momentum.get("queue")
    if twins is None:
        twins = flip.twin_params(weights.params)
        notes.append("no momentum twins in the source: written as copies of the weights")
    if queue is None:
        fresh = flip.init_queue(cfg.loss.queue_size, model.embed_dim, jax.random.key(cfg.seed))
        queue = jax.tree.map(np.asarray, fresh)
        notes.append(f"no queue in the source: a fresh one of {cfg.loss.queue_size} is written")
    params = weights.params
    expected = with_twins(
        lambda twin: our_outputs(params | twins if twin else params, model, inputs), True
    )

    state = torch_flip.state_to_official(params, twins, queue, model)
    # Copies of what JAX holds read-only; the rest is shared.
    tensors = {n: torch.from_numpy(np.require(v, requirements="W")) for n, v in state.items()}
    content = {"model": tensors, "config": config.to_dict(cfg), "step": weights.meta["step"]}
    with out.open("wb") as file:  # by name, torch would put the name into the file
        torch.save(content, file)
    del state, tensors, content
    written = read_tensors(out, under=("model",))
    found = with_twins(
        lambda twin: torch_models.flip_outputs(written, model, inputs, twin=twin), True
    )
    return [*notes, compare(expected, found)]
