"""Metrics of sketch-less face image retrieval: how early a growing sketch finds its photo.

r(i, t) is the rank of sketch i's own photo after t of T steps, 1 = first: the number of gallery
photos at least as similar as the own one, so that a tie counts against the model. With N photos:

    percentile p = (N - r) / (N - 1)        weight w(t) = exp(1 - t / T) / e = exp(-t / T)
    m@A  = mean over i, t of p              w@mA = mean over i, t of w p
    m@B  = mean over i, t of 1 / r          w@mB = mean over i, t of w / r
    A@q  = share of complete sketches (t = T) with r <= q

all in percent. The weights are not normalised, as in the source: w@mA cannot pass 100 times their
mean, 62.6 for 50 steps. Source: ddw2AIGROUP2CQUPT/SLFIR:src/stage2/eval_model.py;
eval/retrieval_eval.py of the official FLIP.
"""

from __future__ import annotations

import numpy as np

CUTOFFS = (1, 5, 10)
METRICS = ("m@A", "m@B", "w@mA", "w@mB", *(f"A@{q}" for q in CUTOFFS))


def step_weights(steps: int) -> np.ndarray:
    """exp(1 - t / T) / e for t = 1..T: float64 [T], early steps count more."""
    return np.exp(-np.arange(1, steps + 1) / steps)


def per_sketch(ranks: np.ndarray, gallery: int) -> dict[str, np.ndarray]:
    """What each sketch adds to the metrics, in percent; the metrics are the means.

    Args:
      ranks: int [N, T], 1 = first; the last step is the complete sketch.
      gallery: photos that were ranked, 2 or more.

    Returns:
      {name of `METRICS`: float64 [N]}

    Raises:
      ValueError: the shape is another, or a rank is outside 1..gallery.
    """
    _check(ranks, gallery)
    weights = step_weights(ranks.shape[1])
    percentile, reciprocal = _percentile(ranks, gallery), 1.0 / ranks
    values = {
        "m@A": percentile.mean(axis=1),
        "m@B": reciprocal.mean(axis=1),
        "w@mA": (weights * percentile).mean(axis=1),
        "w@mB": (weights * reciprocal).mean(axis=1),
    }
    values |= {f"A@{q}": (ranks[:, -1] <= q).astype(float) for q in CUTOFFS}
    return {name: 100.0 * value for name, value in values.items()}


def metrics(ranks: np.ndarray, gallery: int) -> dict[str, float]:
    """All `METRICS` in percent; arguments and errors as `per_sketch`."""
    return {name: float(np.mean(value)) for name, value in per_sketch(ranks, gallery).items()}


def chance(gallery: int, steps: int) -> dict[str, float]:
    """The expected `METRICS` of a random order, in percent."""
    mean_weight = float(np.mean(step_weights(steps)))
    area = 50.0
    reciprocal = 100.0 * float(np.mean(1.0 / np.arange(1, gallery + 1)))
    values = {
        "m@A": area,
        "m@B": reciprocal,
        "w@mA": mean_weight * area,
        "w@mB": mean_weight * reciprocal,
    }
    return values | {f"A@{q}": 100.0 * min(q, gallery) / gallery for q in CUTOFFS}


def curves(ranks: np.ndarray, gallery: int) -> dict[str, np.ndarray]:
    """The early-retrieval curves, means over sketches; arguments and errors as `per_sketch`.

    Returns:
      {"share": of the sketch that is drawn, 1 / T .. 1; "percentile": in percent; "reciprocal":
      1 / rank}, float64 [T] each; the means over T of the last two are m@A and m@B / 100.
    """
    _check(ranks, gallery)
    steps = ranks.shape[1]
    return {
        "share": np.arange(1, steps + 1) / steps,
        "percentile": 100.0 * _percentile(ranks, gallery).mean(axis=0),
        "reciprocal": (1.0 / ranks).mean(axis=0),
    }


def _percentile(ranks: np.ndarray, gallery: int) -> np.ndarray:
    return (gallery - ranks) / (gallery - 1)


def _check(ranks: np.ndarray, gallery: int) -> None:
    if gallery < 2:
        raise ValueError(f"a gallery of {gallery} photos has no order; it needs 2 or more")
    if ranks.ndim != 2 or not ranks.size:
        raise ValueError(f"ranks are of shape {list(ranks.shape)}, must be [sketches, steps]")
    if ranks.min() < 1 or ranks.max() > gallery:
        raise ValueError(
            f"ranks go from {ranks.min()} to {ranks.max()}; in a gallery of {gallery} photos they "
            f"must be 1..{gallery}"
        )
