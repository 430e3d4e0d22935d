"""A tiny model as an export, and drawn faces as records, for tests of the downstream tasks."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from flip_jax.config import (
    Config,
    DataConfig,
    DrawnConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
    to_dict,
)
from flip_jax.data.sources import write_drawn
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip
from flip_jax.weights import Weights, write_export

TOWER = {"width": 32, "heads": 4, "mlp_width": 64}
MODEL = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=16, depth=4, **TOWER),
    text=TextConfig(vocab_size=529, max_length=24, positions=24, depth=2, init_std=0.15, **TOWER),
    embed_dim=16,
    dtype="float32",
)
FACES = DrawnConfig(train_identities=24, test_identities=12, pictures=2, captions=2, size=64)


def write_model(
    folder: Path, seed: int = 3, *, spread: float = 0.2, keep_patches: int | None = None
) -> Path:
    """Normal weights of standard deviation `spread`; NaN = a broken model."""
    vision = dataclasses.replace(MODEL.vision, keep_patches=keep_patches)
    model = dataclasses.replace(MODEL, vision=vision)
    cfg = Config(model=model, data=DataConfig(tokenizer="grammar"))
    shapes = jax.eval_shape(lambda: flip.init_params(MODEL, 0.07, jax.random.key(0)))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda s: (spread * rng.normal(size=s.shape)).astype(s.dtype), shapes)
    params["temperature"] = np.float32(0.07)
    weights = Weights(params, cfg, {"step": 7, "config": to_dict(cfg)})
    write_export(folder, weights, Tokenizer.load("grammar", MODEL.text.max_length))
    return folder


def write_faces(folder: Path, **fields) -> Path:
    write_drawn(dataclasses.replace(FACES, **fields), folder)
    return folder
