"""Looks at pairs of an image and a text with the fused tower, doing no work twice.

The fused tower is the cost of re-ranking. Three things keep it low: the keys and values that
cross-attention makes of an image serve all its pairs in a call; texts are cut to a few lengths, so
that little of a call is padding; calls have one shape per length, so that few are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition

_PAIRS_PER_IMAGE = 8  # pairs in one call of the fused text tower, per image of the block
_MULTIPLE = 4  # of tokens that texts are cut to
_MOST_LENGTHS = 16
_CALLS_PER_LENGTH = 64  # for fewer it does not pay to compile the tower once more
_CALLS_PER_BLOCK = 2  # of each length, or most of its rows would wait for longer texts


def visit_pairs(
    gallery: Any,
    texts: tuple[np.ndarray, np.ndarray],
    pairs: tuple[np.ndarray, np.ndarray],
    *,
    encode: Callable[[jax.Array], jax.Array],
    match: Callable[..., jax.Array],
    size: int,
    mesh: Mesh,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Looks at pairs, one block of images after the other.

    Args:
      gallery: `image_batches(size)` gives the images in order.
      texts: token ids int32 [texts, S] and mask bool [texts, S], True first in every row.
      pairs: image numbers [P], ascending, and text numbers [P].
      encode: uint8 [size, S, S, 3] -> image tokens.
      match: (token ids [R, s], mask [R, s], tokens of some images, int32 [R] which of them) ->
        [R, ...], one row of each text and its image, the same on all devices.
      size: images of a block; a multiple of the devices.

    Yields:
      (rows of `pairs`, their values), until all rows were there.
    """
    token_ids, token_mask = texts
    pair_image, pair_text = pairs
    if not len(pair_image):
        return
    rows_per_call = size * _PAIRS_PER_IMAGE
    calls, blocks = len(pair_image) // rows_per_call, len(np.unique(pair_image // size))
    length = _cut_lengths(token_mask, pair_text, calls, blocks)
    windows = _windows(pair_image, length, rows_per_call, size)
    host, hosts = partition.host_slice(mesh)
    slice_tokens = jax.jit(
        jax.lax.dynamic_slice_in_dim, static_argnums=2, out_shardings=NamedSharding(mesh, P())
    )
    for block, batch in enumerate(gallery.image_batches(size)):
        first, last = np.searchsorted(pair_image, [block * size, (block + 1) * size])
        if first == last:
            continue
        tokens = encode(partition.to_global({"image": batch["image"]}, mesh)["image"])
        rows_of = {cut: first + np.flatnonzero(length[first:last] == cut) for cut in windows}
        for cut, chunk in _calls(rows_of, pair_image, rows_per_call, windows):
            window = windows[cut]
            start = min(int(pair_image[chunk[0]]) - block * size, size - window)
            padded = np.pad(chunk, (0, rows_per_call - len(chunk)), mode="edge")
            own = np.split(padded, hosts)[host]
            call = {
                "token_ids": token_ids[pair_text[own], :cut],
                "token_mask": token_mask[pair_text[own], :cut],
                "image_index": (pair_image[own] - block * size - start).astype(np.int32),
            }
            call = partition.to_global(call, mesh)
            seen = tokens if window == size else slice_tokens(tokens, start, window)
            values = match(call["token_ids"], call["token_mask"], seen, call["image_index"])
            yield chunk, np.asarray(values)[: len(chunk)]


def _cut_lengths(
    token_mask: np.ndarray, pair_text: np.ndarray, calls: int, blocks: int
) -> np.ndarray:
    """To how many tokens the text of each pair is cut, int64 [P]: all of its own and few more.

    Args:
      calls: that all pairs fill; blocks: of images that they are of.
    """
    own = np.maximum(token_mask.sum(axis=1), 1)[pair_text]
    pays = min(calls // _CALLS_PER_LENGTH, calls // (_CALLS_PER_BLOCK * blocks), _MOST_LENGTHS)
    count = max(pays, 1)
    wanted = np.quantile(own, np.linspace(0, 1, count + 1)[1:], method="higher")
    lengths = np.unique(np.minimum(-(-wanted // _MULTIPLE) * _MULTIPLE, token_mask.shape[1]))
    return lengths[np.searchsorted(lengths, own)]


def _windows(
    pair_image: np.ndarray, length: np.ndarray, rows_per_call: int, size: int
) -> dict[int, int]:
    """How many consecutive images a call looks at, by what texts are cut to, ascending: a little
    more than its rows have on average."""
    images, (lengths, pairs) = len(np.unique(pair_image)), np.unique(length, return_counts=True)
    each = -(-5 * rows_per_call * images // (4 * pairs)) + 1
    return dict(zip(lengths.tolist(), np.minimum(each, size).tolist(), strict=True))


def _calls(
    rows_of: Mapping[int, np.ndarray],
    pair_image: np.ndarray,
    most: int,
    windows: Mapping[int, int],
) -> Iterator[tuple[int, np.ndarray]]:
    """The calls for the pairs of a block: to how many tokens their texts are cut, their rows.

    Rows that do not fill a call wait for the next longer texts: a few tokens of padding cost less
    than a call that is half empty.

    Args:
      rows_of: length, ascending -> rows whose texts are cut to it.
    """
    waiting, longest = np.arange(0), max(rows_of)
    for cut, rows in rows_of.items():
        chunks = list(_chunks(np.union1d(waiting, rows), pair_image, most, windows[cut]))
        waiting = waiting[:0]
        if chunks and len(chunks[-1]) < most and cut < longest:
            waiting = chunks.pop()
        for chunk in chunks:
            yield cut, chunk


def _chunks(
    rows: np.ndarray, pair_image: np.ndarray, most: int, window: int
) -> Iterator[np.ndarray]:
    """Splits rows, by image, into runs of at most `most` rows and `window` images."""
    images, start = pair_image[rows], 0
    while start < len(rows):
        end = min(start + most, np.searchsorted(images, images[start] + window))
        yield rows[start:end]
        start = end
