"""How well scores of 40 attributes agree with labels: accuracy, balanced accuracy, AP.

All of them are means over the attributes for which they are defined (AP needs a positive, balanced
accuracy a positive and a negative); unknown labels count nowhere. In percent.
"""

from __future__ import annotations

import numpy as np

from flip_jax.downstream.intervals import Interval, Statistic, mean_of_defined

METRICS = ("accuracy", "balanced accuracy", "AP")


def attribute_statistic(present: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> Statistic:
    """The metrics of all attributes as a function of row weights.

    Args:
      present: bool [N, K], what is predicted.
      scores: float [N, K], higher = more likely there; only their order counts, for AP.
      labels: int8 [N, K], 1 present, 0 absent, -1 unknown.

    Returns:
      float32 weights [R, N] -> [R, 3 + 3 K]: the means of `METRICS` over attributes, then each
      metric of each attribute, in percent; NaN where not defined.
    """
    known, positive = labels >= 0, labels == 1
    right = (present == positive) & known
    columns = [_Ranking(scores[:, k], positive[:, k], known[:, k]) for k in range(labels.shape[1])]
    tables = [array.astype(np.float32) for array in (right, known, right & positive, positive)]

    def statistic(weights: np.ndarray) -> np.ndarray:
        hits, total, true_positive, positives = (
            (weights @ table).astype(np.float64) for table in tables
        )
        with np.errstate(invalid="ignore", divide="ignore"):
            accuracy = hits / total
            recall = true_positive / positives
            specificity = (hits - true_positive) / (total - positives)
        balanced = (recall + specificity) / 2
        precision = np.stack([column.average_precision(weights) for column in columns], axis=1)
        each = 100.0 * np.stack([accuracy, balanced, precision], axis=1)  # [R, 3, K]
        means = np.stack([mean_of_defined(each[:, m]) for m in range(3)], axis=1)
        return np.concatenate([means, each.reshape(len(each), -1)], axis=1)

    return statistic


def by_attribute(numbers: list[Interval]) -> list[list[Interval]]:
    """The per-attribute part of a measured `attribute_statistic`: [3][K]."""
    each = numbers[len(METRICS) :]
    count = len(each) // len(METRICS)
    return [each[start : start + count] for start in range(0, len(each), count)]


class _Ranking:
    """The known rows of one attribute, best score first."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray, known: np.ndarray):
        rows = np.flatnonzero(known)
        self._order = rows[np.argsort(-scores[rows], kind="stable")]
        self._positive = positive[self._order].astype(np.float32)
        # Equal scores are one threshold: precision is taken after the last of them.
        ordered = scores[self._order]
        self._last = np.searchsorted(-ordered, -ordered, side="right") - 1

    def average_precision(self, weights: np.ndarray) -> np.ndarray:
        """Sum over thresholds of recall gained times precision, for weights [R, N]: [R]."""
        weights = weights[:, self._order].astype(np.float64)
        hits = weights * self._positive
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = np.cumsum(hits, axis=1) / np.cumsum(weights, axis=1)
            precision = np.where(hits > 0, precision[:, self._last], 0.0)
            return (hits * precision).sum(axis=1) / hits.sum(axis=1)
