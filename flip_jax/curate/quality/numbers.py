"""Means, percentiles and histograms from counts of whole numbers, or from values; arrays in."""

from __future__ import annotations

import numpy as np

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


def of_counts(counts: np.ndarray) -> dict[str, float] | None:
    """Mean, least, greatest and percentiles of whole numbers of which int64 [N] counts are given;
    None where there are none. A percentile is the smallest number that so many do not exceed."""
    total = int(counts.sum())
    if not total:
        return None
    some = np.flatnonzero(counts)
    summed = np.cumsum(counts)
    found = {"mean": round(float(counts @ np.arange(len(counts))) / total, 4)}
    found |= {"least": int(some[0]), "greatest": int(some[-1])}
    for percent in PERCENTILES:
        found[f"p{percent}"] = int(np.searchsorted(summed, percent / 100 * total))
    return found


def of_values(values: np.ndarray, width: float, digits: int) -> dict[str, float] | None:
    """Mean, spread, percentiles and mode of float [N]; None where there are none.

    Args:
      width: of the bins whose fullest one's middle is the mode.
      digits: after the point, of all of them.
    """
    if not len(values):
        return None
    bins, sizes = np.unique(np.floor(values / width), return_counts=True)
    found = {
        "mean": float(values.mean()),
        "standard_deviation": float(values.std()),
        "mode": float((bins[sizes.argmax()] + 0.5) * width),
    }
    for percent in PERCENTILES:
        found[f"p{percent}"] = float(np.percentile(values, percent))
    return {name: round(value, digits) for name, value in found.items()}


def binned(counts: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """int64 [E - 1]: how many of the numbers counted in int64 [N] lie in [edge, next edge)."""
    summed = np.concatenate([[0], np.cumsum(counts)])
    return np.diff(summed[np.clip(edges, 0, len(counts))])
