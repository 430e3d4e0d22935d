"""Looks at pairs of an image and a text with the fused tower, doing no work twice.

The fused tower is the cost of re-ranking. Four things keep it low: the keys and values that
cross-attention makes of an image serve all its pairs; pairs of one image stand in groups that look
at it together, without a copy of its keys and values for each; texts are cut to a few lengths, so
that little of a call is padding; calls have one shape per length, so that few are compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition

_PAIRS_PER_IMAGE = 4  # pairs in one call of the fused text tower, per image of the block
_MULTIPLE = 2  # of tokens that texts are cut to
_MOST_LENGTHS = 16
_CALLS_PER_LENGTH = 128  # for fewer it does not pay to compile the tower once more
_CALLS_PER_BLOCK = 2  # of each length, or most of its rows would wait for longer texts
_GROUPS_PER_IMAGE = 16  # on average at least, so that less than a 16th of their rows fills up


def keys_values_everywhere(
    graphdef: nnx.GraphDef, mesh: Mesh
) -> Callable[[Any, jax.Array], tuple[jax.Array, jax.Array]]:
    """(parameters, image tokens [size, Si, D]) -> `Flip.image_keys_values`, on all devices of
    `mesh`: each makes them of all tokens, which are a few hundredths of their memory."""
    everywhere = NamedSharding(mesh, P())

    def keys_values(params: Any, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = jax.lax.with_sharding_constraint(tokens, everywhere)
        return nnx.merge(graphdef, params).image_keys_values(tokens)

    return jax.jit(keys_values, out_shardings=everywhere)


def visit_pairs(
    gallery: Any,
    texts: tuple[np.ndarray, np.ndarray],
    pairs: tuple[np.ndarray, np.ndarray],
    *,
    encode: Callable[[jax.Array], Any],
    match: Callable[..., jax.Array],
    size: int,
    mesh: Mesh,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Looks at pairs, one block of images after the other.

    Args:
      gallery: `image_batches(size)` gives the images in order.
      texts: token ids int32 [texts, S] and mask bool [texts, S], True first in every row.
      pairs: image numbers [P], ascending, and text numbers [P].
      encode: uint8 [size, S, S, 3] -> what `match` takes of these images, the same on all devices.
      match: (token ids [R, s], mask [R, s], that, int32 [G] which image of it each R / G
        consecutive texts look at) -> [R, ...], one row of each text, the same on all devices.
      size: images of a block; a multiple of the devices.

    Yields:
      (rows of `pairs`, their values), until all rows were there.
    """
    token_ids, token_mask = texts
    pair_image, pair_text = pairs
    if not len(pair_image):
        return
    own = np.maximum(token_mask.sum(axis=1), 1)[pair_text]
    groups = _groups(pair_image, own)
    image, longest = pair_image[groups[:, 0]], own[groups].max(axis=1)
    groups_per_call = size * _PAIRS_PER_IMAGE // groups.shape[1]
    calls, blocks = len(groups) // groups_per_call, len(np.unique(image // size))
    length = _cut_lengths(longest, calls, blocks, token_mask.shape[1])
    host, hosts = partition.host_slice(mesh)
    for block, batch in enumerate(gallery.image_batches(size)):
        first, last = np.searchsorted(image, [block * size, (block + 1) * size])
        if first == last:
            continue
        seen = encode(partition.to_global({"image": batch["image"]}, mesh)["image"])
        cuts = np.unique(length[first:last])
        groups_of = {int(cut): first + np.flatnonzero(length[first:last] == cut) for cut in cuts}
        for cut, chunk in _calls(groups_of, groups_per_call):
            padded = np.pad(chunk, (0, groups_per_call - len(chunk)), mode="edge")
            here = np.split(padded, hosts)[host]
            here_text = pair_text[groups[here].ravel()]
            call = {
                "token_ids": token_ids[here_text, :cut],
                "token_mask": token_mask[here_text, :cut],
                "image_index": (image[here] - block * size).astype(np.int32),
            }
            call = partition.to_global(call, mesh)
            values = match(call["token_ids"], call["token_mask"], seen, call["image_index"])
            # A row that fills up a group is the one before it.
            rows, places = np.unique(groups[chunk], return_index=True)
            yield rows, np.asarray(values)[places]
        del seen  # before the next block's are made: they may be large


def _groups(pair_image: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Pairs of one image with texts of about the same length, int64 [G, pairs], by image.

    So many pairs stand together that groups make whole calls, and few enough that the last group
    of an image, which is filled up with the last pair, matters little.

    Args:
      length: int64 [P], of the text of each pair.
    """
    counts = np.unique(pair_image, return_counts=True)[1]
    most = max(int(counts.mean()) // _GROUPS_PER_IMAGE, 1)
    together = min(1 << (most.bit_length() - 1), _PAIRS_PER_IMAGE)
    order, ends = np.lexsort((length, pair_image)), np.cumsum(counts)
    runs = zip(ends - counts, ends, strict=True)
    starts = np.concatenate([np.arange(start, end, together) for start, end in runs])
    last_of_image = np.repeat(ends - 1, -(-counts // together))
    places = starts[:, None] + np.arange(together)
    return order[np.minimum(places, last_of_image[:, None])]


def _cut_lengths(longest: np.ndarray, calls: int, blocks: int, most: int) -> np.ndarray:
    """To how many tokens the texts of each group are cut, int64 [G]: all of theirs and few more.

    Args:
      longest: int64 [G], tokens of the longest text of each group.
      calls: that all groups fill; blocks: of images that they are of; most: tokens of a text.
    """
    pays = min(calls // _CALLS_PER_LENGTH, calls // (_CALLS_PER_BLOCK * blocks), _MOST_LENGTHS)
    wanted = np.quantile(longest, np.linspace(0, 1, max(pays, 1) + 1)[1:], method="higher")
    lengths = np.unique(np.minimum(-(-wanted // _MULTIPLE) * _MULTIPLE, most))
    return lengths[np.searchsorted(lengths, longest)]


def _calls(groups_of: Mapping[int, np.ndarray], most: int) -> Iterator[tuple[int, np.ndarray]]:
    """The calls for the groups of a block: to how many tokens their texts are cut, their numbers.

    Groups that do not fill a call wait for the next longer texts: a few tokens of padding cost less
    than a call that is half empty.

    Args:
      groups_of: length, ascending -> groups whose texts are cut to it.
      most: groups of a call.
    """
    waiting, longest = np.arange(0), max(groups_of)
    for cut, groups in groups_of.items():
        groups = np.union1d(waiting, groups)
        end = len(groups) if cut == longest else len(groups) // most * most
        waiting = groups[end:]
        for start in range(0, end, most):
            yield cut, groups[start : start + most]
