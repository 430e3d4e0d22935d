"""Train a tokenizer on records, measure it on pictures it has not seen, write it down."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from flip_jax.config import check_types
from flip_jax.convert.conversion import whole_or_absent
from flip_jax.data.records import RecordSource
from flip_jax.models.visual_tokenizer import (
    CELL,
    TokenizerConfig,
    VisualTokenizer,
    nearest,
    unit_pixels,
    vq_pixels,
    vq_states,
)
from flip_jax.visual_tokenizer import training
from flip_jax.visual_tokenizer.pictures import batches, first_pictures
from flip_jax.visual_tokenizer.saved import load_tokenizer, save_tokenizer
from flip_jax.visual_tokenizer.training import Recipe

Array = jax.Array

REPORT = "report.png"
_SHOWN = 8  # pictures of the report
_LOG_EVERY = 50  # steps


@dataclass(frozen=True)
class Settings:
    """What is trained, on what, and how; every field can be set on the command line."""

    codes: int = 1024  # vocabulary
    code_width: int = 32
    width: int = 64  # channels of the convolutions
    blocks: int = 2  # residual blocks of encoder and decoder
    # Pixels of a training picture; 8 of them, each way, make a code. A run's pictures are brought
    # to 8 px per patch, so take 8 x image_size / patch_size of the model: 112 for ViT-B/16.
    size: int = 112
    batch_size: int = 32
    steps: int = 1500
    lr: float = 1e-3
    commitment: float = 0.25
    decay: float = 0.99  # of the codebook's moving average
    train_split: str = "train"
    eval_split: str = "test"
    limit: int = 500  # pictures of the evaluation
    seed: int = 0
    threads: int = 2  # that decode pictures


def validate(settings: Settings) -> Settings:
    """Raises ValueError naming the field, its value and what is allowed."""
    check_types(settings, "settings")
    for name, value in dataclasses.asdict(settings).items():
        least = {"codes": 2, "blocks": 0, "seed": 0, "commitment": 0}.get(name, 1)
        if isinstance(value, int) and value < least:
            raise ValueError(f"settings.{name}={value}: must be at least {least}")
    if settings.size % CELL:
        raise ValueError(f"settings.size={settings.size}: must be a multiple of {CELL}")
    if settings.lr <= 0 or settings.commitment < 0:
        raise ValueError(f"settings.lr={settings.lr}, commitment={settings.commitment}: too low")
    if not 0 < settings.decay < 1:
        raise ValueError(f"settings.decay={settings.decay}: must be in (0, 1)")
    return settings


def train(settings: Settings, data: Path, out: Path, command: Sequence[str]) -> dict[str, Any]:
    """Trains, evaluates, writes `out`: arrays, `tokenizer.json`, `report.png`.

    Minutes long, so not resumable: `out` is whole or absent.

    Returns:
      what `tokenizer.json` holds.

    Raises:
      FileExistsError: `out` is there. ValueError, OSError: settings or data that cannot be used.
      FloatingPointError: the loss is not a number.
    """
    validate(settings)
    with whole_or_absent(out) as partial:
        source = RecordSource(data, settings.train_split)
        held_out = RecordSource(data, settings.eval_split)
        seen = first_pictures(held_out, settings.size, settings.limit, settings.threads)
        start = time.perf_counter()
        tokenizer = _fit(settings, source)
        seconds = time.perf_counter() - start
        figures, shown = evaluate(tokenizer, seen, settings.batch_size)
        about = {
            "command": list(command),
            "settings": dataclasses.asdict(settings),
            "data": {"manifest": source.manifest_hash, "records": len(source)},
            "held_out": figures,
            "train_seconds": round(seconds, 1),
        }
        save_tokenizer(partial, tokenizer, about)
        _report(seen[:_SHOWN], shown[:_SHOWN]).save(partial / REPORT)
        about = load_tokenizer(partial)[1]
    return about


def _fit(settings: Settings, source: RecordSource) -> VisualTokenizer:
    cfg = TokenizerConfig(
        "vq", settings.codes, settings.width, settings.blocks, settings.code_width
    )
    recipe = Recipe(settings.lr, settings.commitment, settings.decay)
    tx, key = training.make_optimizer(recipe, settings.steps), jax.random.key(settings.seed)
    stream = batches(source, settings.size, settings.batch_size, settings.seed, settings.threads)
    start_key, key = jax.random.split(key)
    state = jax.jit(lambda image: training.init_state(cfg, tx, image, start_key))(next(stream))
    step = functools.partial(training.train_step, cfg=cfg, recipe=recipe, tx=tx)
    step = jax.jit(step, donate_argnums=0)
    with tqdm(total=settings.steps, disable=None) as progress:
        for number in range(1, settings.steps + 1):
            state, metrics = step(state, next(stream), key)
            progress.update()
            if number % _LOG_EVERY == 0 or number == settings.steps:
                values = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(values["psnr"]):
                    raise FloatingPointError(
                        f"step {number}: the loss is not a number; try a lower --lr than "
                        f"{settings.lr}"
                    )
                progress.set_postfix({name: f"{value:.1f}" for name, value in values.items()})
    stream.close()
    params = jax.device_get(state.params | {"codebook": state.codebook})
    return VisualTokenizer(params, cfg)


@jax.jit
def _rebuilt(tokenizer: VisualTokenizer, image: Array) -> tuple[Array, Array, Array]:
    """(codes [B, G, G], pictures uint8, mean squared error of each, pixels in 0..1)."""
    pixels = unit_pixels(image, image.shape[1])
    codebook = tokenizer.params["codebook"]
    codes = nearest(vq_states(tokenizer, pixels), codebook)
    found = jnp.clip(vq_pixels(tokenizer, codebook[codes]), 0.0, 1.0)
    error = jnp.mean(jnp.square(found - pixels), axis=(1, 2, 3))
    return codes, jnp.round(255.0 * found).astype(jnp.uint8), error


def evaluate(
    tokenizer: VisualTokenizer, images: np.ndarray, batch_size: int
) -> tuple[dict[str, float], np.ndarray]:
    """How well a tokenizer does on uint8 [N, S, S, 3].

    Returns:
      ({"pictures"; "psnr", dB, mean over pictures; "psnr_of_means", of pictures of one colour, the
      picture's mean, instead; "perplexity"; "codes_used"}, reconstructions uint8 [N, S, S, 3])
    """
    counts, errors, rebuilt = np.zeros(tokenizer.cfg.codes, np.int64), [], []
    for start in range(0, len(images), batch_size):
        rows = images[start : start + batch_size]
        fill = np.repeat(rows[-1:], batch_size - len(rows), axis=0)  # one shape is compiled
        codes, found, error = jax.device_get(_rebuilt(tokenizer, np.concatenate([rows, fill])))
        counts += np.bincount(codes[: len(rows)].ravel(), minlength=len(counts))
        errors.append(error[: len(rows)])
        rebuilt.append(found[: len(rows)])
    pixels = images.astype(np.float64) / 255.0
    plain = np.var(pixels, axis=(1, 2)).mean(axis=1)
    figures = {
        "pictures": len(images),
        "psnr": _mean_psnr(np.concatenate(errors)),
        "psnr_of_means": _mean_psnr(plain),
        "perplexity": round(float(training.perplexity(jnp.asarray(counts))), 1),
        "codes_used": int((counts > 0).sum()),
    }
    return figures, np.concatenate(rebuilt)


def _mean_psnr(errors: np.ndarray) -> float:
    return round(float(np.mean(-10.0 * np.log10(np.maximum(errors, 1e-10)))), 2)


def _report(images: np.ndarray, rebuilt: np.ndarray) -> Image.Image:
    """Pictures above their reconstructions."""
    rows = [np.concatenate(list(row), axis=1) for row in (images, rebuilt)]
    sheet = np.concatenate(rows)
    times = max(1, 128 // images.shape[1])
    size = (times * sheet.shape[1], times * sheet.shape[0])
    return Image.fromarray(cv2.resize(sheet, size, interpolation=cv2.INTER_NEAREST))
