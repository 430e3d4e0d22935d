"""The order of the records: which go to which shard, and in which order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import numpy as np

from flip_jax.curate.groups import KEPT_COLUMNS, SPLITS, kept_name
from flip_jax.curate.links import FOLDER
from flip_jax.curate.parts import Part
from flip_jax.curate.sorter import LIMIT, Sorter, firsts
from flip_jax.curate.storage import RangeReader, Work

NUMBER, SPLIT, OFFSET, SIZE, NODE, GROUP = range(len(KEPT_COLUMNS))
# Columns of the rows of a shard: number, key of the part (4), offset, size, node.
SHARD_COLUMNS = 8
OFFSET_AND_SIZE = slice(5, 7)


def shard_counts(sizes: dict[str, int], shard_bytes: int) -> dict[str, int]:
    """Shards of each split, from its bytes."""
    return {split: max(-(-size // shard_bytes), 1) for split, size in sizes.items()}


def order_name(shard: str) -> str:
    """The file of the rows of a shard in their order, uint64 [N, SHARD_COLUMNS]."""
    return f"{FOLDER}/{shard}.order"


def part_key(row: np.ndarray) -> str:
    """The key of the part that a row of a shard is from."""
    return row[1:5].tobytes().hex()


def order(
    work: Work, parts: Sequence[Part], shards: dict[str, int], limit: int = LIMIT
) -> Iterator[str]:
    """Writes the rows of each shard. By the number of a record: all shards of a split are about as
    large, and the shards in order hold the records in order.

    Args:
      shards: how many, by split.
      limit: rows in memory.

    Yields:
      Names of the shards that are not empty.
    """
    keys = [np.frombuffer(bytes.fromhex(part.key), np.uint64) for part in parts]
    with work.scratch() as folder:
        rows = Sorter(folder, 6, limit)  # split, number, part, offset, size, node
        for index, part in enumerate(parts):
            for kept in work.rows(kept_name(part), len(KEPT_COLUMNS)):
                place = np.full(len(kept), index, np.uint64)
                columns = (kept[:, column] for column in (OFFSET, SIZE, NODE))
                rows.add(np.column_stack([kept[:, SPLIT], kept[:, NUMBER], place, *columns]))
        pieces = (
            (
                shard,
                np.column_stack(
                    [some[:, 1], [keys[at] for at in some[:, 2].tolist()], some[:, 3:]]
                ),
            )
            for block in rows.sorted()
            for shard, some in _by_shard(block[:, 0], block[:, 1], block, shards)
        )
        for shard, found in groupby(pieces, key=lambda each: each[0]):
            work.write_rows(order_name(shard), (some for _, some in found))
            yield shard


def carry(
    work: Work, part: Part, shards: dict[str, int]
) -> Iterator[tuple[str, tuple[np.ndarray, bytes]]]:
    """Yields for each record of a part its shard, its row in it, and its candidate, so that the
    runner's shuffle moves the records: on a far disk a shard would open every part for a record or
    two. Reads the part once, from one end to the other."""
    key = np.frombuffer(bytes.fromhex(part.key), np.uint64)
    with RangeReader() as files:
        for kept in work.rows(kept_name(part), len(KEPT_COLUMNS)):
            for shard, some in _by_shard(kept[:, SPLIT], kept[:, NUMBER], kept, shards):
                for row in some:
                    offset, size = int(row[OFFSET]), int(row[SIZE])
                    data = files.read(work.path(part.file), offset, size)
                    yield shard, (np.array([row[NUMBER], *key, *row[[OFFSET, SIZE, NODE]]]), data)


def _by_shard(
    split: np.ndarray, number: np.ndarray, rows: np.ndarray, shards: dict[str, int]
) -> Iterator[tuple[str, np.ndarray]]:
    """Cuts rows where the shard changes that their split and number say."""
    half = np.uint64(32)
    counts = np.array([shards.get(name, 1) for name in SPLITS], np.uint64)
    # The upper half of the number as a share of the whole range.
    place = ((number >> half) * counts[split.astype(np.int64)]) >> half
    cuts = np.flatnonzero((np.diff(split) != 0) | (np.diff(place) != 0)) + 1
    for start, stop in zip([0, *cuts.tolist()], [*cuts.tolist(), len(rows)], strict=True):
        if start < stop:
            yield f"{SPLITS[int(split[start])]}-{int(place[start]):05d}", rows[start:stop]


def count_groups(work: Work, parts: Sequence[Part], limit: int = LIMIT) -> dict[str, int]:
    """How many groups each split has."""
    counts = np.zeros(len(SPLITS), np.int64)
    with work.scratch() as folder:
        groups = Sorter(folder, 2, limit)
        for part in parts:
            for kept in work.rows(kept_name(part), len(KEPT_COLUMNS)):
                groups.add(kept[:, [SPLIT, GROUP]])
        for rows, new, _ in firsts(groups.sorted(), 2):
            counts += np.bincount(rows[new, 0].astype(np.int64), minlength=len(SPLITS))
    return {split: count for split, count in zip(SPLITS, counts.tolist(), strict=True) if count}
