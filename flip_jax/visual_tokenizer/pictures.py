"""Pictures of records for the tokenizer: squashed to a square, in any order, bad ones left out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from flip_jax.data.pipeline import read_record
from flip_jax.data.records import BadRecord, RecordSource


def batches(
    source: RecordSource, size: int, batch_size: int, seed: int, threads: int
) -> Iterator[np.ndarray]:
    """Endless batches uint8 [batch_size, size, size, 3]: whole epochs in random order."""
    rng = np.random.default_rng(seed)
    order = itertools.chain.from_iterable(rng.permutation(len(source)) for _ in itertools.count())
    return _batched(pictures(source, order, size, threads), batch_size)


def first_pictures(source: RecordSource, size: int, limit: int, threads: int) -> np.ndarray:
    """The first `limit` usable pictures, uint8 [N, size, size, 3].

    Raises:
      ValueError: there is none.
    """
    found = itertools.islice(pictures(source, range(len(source)), size, threads), limit)
    if not (rows := list(found)):
        raise ValueError(
            f"{source.path}, split {source.split!r}: none of {len(source)} records has a picture"
        )
    return np.stack(rows)


def pictures(
    source: RecordSource, order: Iterable[int], size: int, threads: int
) -> Iterator[np.ndarray]:
    """Usable pictures in the given order, decoded by some threads.

    Raises:
      ValueError: as many in a row as there are records cannot be used.
    """

    def load(number: int) -> np.ndarray | None:
        try:
            return read_record(source, int(number), need_caption=False, size=size)[1]
        except BadRecord:
            return None

    order, bad = iter(order), 0
    with ThreadPoolExecutor(max(threads, 1)) as pool:
        while chunk := list(itertools.islice(order, 32)):
            for picture in pool.map(load, chunk):
                bad = bad + 1 if picture is None else 0
                if bad > len(source):
                    raise ValueError(f"{source.path}, split {source.split!r}: no picture is usable")
                if picture is not None:
                    yield picture


def _batched(rows: Iterator[np.ndarray], size: int) -> Iterator[np.ndarray]:
    while True:
        yield np.stack(list(itertools.islice(rows, size)))
