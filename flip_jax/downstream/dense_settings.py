"""The settings that dense tasks share: parsing and alignment have more of their own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np

from flip_jax.downstream.dense_augment import Augment
from flip_jax.downstream.dense_training import DenseRecipe


@dataclass(frozen=True)
class DenseSettings:
    """What `--field=value` sets. None = as the recipe has it."""

    size: int | None = None  # pixels of the network's input
    channels: int | None = None  # width of the head
    epochs: int | None = None  # of all training pictures; fewer pictures are shown more often
    batch_size: int | None = None  # set as --batch_size; --batch-size is of frozen encoders
    finetune: bool | None = None  # whether the image tower is trained, too
    rates: str | None = None  # learning rates of tower, neck, decoder and output
    decay_at: float | None = None  # share of the epochs after which rates are a tenth
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

    def percents(self) -> list[float]:
        """`fractions`, ascending."""
        return sorted(set(numbers("fractions", self.fractions, 100.0)))

    def dense_recipe(self, used: int, pictures: int) -> DenseRecipe:
        """Of settings that have all values.

        Args:
          used: so many training pictures of `pictures`. The steps are as many (but for a part of
            an epoch) for any share, or a small one would be judged by a training that has hardly
            begun.
        """
        longer = self._steps(pictures) / self._steps(used)
        return DenseRecipe(
            epochs=max(1, round(self.epochs * longer)),
            batch_size=self.batch_size,
            rates=four_rates(self.rates),
            decay_at=self.decay_at,
            evaluate_every=max(1, round(self.evaluate_every * longer)),
        )

    def _steps(self, pictures: int) -> int:
        """Of an epoch, as `DenseBatches` counts them."""
        return max(1, round(pictures / self.batch_size))

    def completed(self, recipe: object) -> DenseSettings:
        """With the values of a recipe, a dataclass, in place of None."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return dataclasses.replace(self, **vars(recipe) | given)

    def check(self) -> None:
        """Of settings that have all values.

        Raises:
          ValueError: one is out of range.
        """
        self.percents()
        four_rates(self.rates)
        for name in ("size", "channels", "epochs", "batch_size", "evaluate_every", "resamples"):
            self.at_least(name, 1)
        self.at_least("seed", 0)
        if not 0 < self.decay_at <= 1:
            raise ValueError(f"settings.decay_at={self.decay_at}: must be above 0 and at most 1")
        self.augment.check("settings.augment")

    def at_least(self, name: str, low: int) -> None:
        """Raises: ValueError: the field is below `low`."""
        value = getattr(self, name)
        if value < low:
            raise ValueError(f"settings.{name}={value}: must be at least {low}")


def numbers(name: str, text: str, most: float = np.inf) -> list[float]:
    """The numbers of a field's text, all above 0.

    Raises:
      ValueError: it has others or none.
    """
    try:
        found = [float(word) for word in text.replace(",", " ").split()]
    except ValueError:
        found = []
    if not found or not all(0 < n <= most and n < np.inf for n in found):
        below = f" and at most {most:g}" if most < np.inf else ""
        raise ValueError(f"settings.{name}={text!r}: must be numbers above 0{below}")
    return found


def four_rates(text: str) -> tuple[float, float, float, float]:
    """Learning rates of tower, neck, decoder and output.

    Raises:
      ValueError: not four numbers above 0.
    """
    found = numbers("rates", text)
    if len(found) != 4:
        raise ValueError(
            f"settings.rates={text!r}: must be four numbers, of tower, neck, decoder and output"
        )
    return tuple(found)
