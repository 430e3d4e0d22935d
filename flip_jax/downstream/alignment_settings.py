"""The settings of face alignment: FaRL's recipes, and one for small models.

Source: arXiv 2112.03109 (FaRL), section 4, and its published configs
(farl/experiments/face_alignment).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from flip_jax.downstream.alignment_metrics import NORMALIZERS
from flip_jax.downstream.dense_augment import Augment
from flip_jax.downstream.dense_settings import four_rates, numbers
from flip_jax.downstream.dense_training import DenseRecipe


@dataclass(frozen=True)
class Recipe:
    """What the recipes differ in; `size` None = twice the model's, `heatmap` None = four cells per
    patch, `normalizer` None = the first of `NORMALIZERS` that the points have."""

    size: int | None
    heatmap: int | None
    channels: int
    epochs: int
    batch_size: int
    finetune: bool
    crop: float
    rates: str
    decay_at: float
    hidden: Literal["leave", "count"]
    normalizer: Literal["ocular", "pupil", "diagonal", "box"] | None
    evaluate_every: int


_FARL = {
    "size": 448,
    "heatmap": 128,
    "channels": 768,
    "batch_size": 40,
    "finetune": True,
    "rates": "1e-4 1e-2 1e-2 1e-2",
    "evaluate_every": 5,
}
# The rates of FaRL fall to a tenth after 200 epochs: at 0.8 of 250, never in 150.
RECIPES = {
    # For a model of the size of configs/demo.py on two cores.
    "small": Recipe(
        size=None,
        heatmap=None,
        channels=32,
        epochs=10,
        batch_size=16,
        finetune=False,
        crop=0.8,
        rates="1e-4 5e-3 5e-3 5e-3",
        decay_at=0.7,
        hidden="leave",
        normalizer=None,
        evaluate_every=2,
    ),
    # FaRL's scorer counts hidden points: AFLW-19 has coordinates for them.
    "aflw19": Recipe(
        **_FARL, epochs=150, crop=1.0, decay_at=1.0, hidden="count", normalizer="diagonal"
    ),
    "300w": Recipe(**_FARL, epochs=250, crop=0.8, decay_at=0.8, hidden="leave", normalizer=None),
    "wflw": Recipe(**_FARL, epochs=150, crop=0.8, decay_at=1.0, hidden="leave", normalizer=None),
}
# Shift, turn and scale as published; `occlusion` is published without its probability.
AUGMENT = Augment(shift=0.05, rotate=0.174, scale=0.1, normal=False, occlusion=0.5, noise=0.5)


@dataclass(frozen=True)
class Settings:
    """What `--field=value` sets. None = as the recipe has it."""

    # `aflw19`, `300w` and `wflw` are FaRL's; `small` is for small models on few cores.
    recipe: Literal["small", "aflw19", "300w", "wflw"] = "small"
    size: int | None = None  # pixels of the network's input
    heatmap: int | None = None  # cells of a side of the heatmaps
    channels: int | None = None  # width of the head
    epochs: int | None = None  # of all training pictures; fewer pictures are shown more often
    batch_size: int | None = None  # set as --batch_size; --batch-size is of frozen encoders
    finetune: bool | None = None  # whether the image tower is trained, too
    # Of the input's side, what the longer side of the face's box takes.
    crop: float | None = None
    rates: str | None = None  # learning rates of tower, neck, decoder and output
    decay_at: float | None = None  # share of the epochs after which rates are a tenth
    # Points that the annotators could not see: left out of loss and errors, or counted where the
    # data set has a guess of theirs.
    hidden: Literal["leave", "count"] | None = None
    # What the epoch is chosen by, see `alignment_metrics.NORMALIZERS`.
    normalizer: Literal["ocular", "pupil", "diagonal", "box"] | None = None
    evaluate_every: int | None = None  # epochs
    # FaRL mirrors no pictures; `--augment.flip=0.5` does.
    augment: Augment = field(default_factory=lambda: AUGMENT)
    fractions: str = "100"  # percent of the training pictures
    seed: int = 0  # of subsets (each holds the smaller ones), start values, order, augmentation
    train_split: str = "train"
    val_split: str = "val"  # where there is none, a tenth of the training groups
    test_split: str = "test"
    random_backbone: bool = True  # also the same on a random-initialised backbone
    by: str = ""  # columns to break the results down by, see `columns.read_columns`
    resamples: int = 1000  # of the bootstrap

    def resolved(self, image_size: int, patch_size: int) -> Settings:
        """With the recipe's values in place of None, but for `normalizer`.

        Args:
          image_size, patch_size: the model's.

        Raises:
          ValueError: a number is out of range.
        """
        given = {n: v for n, v in vars(self).items() if v is not None}
        full = dataclasses.replace(self, **vars(RECIPES[self.recipe]) | given)
        size = 2 * image_size if full.size is None else full.size
        cells = 4 * (size // patch_size) if full.heatmap is None else full.heatmap
        full = dataclasses.replace(full, size=size, heatmap=cells)
        _check(full)
        return full

    def percents(self) -> list[float]:
        """`fractions`, ascending."""
        return sorted(set(numbers("fractions", self.fractions, 100.0)))

    def dense_recipe(self, share: float) -> DenseRecipe:
        """Of a resolved one.

        Args:
          share: of the training pictures that are used, 0 to 1. The steps are as many for any
            share, or a small one would be judged by a training that has hardly begun.
        """
        return DenseRecipe(
            epochs=max(1, round(self.epochs / share)),
            batch_size=self.batch_size,
            rates=four_rates(self.rates),
            decay_at=self.decay_at,
            evaluate_every=max(1, round(self.evaluate_every / share)),
        )


def _check(settings: Settings) -> None:
    settings.percents()
    four_rates(settings.rates)
    least = ("epochs", "batch_size", "evaluate_every", "resamples", "channels", "size")
    for name, low in dict.fromkeys(least, 1).items() | {("heatmap", 2)}:
        if getattr(settings, name) < low:
            value = getattr(settings, name)
            raise ValueError(f"settings.{name}={value}: must be at least {low}")
    if not 0 < settings.crop <= 2:
        raise ValueError(f"settings.crop={settings.crop}: must be above 0 and at most 2")
    if not 0 < settings.decay_at <= 1:
        raise ValueError(f"settings.decay_at={settings.decay_at}: must be above 0 and at most 1")
    if settings.normalizer not in (None, *NORMALIZERS):
        raise ValueError(
            f"settings.normalizer={settings.normalizer!r}: must be {', '.join(NORMALIZERS)}"
        )
    settings.augment.check("settings.augment")
