"""What the settings of dense tasks have in common."""

from __future__ import annotations

import numpy as np


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
