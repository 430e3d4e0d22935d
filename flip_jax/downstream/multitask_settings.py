"""The settings of the multi-task head."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from flip_jax.downstream.dense_augment import Augment
from flip_jax.downstream.dense_settings import DenseSettings, numbers


@dataclass(frozen=True)
class Recipe:
    """For a model of the size of configs/demo.py on two cores; `size` None = the model's."""

    size: int | None = None
    channels: int = 32
    epochs: int = 10
    batch_size: int = 16
    finetune: bool = False
    rates: str = "1e-4 5e-3 5e-3 5e-3"
    decay_at: float = 0.7
    evaluate_every: int = 2


@dataclass(frozen=True)
class Settings(DenseSettings):
    """What `--field=value` sets. None = as `Recipe` has it."""

    # A gray picture has no colour of hair.
    augment: Augment = field(default_factory=lambda: Augment(gray=0.0))
    weights: str = "1 1 1"  # of the losses: parsing, landmarks, attributes

    def resolved(self, image_size: int) -> Settings:
        """With values in place of None.

        Args:
          image_size: the model's.

        Raises:
          ValueError: a number is out of range.
        """
        full = self.completed(Recipe())
        if full.size is None:
            full = dataclasses.replace(full, size=image_size)
        full.check()
        full.three_weights()
        return full

    def three_weights(self) -> tuple[float, float, float]:
        """Of parsing, landmarks and attributes. Raises: ValueError: not three numbers above 0."""
        found = numbers("weights", self.weights)
        if len(found) != 3:
            raise ValueError(
                f"settings.weights={self.weights!r}: must be three numbers, of parsing, landmarks "
                "and attributes"
            )
        return tuple(found)
