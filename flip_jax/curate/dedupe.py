"""Finding near duplicates and what they join, in as much memory as is allowed for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from flip_jax.curate.pictures import HASH_SIDE
from flip_jax.curate.sorter import LIMIT, Sorter, Spool, firsts

BANDS = HASH_SIDE  # of 16 bits each
_WORDS = 4  # of a perceptual hash
_REST = np.uint64(48)  # bits of a word below the band


def band_first(rows: np.ndarray, band: int) -> np.ndarray:
    """Puts the 16 bits of a band before all others, so that sorting brings its equals together.
    How many bits two hashes differ in stays the same.

    Args:
      rows: uint64 [N, 5], a perceptual hash and a node.
      band: 0 to `BANDS` - 1.
    """
    word, place = divmod(band, BANDS // _WORDS)
    turn = np.uint64(16 * (BANDS // _WORDS - 1 - place))
    order = [word, *(other for other in range(_WORDS + 1) if other != word)]
    turned = rows[:, order]
    if turn:
        turned[:, 0] = turned[:, 0] << turn | turned[:, 0] >> np.uint64(64) - turn
    return turned


def near_pairs(
    blocks: Iterable[np.ndarray],
    max_distance: int,
    folder: Path,
    equals: bool = True,
    limit: int = LIMIT,
) -> Iterator[np.ndarray]:
    """Finds pairs of perceptual hashes that agree in a band and differ in few bits.

    Two hashes that differ in 15 bits or fewer agree in at least one of the 16 bands; of those
    that differ in 20, all but one in some thousand do.

    Args:
      blocks: uint64 [N, 5], sorted: rows of `band_first`.
      max_distance: bits.
      folder: for what does not fit in memory, when more than `limit` hashes agree in the band.
      equals: whether to pair equal hashes too, each with the first of them; it is enough to do so
        in one band.

    Yields:
      uint64 [P, 2]: nodes.
    """
    held = np.empty((0, _WORDS + 1), np.uint64)
    earlier = Spool(folder, _WORDS + 1)  # of the band of `held`, where that is too large
    for rows, new, first in firsts(blocks, _WORDS):
        if equals:
            yield np.stack([rows[~new, -1], first[~new, -1]], axis=1)
        held = np.concatenate([held, rows[new]])
        if not len(held):
            continue
        bands = held[:, 0] >> _REST
        start = int(np.searchsorted(bands, bands[-1]))  # more of this band may follow
        if start:
            yield from _pairs(held[:start], earlier, max_distance)
            held = held[start:]
        if len(earlier) and earlier.read(0, 1)[0, 0] >> _REST != bands[-1]:
            earlier = Spool(folder, _WORDS + 1)
        if len(held) >= limit:
            yield from _pairs(held, earlier, max_distance)
            earlier.add(held)
            held = held[:0]
    yield from _pairs(held, earlier, max_distance)


def _pairs(rows: np.ndarray, earlier: Spool, max_distance: int) -> Iterator[np.ndarray]:
    """Pairs among sorted rows, and of the first band of these with the spooled rows of it."""
    words, nodes, bands = rows[:, :_WORDS], rows[:, -1], rows[:, 0] >> _REST
    # Each hash against the one `step` places further on, as long as that is in the same band.
    left, step = np.arange(len(rows)), 1
    while len(left):
        left = left[left + step < len(rows)]
        left = left[bands[left] == bands[left + step]]
        near = left[_distance(words[left], words[left + step]) <= max_distance]
        if len(near):
            yield np.stack([nodes[near], nodes[near + step]], axis=1)
        step += 1
    for block in earlier.blocks() if len(rows) else ():
        same = bands == block[0, 0] >> _REST
        for row in block:
            near = nodes[same][_distance(words[same], row[:_WORDS]) <= max_distance]
            if len(near):
                yield np.stack([near, np.full(len(near), row[-1])], axis=1)


def _distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.bitwise_count(first ^ second).sum(axis=1, dtype=np.int64)


def components(edges: np.ndarray) -> np.ndarray:
    """Joins what is linked, in memory.

    Args:
      edges: uint64 [E, 2], nodes.

    Returns:
      uint64 [M, 2]: the nodes that have an edge, ascending, and the smallest of the nodes that
      each is joined to, itself included.
    """
    nodes, ends = np.unique(edges, return_inverse=True)
    left, right = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), bool), (left, right)), (len(nodes), len(nodes)))
    _, label = connected_components(graph, directed=False)
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return np.stack([nodes, nodes[first][inverse]], axis=1)


class Edges:
    """Links between nodes, of any number, and what they join.

    Many pairs among few nodes, such as the copies of one picture, are made few at once: what is
    kept are links of each node to the smallest that it is joined to so far.

    Args:
      folder: on a local disk, for what does not fit in memory.
      limit: links in memory.
    """

    def __init__(self, folder: Path, limit: int = LIMIT):
        self._folder, self._limit = folder, limit
        self._some: list[np.ndarray] = []
        self._count = 0
        self._spilled: Sorter | None = None  # larger node, smaller node

    def add(self, pairs: np.ndarray) -> None:
        """Takes uint64 [P, 2]; a node may be paired with itself."""
        for start in range(0, len(pairs), self._limit):
            some = pairs[start : start + self._limit]
            self._some.append(some[some[:, 0] != some[:, 1]])
            self._count += len(self._some[-1])
            if self._count > self._limit:
                self._reduce()

    def _reduce(self) -> None:
        stars = _links(components(np.concatenate(self._some)))
        self._some, self._count = [stars], len(stars)
        if self._count > self._limit // 2:
            if self._spilled is None:
                self._spilled = Sorter(self._folder, 2, self._limit)
            self._spilled.add(stars)
            self._some, self._count = [], 0

    def links(self) -> Iterator[np.ndarray]:
        """Yields uint64 [P, 2], links that join the same nodes; once."""
        some = np.concatenate([np.empty((0, 2), np.uint64), *self._some])
        yield _links(components(some))
        if self._spilled is not None:
            yield from self._spilled.sorted()

    def components(self) -> Iterator[np.ndarray]:
        """Yields what `components` returns for all links, in blocks, ascending but for the
        smallest nodes, which come again with each block; once.

        Where memory does not hold the links, by steps that each bring nodes closer to the
        smallest of their component: large-star and small-star of Kiveris et al., "Connected
        Components in MapReduce and Beyond", 2014, with sorting in the place of their shuffle.
        """
        if self._spilled is None:
            yield components(np.concatenate([np.empty((0, 2), np.uint64), *self._some]))
            return
        links, changed = self.links(), True
        while changed:
            links, changed = self._closer(links)
        for rows, new, _ in firsts(links, 2):
            smallest = np.unique(rows[new, 1])
            yield np.concatenate([np.stack([smallest] * 2, axis=1), rows[new]])

    def _closer(self, links: Iterable[np.ndarray]) -> tuple[Iterator[np.ndarray], bool]:
        """One large-star and one small-star: links of larger to smaller nodes, sorted, and whether
        any of them is another than before."""
        changed = False
        both = Sorter(self._folder, 2, self._limit)
        for rows in links:
            both.add(rows)
            both.add(rows[:, ::-1])
        large = Sorter(self._folder, 2, self._limit)
        for rows, _, first in firsts(_distinct(both), 1):
            # Every larger neighbour to the smallest of all neighbours and the node itself.
            smallest = np.minimum(rows[:, 0], first[:, 1])
            larger = rows[:, 1] > rows[:, 0]
            large.add(np.stack([rows[larger, 1], smallest[larger]], axis=1))
            changed |= bool(np.any(smallest[larger] != rows[larger, 0]))
        small = Sorter(self._folder, 2, self._limit)
        for rows, new, first in firsts(_distinct(large), 1):
            # The node and every smaller neighbour to the smallest of them.
            small.add(rows[new])
            small.add(np.stack([rows[~new, 1], first[~new, 1]], axis=1))
            changed |= not new.all()
        return small.sorted(), changed


def _links(found: np.ndarray) -> np.ndarray:
    """Without the links of the smallest nodes to themselves."""
    return found[found[:, 0] != found[:, 1]]


def _distinct(sorter: Sorter) -> Iterator[np.ndarray]:
    for rows, new, _ in firsts(sorter.sorted(), sorter.columns):
        if new.any():
            yield rows[new]
