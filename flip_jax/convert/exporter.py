"""A checkpoint -> files for others, proved on fixed inputs."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from flip_jax import config
from flip_jax.checkpoint import load_momentum
from flip_jax.convert import torch_flip
from flip_jax.convert.check import (
    Inputs,
    Outputs,
    compare,
    fixed_inputs,
    our_outputs,
    with_twins,
)
from flip_jax.convert.conversion import import_torch, whole_or_absent
from flip_jax.convert.weight_files import read_tensors
from flip_jax.models import flip
from flip_jax.weights import Weights, is_export, read_tokenizer, read_weights, write_export

KINDS = ("flip", "hf", "safetensors")


def export_weights(kind: str, source: Path, out: Path, tokenizer: str | None = None) -> str:
    """Writes the weights of a checkpoint for others, then runs both on the same inputs.

    Args:
      kind: `flip`, a .pth file with the official names; `hf`, a folder for `transformers`;
        `safetensors`, the plain tree.
      source: as `read_weights` takes it.
      out: file or folder to be made.
      tokenizer: the vocabulary, where the name in the checkpoint no longer leads to it.

    Returns:
      What was done and the table of errors, for the user.

    Raises:
      ConversionError: the outputs differ; `out` is gone then.
      FileExistsError: `out` is there before.
      OSError: the source or the vocabulary cannot be read, `out` cannot be written.
      ValueError: the source holds only a part of a model, or the vocabulary is another one.
    """
    with whole_or_absent(out):
        weights = read_weights(source)
        inputs = fixed_inputs(weights.cfg.model)
        notes: list[str] = []
        if kind == "flip":
            expected, found = _flip(out, source, weights, inputs, notes)
        else:
            vocabulary = read_tokenizer(source, weights, tokenizer)
            expected = our_outputs(weights.params, weights.cfg.model, inputs)
            if kind == "hf":
                import_torch()
                from flip_jax.convert import hugging_face

                hugging_face.write_hugging_face(out, weights, vocabulary)
                found = hugging_face.hugging_face_outputs(out, inputs)
            else:
                write_export(out, weights, vocabulary)
                found = our_outputs(read_weights(out).params, weights.cfg.model, inputs)
        table = compare(expected, found)
    return "\n".join([*notes, table, f"written: {out}"])


def _flip(
    out: Path, source: Path, weights: Weights, inputs: Inputs, notes: list[str]
) -> tuple[Outputs, Outputs]:
    torch = import_torch()
    from flip_jax.convert import torch_models

    cfg, model = weights.cfg, weights.cfg.model
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
    torch.save(content, out)
    del state, tensors, content
    written = read_tensors(out, under=("model",))
    found = with_twins(
        lambda twin: torch_models.flip_outputs(written, model, inputs, twin=twin), True
    )
    return expected, found
