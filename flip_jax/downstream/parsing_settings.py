"""The settings of face parsing: FaRL's recipes, and one for small models.

Source: arXiv 2112.03109 (FaRL), section 4, and its published configs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from flip_jax.downstream.dense_augment import Augment
from flip_jax.downstream.dense_settings import four_rates, numbers
from flip_jax.downstream.dense_training import DenseRecipe


@dataclass(frozen=True)
class Recipe:
    """What the recipes differ in; `size` None = twice the model's."""

    size: int | None
    channels: int
    epochs: int
    batch_size: int
    finetune: bool
    warp: float
    align: Literal["none", "points"]
    rates: str
    evaluate_every: int


_FARL = {
    "size": 448,
    "channels": 768,
    "epochs": 300,
    "batch_size": 40,
    "finetune": True,
    "rates": "1e-4 1e-3 1e-3 1e-3",
    "evaluate_every": 5,
}
RECIPES = {
    # For a model of the size of configs/demo.py on two cores.
    "small": Recipe(
        size=None,
        channels=32,
        epochs=6,
        batch_size=16,
        finetune=False,
        warp=0.0,
        align="none",
        rates="1e-4 3e-3 3e-3 3e-3",
        evaluate_every=2,
    ),
    "celeba_hq": Recipe(**_FARL, warp=0.0, align="none"),
    "lapa": Recipe(**_FARL, warp=0.8, align="points"),
}


@dataclass(frozen=True)
class Settings:
    """What `--field=value` sets. None = as the recipe has it."""

    # `celeba_hq` and `lapa` are FaRL's; `small` is for small models on few cores.
    recipe: Literal["small", "celeba_hq", "lapa"] = "small"
    size: int | None = None  # pixels of the network's input
    channels: int | None = None  # width of the head
    epochs: int | None = None
    batch_size: int | None = None  # set as --batch_size; --batch-size is of frozen encoders
    finetune: bool | None = None  # whether the image tower is trained, too
    # Factor of the tanh warp, which gives the face the middle and squeezes what is around it into
    # the edges; 0 = none.
    warp: float | None = None
    # `points`: faces are turned and scaled by five of their landmarks; `none`: whole pictures.
    align: Literal["none", "points"] | None = None
    rates: str | None = None  # learning rates of tower, neck, decoder and output
    evaluate_every: int | None = None  # epochs
    augment: Augment = field(default_factory=Augment)
    fractions: str = "100"  # percent of the training pictures
    seed: int = 0  # of subsets (each holds the smaller ones), start values, order, augmentation
    train_split: str = "train"
    val_split: str = "val"  # where there is none, a tenth of the training groups
    test_split: str = "test"
    random_backbone: bool = True  # also the same on a random-initialised backbone
    by: str = ""  # columns to break the results down by, see `columns.read_columns`
    resamples: int = 1000  # of the bootstrap

    def resolved(self, image_size: int) -> Settings:
        """With the recipe's values in place of None.

        Args:
          image_size: the model's.

        Raises:
          ValueError: a number is out of range.
        """
        given = {n: v for n, v in vars(self).items() if v is not None}
        full = dataclasses.replace(self, **vars(RECIPES[self.recipe]) | given)
        if full.size is None:
            full = dataclasses.replace(full, size=2 * image_size)
        _check(full)
        return full

    def percents(self) -> list[float]:
        """`fractions`, ascending."""
        return sorted(set(numbers("fractions", self.fractions, 100.0)))

    def dense_recipe(self) -> DenseRecipe:
        """Of a resolved one."""
        return DenseRecipe(
            epochs=self.epochs,
            batch_size=self.batch_size,
            rates=four_rates(self.rates),
            evaluate_every=self.evaluate_every,
        )


def _check(settings: Settings) -> None:
    settings.percents()
    four_rates(settings.rates)
    for name in ("epochs", "batch_size", "evaluate_every", "resamples", "channels"):
        if getattr(settings, name) < 1:
            value = getattr(settings, name)
            raise ValueError(f"settings.{name}={value}: must be at least 1")
    if not 0 <= settings.warp <= 1:
        raise ValueError(f"settings.warp={settings.warp}: must be from 0 to 1")
    settings.augment.check("settings.augment")
