"""Sorting more rows than memory holds: rows of uint64, files of a local folder.

What is alike lies side by side once it is sorted, however many rows are alike. So equal pictures,
near duplicates, groups and the order of the output are each found in one pass over sorted rows, of
which a bounded number is in memory.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

LIMIT = 2**17  # rows of one sorter in memory: 6 MiB where a row has six columns
_FAN = 64  # runs that are merged at a time, at most


class Spool:
    """Rows in a file without a name, which is gone with the process.

    Args:
      folder: on a local disk, with room for the rows.
      columns: uint64 numbers in a row.
    """

    def __init__(self, folder: Path, columns: int):
        self.columns = columns
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed when no longer used)
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, rows: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(rows, np.uint64))
        self._rows += len(rows)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns the rows from `start` to before `stop`, uint64 [N, columns]."""
        self._file.flush()
        width = 8 * self.columns
        data = os.pread(self._file.fileno(), (stop - start) * width, start * width)
        return np.frombuffer(data, np.uint64).reshape(stop - start, self.columns)

    def blocks(self, size: int = LIMIT) -> Iterator[np.ndarray]:
        for start in range(0, self._rows, size):
            yield self.read(start, min(start + size, self._rows))


class Sorter:
    """Sorts rows of uint64 by their columns, the first one first.

    Full buffers are sorted and go to a file as runs, which are merged in the end: equal rows, in
    whatever number, need no more memory than others.

    Args:
      folder: as for `Spool`; nothing is written to it while the rows fit in memory.
      columns: uint64 numbers in a row.
      limit: rows in memory.
    """

    def __init__(self, folder: Path, columns: int, limit: int = LIMIT):
        self.columns = columns
        self._folder, self._limit = folder, limit
        self._fan = max(min(_FAN, math.isqrt(limit)), 2)
        self._buffer = np.empty((limit, columns), np.uint64)
        self._filled = 0
        self._spool: Spool | None = None
        self._runs: list[tuple[int, int]] = []  # first row in the spool, and the one after the last

    def add(self, rows: np.ndarray) -> None:
        """Takes uint64 [N, columns], of any N."""
        while len(rows):
            some = rows[: self._limit - self._filled]
            self._buffer[self._filled : self._filled + len(some)] = some
            self._filled += len(some)
            rows = rows[len(some) :]
            if self._filled == self._limit:
                self._runs.append(self._write([self._take()]))

    def sorted(self) -> Iterator[np.ndarray]:
        """Yields all rows in order, in blocks of at least one; once."""
        rows = self._take()
        if not self._runs:
            if len(rows):
                yield rows
            return
        if len(rows):
            self._runs.append(self._write([rows]))
        self._buffer = self._buffer[:0]
        while len(self._runs) > self._fan:
            self._runs = [
                self._write(self._merge(self._runs[start : start + self._fan]))
                for start in range(0, len(self._runs), self._fan)
            ]
        yield from self._merge(self._runs)

    def _take(self) -> np.ndarray:
        rows = _in_order(self._buffer[: self._filled])
        self._filled = 0
        return rows

    def _write(self, blocks: Iterable[np.ndarray]) -> tuple[int, int]:
        if self._spool is None:
            self._spool = Spool(self._folder, self.columns)
        start = len(self._spool)
        for rows in blocks:
            self._spool.add(rows)
        return start, len(self._spool)

    def _merge(self, runs: list[tuple[int, int]]) -> Iterator[np.ndarray]:
        size = max(self._limit // self._fan, 1)
        heads = [np.empty((0, self._spool.columns), np.uint64) for _ in runs]
        nexts, stops = [start for start, _ in runs], [stop for _, stop in runs]
        while True:
            for run, head in enumerate(heads):
                more = min(size - len(head), stops[run] - nexts[run])
                if more > 0:
                    read = self._spool.read(nexts[run], nexts[run] + more)
                    heads[run] = np.concatenate([head, read])
                    nexts[run] += more
            # What is in the file still comes after the last row of its run that is here.
            lasts = [
                head[-1] for head, at, stop in zip(heads, nexts, stops, strict=True) if at < stop
            ]
            if not lasts:
                rows = np.concatenate(heads)
                if len(rows):
                    yield _in_order(rows)
                return
            bound = min(lasts, key=lambda row: row.tolist())
            ready = [_up_to(head, bound) for head in heads]
            yield _in_order(
                np.concatenate([head[:count] for head, count in zip(heads, ready, strict=True)])
            )
            heads = [head[count:] for head, count in zip(heads, ready, strict=True)]


def _in_order(rows: np.ndarray) -> np.ndarray:
    """Sorts by the first column, and by all columns where that does not decide: of hashes it
    nearly always does, in a fraction of the time."""
    order = np.argsort(rows[:, 0])
    key = rows[order, 0]
    alike = key[1:] == key[:-1]
    tied = np.zeros(len(rows), bool)
    tied[1:] |= alike
    tied[:-1] |= alike
    some = order[tied]
    order[tied] = some[np.lexsort(rows[some].T[::-1])]
    return rows[order]


def _up_to(rows: np.ndarray, bound: np.ndarray) -> int:
    """How many of some sorted rows are not above a row."""
    low, high = 0, len(rows)
    for column, value in enumerate(bound):
        here = rows[low:high, column]
        left, right = np.searchsorted(here, value, "left"), np.searchsorted(here, value, "right")
        low, high = low + int(left), low + int(right)
    return high


def firsts(
    blocks: Iterable[np.ndarray], keys: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Finds rows that agree in their first `keys` columns, in sorted blocks.

    Yields:
      Each block, uint64 [N, columns]; bool [N], whether no row before agrees with this one; and
      uint64 [N, columns], the first of all rows that agree with it.
    """
    last: np.ndarray | None = None
    for rows in blocks:
        new = np.ones(len(rows), bool)
        new[1:] = np.any(rows[1:, :keys] != rows[:-1, :keys], axis=1)
        if last is None:
            last = rows[0]
        else:
            new[0] = np.any(rows[0, :keys] != last[:keys])
        first = np.concatenate([last[None], rows[new]])[np.cumsum(new)]
        last = first[-1]
        yield rows, new, first
