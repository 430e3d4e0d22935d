"""The official FLIP checkpoint: `checkpoint_*.pth` of the PyTorch implementation, or safetensors.

Source: ddw2AIGROUP2CQUPT/FaceCaption-15M:models/fflip_pretrain.py.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from flip_jax.config import DataConfig, ModelConfig
from flip_jax.convert import torch_flip
from flip_jax.convert.check import Inputs, Outputs, with_twins
from flip_jax.convert.conversion import ConversionError
from flip_jax.convert.foreign import (
    Foreign,
    InitialValues,
    Options,
    Slot,
    Tensors,
    gather,
    text_sizes,
    vision_sizes,
)
from flip_jax.convert.weight_files import read_tensors, stored_heads


def read_official(path: Path, options: Options) -> Foreign:
    """All weights of a pretraining checkpoint, its momentum twins and queue where it has them.

    Raises:
      ConversionError: the tensors do not fit.
      FileNotFoundError: nothing there.
    """
    tensors = read_tensors(path, under=("model",))
    given = options.vision_heads, options.text_heads
    vision, text = (s if g is None else g for g, s in zip(given, stored_heads(path), strict=True))
    options = dataclasses.replace(options, vision_heads=vision, text_heads=text)
    model = _sizes(tensors, options)
    shapes = torch_flip.official_shapes(model)
    initial = InitialValues(model, options.seed)
    online = {e.official_name(True): e.official for e in torch_flip.entries(model, twin=True)}
    has_twins = any(name in tensors for name in online)
    if has_twins:
        shapes |= torch_flip.official_shapes(model, twin=True)
    has_queue = any(name in tensors for name in torch_flip.QUEUE_NAMES)
    if has_queue:
        shapes |= _queue_shapes(tensors, model)

    def fresh(name: str) -> np.ndarray:
        if name in torch_flip.QUEUE_NAMES:
            raise ConversionError(f"{name}: a queue is whole or absent")
        return state_of_online(online[name]) if name in online else initial(name)

    def state_of_online(name: str) -> np.ndarray:
        value = tensors.get(name)
        return value if value is not None and value.shape == shapes[name] else initial(name)

    slots = {name: Slot(name) for name in shapes}
    state, source = gather(tensors, slots, shapes, options, fresh, ignored=("*.position_ids",))
    notes = []
    if not has_twins:
        notes.append("no momentum twins in the source: a run copies them from the weights")
    if not has_queue:
        notes.append("no queue in the source: a run starts with a fresh one")

    def run(inputs: Inputs) -> Outputs:
        from flip_jax.convert import torch_models

        vision = dataclasses.replace(model.vision, image_size=inputs.image.shape[1])
        cfg = dataclasses.replace(model, vision=vision)
        return with_twins(
            lambda twin: torch_models.flip_outputs(source, cfg, inputs, twin=twin), has_twins
        )

    return Foreign(
        state=state,
        model=model,
        run=run,
        tokens=model.text.vocab_size,
        tokenizer=options.tokenizer or DataConfig.tokenizer,
        notes=notes,
    )


def _sizes(tensors: Tensors, options: Options) -> ModelConfig:
    tower = "visual_encoder.vision_model."
    vision = vision_sizes(
        tensors,
        patch=f"{tower}embeddings.patch_embedding.weight",
        table=f"{tower}embeddings.position_embedding.weight",
        up=f"{tower}encoder.layers.{{}}.mlp.fc1.weight",
        heads=options.vision_heads,
    )
    text = text_sizes(tensors, prefix="text_encoder.", heads=options.text_heads)
    heads = [tensors[n] for n in ("vision_proj.weight", "text_proj.weight") if n in tensors]
    embed_dim = len(heads[0]) if heads else ModelConfig.embed_dim
    return ModelConfig(vision=vision, text=text, embed_dim=embed_dim)


def _queue_shapes(tensors: Tensors, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    sizes = [tensors[n].shape[-1] for n in torch_flip.QUEUE_NAMES[:3] if n in tensors]
    size = sizes[0] if sizes else 0
    shapes = ((model.embed_dim, size), (model.embed_dim, size), (1, size), (1,))
    return dict(zip(torch_flip.QUEUE_NAMES, shapes, strict=True))
