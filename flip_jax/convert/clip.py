"""CLIP image towers: Hugging Face names, OpenAI's names, and FaRL, which has the latter.

Sources: arXiv 2103.00020; arXiv 2112.03109 (FaRL, file `FaRL-Base-Patch16-*.pth`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.config import ModelConfig, VisionConfig
from flip_jax.convert import torch_flip
from flip_jax.convert.check import Inputs, Outputs
from flip_jax.convert.conversion import ConversionError
from flip_jax.convert.foreign import (
    Foreign,
    InitialValues,
    Options,
    Slot,
    gather,
    vision_sizes,
)
from flip_jax.convert.weight_files import read_config, read_tensors

_OFFICIAL = "visual_encoder.vision_model."
_POST_NORM = f"{_OFFICIAL}post_layrnorm"
_OPENAI = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layrnorm": "ln_post",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "layer_norm2": "ln_2",
}
_OPENAI_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}


def read_clip(path: Path, options: Options) -> Foreign:
    """The image tower of a Hugging Face CLIP folder or file, or of one with OpenAI's names.

    CLIP's last norm is kept. The official FLIP spells its name differently and so started from 1
    and 0 without noticing; `options.as_reference` does the same.

    Raises:
      ConversionError: the tensors do not fit, or config.json names another architecture.
      FileNotFoundError: nothing there.
    """
    tensors = read_tensors(path, under=("state_dict", "model"))
    heads = options.vision_heads
    if config := read_config(path):
        config = config.get("vision_config", config)
        _check_architecture(config)
        heads = config.get("num_attention_heads") if heads is None else heads
    if any(name.removeprefix("visual.") == "conv1.weight" for name in tensors):
        return _openai(tensors, heads, options)
    return _hugging_face(tensors, heads, options)


def read_farl(path: Path, options: Options) -> Foreign:
    """The image tower of a released FaRL file: `state_dict` under OpenAI's names.

    Raises:
      ConversionError, FileNotFoundError: see `read_clip`.
    """
    tensors = read_tensors(path, under=("state_dict",))
    if "visual.conv1.weight" not in tensors:
        raise ConversionError(
            f"{path} has no tensor visual.conv1.weight; FaRL's released files hold a dict "
            "`state_dict` with OpenAI CLIP's names"
        )
    return _openai(tensors, options.vision_heads, options)


def _hugging_face(
    tensors: Mapping[str, np.ndarray], heads: int | None, options: Options
) -> Foreign:
    # CLIPModel and older CLIPVisionModel files have the prefix, newer CLIPVisionModel files do not.
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in tensors) else ""
    vision = vision_sizes(
        tensors,
        patch=f"{prefix}embeddings.patch_embedding.weight",
        table=f"{prefix}embeddings.position_embedding.weight",
        up=f"{prefix}encoder.layers.{{}}.mlp.fc1.weight",
        heads=heads,
    )

    def slot(rest: str) -> Slot:
        return Slot(prefix + rest.replace("post_layrnorm", "post_layernorm"))

    ignored = ("text_model.*", "*_projection.weight", "logit_scale", "*.position_ids")
    return _foreign(tensors, vision, slot, "clip_outputs", ignored, options)


def _openai(tensors: Mapping[str, np.ndarray], heads: int | None, options: Options) -> Foreign:
    prefix = "visual." if "visual.conv1.weight" in tensors else ""
    vision = vision_sizes(
        tensors,
        patch=f"{prefix}conv1.weight",
        table=f"{prefix}positional_embedding",
        up=f"{prefix}transformer.resblocks.{{}}.mlp.c_fc.weight",
        heads=heads,
    )

    def slot(rest: str) -> Slot:
        return _openai_slot(rest, prefix)

    # With the prefix, all that lies outside the image tower is the text tower.
    ignored = ("visual.proj", "[!v]*", "vocab_size") if prefix else ("proj",)
    return _foreign(tensors, vision, slot, "openai_outputs", ignored, options)


def _openai_slot(rest: str, prefix: str) -> Slot:
    """Where the tensor that is `rest` below `vision_model.` lies under OpenAI's names."""
    if rest in _OPENAI:
        return Slot(prefix + _OPENAI[rest])
    module, _, leaf = rest.rpartition(".")
    if not module.startswith("encoder.layers."):
        return Slot(f"{prefix}{_OPENAI[module]}.{leaf}")
    layer, _, module = module.removeprefix("encoder.layers.").partition(".")
    block = f"{prefix}transformer.resblocks.{layer}"
    if module in _OPENAI_THIRDS:
        return Slot(f"{block}.attn.in_proj_{leaf}", _OPENAI_THIRDS[module])
    return Slot(f"{block}.{_OPENAI[module]}.{leaf}")


def openai_state(params: Mapping[str, Any], model: ModelConfig) -> dict[str, np.ndarray]:
    """Our image tower under OpenAI's names, the inverse of reading it.

    Args:
      params: `vit`, and `image_proj` where there is a projection into the joint embedding.

    Returns:
      `visual.*` -> float32 arrays; `visual.proj` [D, E] is the kernel of `image_proj`, whose bias
      has no place there.
    """
    present = [e for e in torch_flip.entries(model) if e.path.startswith("vit/")]
    official = torch_flip.params_to_official(params, model, wanted=present)
    thirds: dict[str, dict[int, np.ndarray]] = {}
    for name, value in official.items():
        slot = _openai_slot(name.removeprefix(_OFFICIAL), "visual.")
        thirds.setdefault(slot.name, {})[slot.third or 0] = value
    state = {
        name: np.concatenate([parts[n] for n in sorted(parts)]) if len(parts) > 1 else parts[0]
        for name, parts in thirds.items()
    }
    if "image_proj" in params:
        state["visual.proj"] = np.asarray(params["image_proj"]["kernel"])
    return state


def _foreign(
    tensors: Mapping[str, np.ndarray],
    vision: VisionConfig,
    slot: Callable[[str], Slot],
    outputs: str,
    ignored: tuple[str, ...],
    options: Options,
) -> Foreign:
    """`slot`: name below `vision_model.` -> place in the source; `outputs`: who runs it."""
    model = ModelConfig(vision=vision)
    shapes = torch_flip.official_shapes(model)
    slots = {n: slot(n.removeprefix(_OFFICIAL)) for n in shapes if n.startswith(_OFFICIAL)}
    fresh = InitialValues(model, options.seed)
    state, source = gather(tensors, slots, shapes, options, fresh, ignored=ignored)
    notes = []
    if options.as_reference:
        state[f"{_POST_NORM}.weight"] = np.ones(vision.width, np.float32)
        state[f"{_POST_NORM}.bias"] = np.zeros(vision.width, np.float32)
        notes.append("as the reference: the last norm starts from 1 and 0, CLIP's is dropped")

    def run(inputs: Inputs) -> Outputs:
        from flip_jax.convert import torch_models

        cfg = dataclasses.replace(vision, image_size=inputs.image.shape[1])
        run_source = getattr(torch_models, outputs)
        return run_source(source, cfg, inputs, keep_post_norm=not options.as_reference)

    return Foreign(state=state, model=model, run=run, notes=notes)


def _check_architecture(config: Mapping[str, Any]) -> None:
    """Refuses what has CLIP's names but computes something else."""
    for field, wanted in (("hidden_act", "quick_gelu"), ("layer_norm_eps", 1e-5)):
        if config.get(field, wanted) != wanted:
            raise ConversionError(
                f"config.json says {field}={config[field]!r}; the image tower has {wanted!r}"
            )
