"""The numbers of a retrieval as functions of row weights, for intervals and breakdowns."""

from __future__ import annotations

import numpy as np

from flip_jax.downstream.intervals import Statistic
from flip_jax.downstream.retrieval import CUTOFFS, DIRECTIONS, Retrieval

# Of one order of the candidates (`cosine` or `reranked`).
NUMBERS = (
    *(f"{d} {name}" for d in DIRECTIONS for name in (*(f"R@{k}" for k in CUTOFFS), "median rank")),
    "mean recall",
)


def metric_names(label: str, found: Retrieval) -> list[str]:
    """Names of what `retrieval_statistic` gives: `label cosine t2i R@1` ..."""
    return [f"{label} {order} {name}" for order in found.ranks for name in NUMBERS]


def retrieval_statistic(found: Retrieval) -> Statistic:
    """All numbers of a retrieval for weights of its pictures.

    A picture counts as often as its weight says, as a query and with its captions as queries. What
    is searched is always the whole gallery, so that numbers of parts can be compared.

    Returns:
      float32 weights [R, images] -> [R, 9 per order]: R@k in percent, median rank from 1, mean of
      the six recalls; NaN where no query has weight.
    """
    owners = {"t2i": found.image_of, "i2t": np.arange(found.images)}
    parts = [
        [_ranks_statistic(ranks[direction], owners[direction]) for direction in DIRECTIONS]
        for ranks in found.ranks.values()
    ]

    def statistic(weights: np.ndarray) -> np.ndarray:
        columns = []
        for directions in parts:
            both = [one(weights) for one in directions]
            recalls = np.concatenate([numbers[:, : len(CUTOFFS)] for numbers in both], axis=1)
            columns += [*both, recalls.mean(axis=1, keepdims=True)]
        return np.concatenate(columns, axis=1)

    return statistic


def _ranks_statistic(ranks: np.ndarray, owner: np.ndarray) -> Statistic:
    """[R, len(CUTOFFS) + 1]: recalls and median rank.

    Args:
      ranks: int [Q], 0 = first; owner: int [Q], the row whose weight a query has.
    """
    order = np.argsort(ranks, kind="stable")
    ranks, owner = ranks[order], owner[order]
    ends = np.searchsorted(ranks, CUTOFFS) - 1  # the last query that is found, by cutoff

    def statistic(weights: np.ndarray) -> np.ndarray:
        sums = np.cumsum(weights[:, owner], axis=1, dtype=np.float64)
        total = sums[:, -1:]
        found = np.where(ends >= 0, sums[:, ends], 0.0)
        with np.errstate(invalid="ignore"):
            recalls = 100.0 * found / total
        # Weights are whole numbers, so the two middle queries are found exactly.
        lower, upper = (sums >= total / 2).argmax(axis=1), (sums > total / 2).argmax(axis=1)
        middle = (ranks[lower] + ranks[upper]) / 2 + 1.0
        median = np.where(total[:, 0] > 0, middle, np.nan)
        return np.concatenate([recalls, median[:, None]], axis=1)

    return statistic


def chance_numbers(found: Retrieval) -> dict[str, float]:
    """`NUMBERS` of a random order."""
    recalls = found.chance()
    numbers = {f"{d} R@{k}": recalls[f"{d}/R@{k}"] for d in DIRECTIONS for k in CUTOFFS}
    numbers["mean recall"] = float(np.mean(list(numbers.values())))
    own = np.bincount(found.image_of, minlength=found.images)
    numbers["t2i median rank"] = _median_rank(found.images, np.ones(1, np.int64))
    numbers["i2t median rank"] = _median_rank(len(found.image_of), own)
    return {name: numbers[name] for name in NUMBERS}


def _median_rank(total: int, own: np.ndarray) -> float:
    """Rank from 1 that half of the queries reach or better, `total` candidates in random order.

    Args:
      own: int [Q], right candidates of each query.
    """
    sizes, times = np.unique(own, return_counts=True)
    # Chance that none of `own` candidates is among the first r, for r = 1, 2 ...
    ranks = np.arange(total)[:, None]
    steps = np.clip((total - sizes - ranks) / (total - ranks), 0.0, 1.0)
    missed = np.cumprod(steps, axis=0) @ (times / len(own))
    lower, upper = (missed <= 0.5 + 1e-9).argmax(), (missed < 0.5 - 1e-9).argmax()
    return (lower + upper) / 2 + 1.0
