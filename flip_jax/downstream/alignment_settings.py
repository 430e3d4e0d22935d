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
from flip_jax.downstream.dense_settings import DenseSettings


@dataclass(frozen=True)
class Recipe:
    """What the recipes differ in; `size` None = the model's, `heatmap` None = four cells per
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
class Settings(DenseSettings):
    """What `--field=value` sets. None = as the recipe has it."""

    # `aflw19`, `300w` and `wflw` are FaRL's; `small` is for small models on few cores.
    recipe: Literal["small", "aflw19", "300w", "wflw"] = "small"
    heatmap: int | None = None  # cells of a side of the heatmaps
    # Of the input's side, what the longer side of the face's box takes.
    crop: float | None = None
    # Points that the annotators could not see: left out of loss and errors, or counted where the
    # data set has a guess of theirs.
    hidden: Literal["leave", "count"] | None = None
    # What the epoch is chosen by, see `alignment_metrics.NORMALIZERS`.
    normalizer: Literal["ocular", "pupil", "diagonal", "box"] | None = None
    # FaRL mirrors no pictures; `--augment.flip=0.5` does.
    augment: Augment = field(default_factory=lambda: AUGMENT)

    def resolved(self, image_size: int, patch_size: int) -> Settings:
        """With the recipe's values in place of None, but for `normalizer`.

        Args:
          image_size, patch_size: the model's.

        Raises:
          ValueError: a number is out of range.
        """
        full = self.completed(RECIPES[self.recipe])
        size = image_size if full.size is None else full.size
        cells = 4 * (size // patch_size) if full.heatmap is None else full.heatmap
        full = dataclasses.replace(full, size=size, heatmap=cells)
        full.check()
        full.at_least("heatmap", 2)
        if not 0 < full.crop <= 2:
            raise ValueError(f"settings.crop={full.crop}: must be above 0 and at most 2")
        if full.normalizer not in (None, *NORMALIZERS):
            raise ValueError(
                f"settings.normalizer={full.normalizer!r}: must be {', '.join(NORMALIZERS)}"
            )
        return full
