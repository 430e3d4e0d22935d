"""Finding equal pictures, near duplicates and what they join; arrays in, arrays out."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from flip_jax.curate.pictures import HASH_SIDE

BANDS = HASH_SIDE  # of 16 bits each
_SLICES = 16


def copies(number: np.ndarray, pixel_hash: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds records to leave out: those whose id was there before, and equal pictures.

    Of records of one id the first in the order of the input stays; of equal pictures the one
    with the smallest number, which does not depend on the order of the input.

    Args:
      number: uint64 [N], hash of the id.
      pixel_hash: uint64 [N, words].

    Returns:
      bool [N], the id was there before; int64 [N], for each record the one that stays of its
      equals, itself if it is that one (-1 where the first array is True).
    """
    order = np.lexsort((np.arange(len(number)), number))
    again = np.zeros(len(number), bool)
    again[order[1:]] = number[order[1:]] == number[order[:-1]]
    rows = np.flatnonzero(~again)
    order = rows[np.lexsort((number[rows], *pixel_hash[rows].T))]
    new = np.ones(len(order), bool)
    new[1:] = np.any(pixel_hash[order[1:]] != pixel_hash[order[:-1]], axis=1)
    stays = np.full(len(number), -1)
    stays[order] = order[new][np.cumsum(new) - 1]
    return again, stays


def near_pairs(hashes: np.ndarray, band: int, max_distance: int) -> np.ndarray:
    """Finds pairs of perceptual hashes that agree in a band and differ in few bits.

    Two hashes that differ in 15 bits or fewer agree in at least one of the 16 bands; of those
    that differ in 20, all but one in some thousand do.

    Args:
      hashes: uint64 [N, 4].
      band: 0 to `BANDS` - 1; equal hashes are looked for in band 0 only.
      max_distance: bits.

    Returns:
      int64 [P, 2]: rows; of a run of equal hashes each is paired with the first.
    """
    keys = hashes.view(np.uint16).reshape(len(hashes), BANDS)[:, band]
    pairs = [np.zeros((0, 2), np.int64)]
    for some in range(_SLICES):  # one after the other: sorting takes several times the memory
        rows = np.flatnonzero(keys % _SLICES == some)
        pairs += (rows[each] for each in _pairs(hashes[rows], keys[rows], band == 0, max_distance))
    return np.concatenate(pairs)


def _pairs(
    words: np.ndarray, keys: np.ndarray, equals: bool, max_distance: int
) -> Iterator[np.ndarray]:
    order = np.lexsort((*words.T, keys))
    words, keys = words[order], keys[order]
    new = np.ones(len(order), bool)
    new[1:] = np.any(words[1:] != words[:-1], axis=1)
    first = np.flatnonzero(new)
    if equals:
        equal = np.flatnonzero(~new)
        yield order[np.stack([first[np.cumsum(new) - 1][equal], equal], axis=1)]
    words, keys = words[first], keys[first]
    # Each hash against the one `step` places further on, as long as that is in the same band.
    left, step = np.arange(len(keys)), 1
    while len(left):
        left = left[left + step < len(keys)]
        left = left[keys[left] == keys[left + step]]
        bits = np.bitwise_count(words[left] ^ words[left + step]).sum(axis=1, dtype=np.int64)
        near = left[bits <= max_distance]
        yield order[np.stack([first[near], first[near + step]], axis=1)]
        step += 1


def components(edges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins what is linked.

    Args:
      edges: uint64 [E, 2], nodes.

    Returns:
      uint64 [M] nodes that have an edge, ascending, and uint64 [M], the smallest of the nodes that
      each is joined to, itself included.
    """
    nodes, ends = np.unique(edges, return_inverse=True)
    left, right = ends.reshape(-1, 2).T
    graph = coo_array((np.ones(len(left), bool), (left, right)), (len(nodes), len(nodes)))
    _, label = connected_components(graph, directed=False)
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return nodes, nodes[first][inverse]
