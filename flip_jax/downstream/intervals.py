"""How sure a number is: bootstrap over people, and the same numbers for parts of the test set.

Everything is a `Statistic`: a function of row weights. Weight 1 everywhere gives the number itself,
a resample of the groups gives one draw for its interval, and weight 0 outside a part of the rows
gives the number of that part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

# float32 weights [R, N] -> float64 [R, M]: M numbers for each of R weightings of N rows; NaN where
# the rows with weight do not define one.
Statistic = Callable[[np.ndarray], np.ndarray]

RESAMPLES = 1000
LEVEL = 0.95
_BLOCK_BYTES = 2**26  # of weights in memory at a time


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        low, high = (f"{end:.2f}" if np.isfinite(end) else "-" for end in (self.low, self.high))
        return f"{self.value:.2f} [{low}, {high}]"

    def to_dict(self) -> dict[str, float | None]:
        """JSON types; what is not defined is None."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {name: float(v) if np.isfinite(v) else None for name, v in values.items()}


def bootstrap(
    statistic: Statistic,
    groups: np.ndarray,
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    rows: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The numbers, and what they are on resamples of whole groups.

    Pictures of one person are not independent: groups are drawn with replacement, as many as there
    are, and each brings all its rows. The same seed draws the same groups, so that differences of
    numbers can be taken draw by draw. Of a single group nothing is known but itself: its draws are
    NaN.

    Args:
      statistic: see `Statistic`.
      groups: int [N], the group of each row, 0 and up.
      rows: bool [N], the part of the rows to look at; None = all. Groups are drawn from all.

    Returns:
      (numbers float64 [M], draws float64 [resamples, M])
    """
    part = np.ones(len(groups), np.float32) if rows is None else rows.astype(np.float32)
    value = np.asarray(statistic(part[None]), np.float64)[0]
    rng, count = np.random.default_rng(seed), int(groups.max()) + 1
    if len(np.unique(groups[part > 0])) < 2:
        return value, np.full((resamples, len(value)), np.nan)
    block = max(1, _BLOCK_BYTES // (4 * len(groups)))
    draws = []
    for start in range(0, resamples, block):
        drawn = min(block, resamples - start)
        times = rng.multinomial(count, np.full(count, 1 / count), size=drawn)
        draws.append(statistic(times[:, groups].astype(np.float32) * part))
    return value, np.concatenate(draws)


def intervals(value: np.ndarray, draws: np.ndarray) -> list[Interval]:
    """Percentile intervals of `bootstrap`, moved so that the median of the draws is the number.

    A resample holds some people twice, which makes numbers such as AP higher than on the whole:
    unmoved, an interval may leave out its own number. Draws in which a number is not defined do
    not count.
    """
    found = []
    for number, column in zip(value, draws.T, strict=True):
        column = column[np.isfinite(column)]
        tail = 50.0 * (1.0 - LEVEL)
        low, middle, high = np.full(3, np.nan)
        if len(column):
            low, middle, high = np.percentile(column, [tail, 50.0, 100.0 - tail])
        found.append(Interval(*map(float, (number, number + low - middle, number + high - middle))))
    return found


def measure(
    statistic: Statistic, groups: np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """M numbers with intervals; arguments as for `bootstrap`."""
    return intervals(*bootstrap(statistic, groups, resamples=resamples, seed=seed))


def mean_of(values: np.ndarray) -> Statistic:
    """Weighted means over the rows of float [N] or [N, M]; NaN entries are left out."""
    values = np.asarray(values, np.float64).reshape(len(values), -1)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return (weights @ filled) / (weights @ known.astype(np.float64))

    return statistic


def mean_of_defined(values: np.ndarray) -> np.ndarray:
    """Mean over the last axis of what is not NaN; NaN where all is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(-1) / known.sum(-1)


@dataclass(frozen=True)
class Breakdown:
    """M numbers for each value of one column.

    Attributes:
      column: its name.
      parts: value -> (rows, M intervals).
      gaps: M intervals of the number of the best value minus that of the worst; empty for a single
        value. They hold for the differences of all pairs of values at once, so that picking the
        two that are furthest apart is allowed for.
    """

    column: str
    parts: dict[str, tuple[int, list[Interval]]]
    gaps: list[Interval]

    def to_dict(self, names: list[str]) -> dict[str, Any]:
        def named(found: list[Interval]) -> dict[str, Any]:
            return {name: one.to_dict() for name, one in zip(names, found, strict=True)}

        parts = {v: {"rows": rows} | named(found) for v, (rows, found) in self.parts.items()}
        return {"parts": parts, "gap": named(self.gaps) if self.gaps else None}


def break_down(
    statistic: Statistic,
    groups: np.ndarray,
    columns: Mapping[str, np.ndarray],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Breakdown]:
    """The numbers for every value of every column, and how far apart they are.

    Args:
      statistic, groups, resamples, seed: see `bootstrap`.
      columns: name -> text [N]; rows with "" are in no part.
    """
    found = []
    for name, values in columns.items():
        parts, numbers, draws = {}, [], []
        for value in sorted(set(values.tolist()) - {""}):
            rows = values == value
            number, drawn = bootstrap(statistic, groups, resamples=resamples, seed=seed, rows=rows)
            parts[value] = int(rows.sum()), intervals(number, drawn)
            numbers.append(number)
            draws.append(drawn)
        gaps = _gaps(np.stack(numbers), np.stack(draws)) if len(parts) > 1 else []
        found.append(Breakdown(name, parts, gaps))
    return found


def _gaps(numbers: np.ndarray, draws: np.ndarray) -> list[Interval]:
    """The range of parts, and by how much the range of parts without a difference would miss 0.

    Args:
      numbers: [parts, M]; draws: [parts, resamples, M].
    """
    found = []
    for column, drawn in zip(numbers.T, np.moveaxis(draws, 2, 0), strict=True):
        known = np.isfinite(column)
        if not known.any():
            found.append(Interval(*(np.nan,) * 3))
            continue
        best, worst = np.nanargmax(column), np.nanargmin(column)
        sure = np.isfinite(drawn).any(1)  # a single person has no draws
        drawn = drawn[sure] - np.nanmedian(drawn[sure], axis=1, keepdims=True)
        drawn = drawn[:, np.isfinite(drawn).all(0)]
        gap, off = column[best] - column[worst], np.nan
        if sure[best] and sure[worst] and drawn.size:
            off = np.percentile(np.ptp(drawn, axis=0), 100 * LEVEL)
        found.append(Interval(*map(float, (gap, gap - off, gap + off))))
    return found
