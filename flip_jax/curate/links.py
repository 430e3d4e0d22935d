"""Searches through all parts for what ties records together, or leaves them out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flip_jax.config import to_dict
from flip_jax.curate.config import DedupeConfig
from flip_jax.curate.dedupe import BANDS, Edges, band_first, near_pairs
from flip_jax.curate.parts import Part
from flip_jax.curate.sorter import LIMIT, Sorter, Spool, firsts
from flip_jax.curate.stages import fingerprint
from flip_jax.curate.storage import Work

FOLDER = "search"  # of the work folder; removed once the data set is done
REASONS = ("repeated id", "equal picture")
COPIES = -1  # the search that is not for near duplicates
_BANDS_AT_A_TIME = 4  # in one search, which reads all hashes once
_VERSION = 1  # of the files of a search
# Half of a SHA-256 tells a billion billion pictures apart.
_WORDS = {"pixel_hash": 2, "perceptual_hash": 4}


@dataclass(frozen=True)
class Links:
    """Files of one search.

    Attributes:
      edges: name of a file of uint64 [E, 2], nodes of one group.
      dropped: name of a file of uint64 [D, 2], rows in the order of the input and which of
        `REASONS`; None where the search drops nothing.
    """

    edges: str
    dropped: str | None


def searches(cfg: DedupeConfig) -> list[int]:
    """What `search` is to be asked for; each can be done by another worker."""
    return [COPIES, *(range(0, BANDS, _BANDS_AT_A_TIME) if cfg.near else ())]


def search(
    work: Work, parts: Sequence[Part], cfg: DedupeConfig, which: int, limit: int = LIMIT
) -> Links:
    """Does one of the `searches`, or finds it finished.

    Args:
      limit: rows of each sorter in memory.
    """
    parts = sorted(parts, key=lambda part: part.place)
    key = fingerprint(_VERSION, to_dict(cfg), which, [part.key for part in parts])
    edges, dropped = f"{FOLDER}/{key}.edges", f"{FOLDER}/{key}.dropped"
    if not work.exists(edges):  # published last
        with work.scratch() as folder:
            found = Edges(folder, limit)
            if which == COPIES:
                work.write_rows(dropped, _copies(work, parts, cfg, found, folder, limit))
            else:
                bands = range(which, which + _BANDS_AT_A_TIME)
                _near(work, parts, cfg, bands, found, folder, limit)
            work.write_rows(edges, found.links())
    return Links(edges, dropped if which == COPIES else None)


def _copies(
    work: Work, parts: Sequence[Part], cfg: DedupeConfig, edges: Edges, folder: Path, limit: int
) -> Iterator[np.ndarray]:
    """Yields the rows to leave out, in order: those whose id was there before, and equal pictures.

    Of records of one id the first in the order of the input stays; of equal pictures the one with
    the smallest number, which does not depend on the order of the input.
    """
    by_id = Sorter(folder, 5, limit)  # number, row, hash, hash, node
    for start, (number, hashes, node) in _columns(work, parts, "number", "pixel_hash", "node"):
        row = np.arange(start, start + len(number), dtype=np.uint64)
        by_id.add(np.column_stack([number, row, hashes, node]))
    by_picture = Sorter(folder, 5, limit)  # hash, hash, number, row, node
    dropped = Sorter(folder, 2, limit)
    for rows, new, _ in firsts(by_id.sorted(), 1):
        dropped.add(_with_reason(rows[~new, 1], "repeated id"))
        by_picture.add(rows[new][:, [2, 3, 0, 1, 4]])
    for rows, new, first in firsts(by_picture.sorted(), 2):
        edges.add(np.stack([rows[~new, 4], first[~new, 4]], axis=1))
        if cfg.exact:
            dropped.add(_with_reason(rows[~new, 3], "equal picture"))
    return dropped.sorted()


def _near(
    work: Work,
    parts: Sequence[Part],
    cfg: DedupeConfig,
    bands: Sequence[int],
    edges: Edges,
    folder: Path,
    limit: int,
) -> None:
    """Near duplicates that agree in one of some bands of their perceptual hashes."""
    hashes = Spool(folder, 5)
    for _, columns in _columns(work, parts, "perceptual_hash", "node"):
        hashes.add(np.column_stack(columns))
    for band in bands:
        by_band = Sorter(folder, 5, limit)
        for rows in hashes.blocks(limit):
            by_band.add(band_first(rows, band))
        blocks = by_band.sorted()
        for pairs in near_pairs(blocks, cfg.max_distance, folder, band == 0, limit):
            edges.add(pairs)


def _columns(
    work: Work, parts: Sequence[Part], *names: str
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """Yields for each part the number of its first row among all, and columns: uint64 [N] of
    numbers, uint64 [N, words] of hashes."""
    start = 0
    for part in parts:
        table = work.table(part.table, list(names)).slice(0, part.records)
        found = []
        for name in names:
            if name in _WORDS:
                data = b"".join(table[name].to_pylist())
                words = np.frombuffer(data, "<u8").reshape(part.records, 4)
                found.append(words[:, : _WORDS[name]])
            else:
                found.append(table[name].to_numpy())
        yield start, found
        start += part.records


def _with_reason(rows: np.ndarray, reason: str) -> np.ndarray:
    return np.stack([rows, np.full(len(rows), REASONS.index(reason), np.uint64)], axis=1)
