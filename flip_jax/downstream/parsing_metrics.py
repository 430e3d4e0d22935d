"""F1 of parsing: per class from confusion matrices summed over pictures, then the mean.

Source: arXiv 2112.03109 (FaRL), section 4: the background (class 0) counts for no mean.
"""

from __future__ import annotations

import numpy as np

from flip_jax.downstream.intervals import Statistic, mean_of_defined

METRICS = ("F1", "pixel accuracy")  # in percent


def confusion(predicted: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """int64 [K, K]: pixels of each true class (row) that were given each class (column).

    Args:
      predicted, truth: class numbers below `classes`, of one shape.
    """
    pairs = truth.astype(np.int64).ravel() * classes + predicted.ravel()
    return np.bincount(pairs, minlength=classes**2).reshape(classes, classes)


def parsing_statistic(confusions: np.ndarray) -> Statistic:
    """Numbers in percent: `METRICS`, then F1 of the classes from 1 on.

    F1 of a class is 2 x hits / (true pixels + predicted pixels) over all pictures with weight; it
    is not defined, and in no mean, for a class that is neither there nor predicted.

    Args:
      confusions: int [N, K, K], of each picture.
    """
    hits = confusions.diagonal(axis1=1, axis2=2).astype(np.float64)
    marked = (confusions.sum(1) + confusions.sum(2)).astype(np.float64)

    def statistic(weights: np.ndarray) -> np.ndarray:
        right, both = weights @ hits, weights @ marked
        with np.errstate(invalid="ignore"):
            each = 200 * right[:, 1:] / both[:, 1:]
            accuracy = 200 * right.sum(1) / both.sum(1)
        return np.column_stack([mean_of_defined(each), accuracy, each])

    return statistic


def picture_f1(confusions: np.ndarray) -> np.ndarray:
    """float64 [N]: mean F1 of each picture by itself, in percent; orders pictures by how hard."""
    return parsing_statistic(confusions)(np.eye(len(confusions)))[:, 0]
