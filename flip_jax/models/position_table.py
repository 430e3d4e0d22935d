"""Position tables for another image size."""

from __future__ import annotations

import numpy as np


def resize_position_table(table: np.ndarray, side: int) -> np.ndarray:
    """Bicubic resize of a square grid of positions; the class token's row is kept.

    The kernel is Keys' cubic with a = -0.75, pixel centres at half numbers, edges repeated, no
    antialiasing: what `torch.nn.functional.interpolate(mode="bicubic", align_corners=False)` does,
    with which the official implementation resizes.

    Args:
      table: float32 [1 + n*n, D]; row 0 the class token, then patches row-major.
      side: patches per side of the result.

    Returns:
      float32 [1 + side*side, D]; `table` itself if the size is the same.

    Raises:
      ValueError: the rows after the first are no square grid.
    """
    old = round((len(table) - 1) ** 0.5)
    if old * old != len(table) - 1:
        raise ValueError(f"a position table of {len(table)} rows is not 1 + n*n for any n")
    if old == side:
        return table
    grid = table[1:].reshape(old, old, -1).astype(np.float64)
    weights = _cubic_weights(old, side)
    resized = np.einsum("yi,xj,ijd->yxd", weights, weights, grid, optimize=True)
    return np.concatenate([table[:1], resized.reshape(side * side, -1).astype(np.float32)])


def _cubic_weights(old: int, new: int) -> np.ndarray:
    """float64 [new, old]: row n holds the weights of the old points in the new point n."""
    a = -0.75
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int) - 1
    weights = np.zeros((new, old))
    for tap in range(4):
        distance = np.abs(centre - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        point = np.clip(first + tap, 0, old - 1)
        # add.at: at an edge several taps fall on the same point.
        np.add.at(weights, (np.arange(new), point), np.where(distance <= 1, near, far))
    return weights
