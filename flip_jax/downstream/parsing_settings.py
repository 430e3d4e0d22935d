"""The settings of face parsing: FaRL's recipes, and one for small models.

Source: arXiv 2112.03109 (FaRL), section 4, and its published configs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from flip_jax.downstream.dense_settings import DenseSettings


@dataclass(frozen=True)
class Recipe:
    """What the recipes differ in; `size` None = the model's."""

    size: int | None
    channels: int
    epochs: int
    batch_size: int
    finetune: bool
    warp: float
    align: Literal["none", "points"]
    rates: str
    evaluate_every: int
    decay_at: float = 2 / 3


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
class Settings(DenseSettings):
    """What `--field=value` sets. None = as the recipe has it."""

    # `celeba_hq` and `lapa` are FaRL's; `small` is for small models on few cores.
    recipe: Literal["small", "celeba_hq", "lapa"] = "small"
    # Factor of the tanh warp, which gives the face the middle and squeezes what is around it into
    # the edges; 0 = none.
    warp: float | None = None
    # `points`: faces are turned and scaled by five of their landmarks; `none`: whole pictures.
    align: Literal["none", "points"] | None = None

    def resolved(self, image_size: int) -> Settings:
        """With the recipe's values in place of None.

        Args:
          image_size: the model's.

        Raises:
          ValueError: a number is out of range.
        """
        full = self.completed(RECIPES[self.recipe])
        if full.size is None:
            full = dataclasses.replace(full, size=image_size)
        full.check()
        if not 0 <= full.warp <= 1:
            raise ValueError(f"settings.warp={full.warp}: must be from 0 to 1")
        return full
