"""Which patches of a picture masked image modelling hides.

Dims: B pictures, a grid of G x G patches, N = G * G, M of them hidden.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

# Rectangles that are drawn, of which the first ones hide as many patches as are asked for. Of
# 20,000 draws of 78 patches of 14 x 14, 998 in a thousand needed five or fewer.
_RECTANGLES = 16
_LEAST_PATCHES = 16  # of a rectangle, if they are to be hidden at all
_LEAST_ASPECT = 0.3  # height / width, or the inverse
_REGIONS = 32  # bits of the region map


def hidden_patches(
    key: Array,
    rows: int,
    grid: int,
    count: int,
    masking: Literal["block", "random", "region", "hard"],
    *,
    regions: Array | None = None,
    difficulty: Array | None = None,
    hard_share: Array | float = 0.0,
) -> Array:
    """Draws which patches to hide: exactly `count` of every picture, so shapes are static.

    `random`: any. `block` follows BEiT (arXiv 2106.08254, algorithm 1): rectangles of random area,
    shape and place, one after the other, until enough is hidden. Of the last one that is needed
    some patches are taken, as it falls; what no rectangle covers is hidden only if all together are
    too small. Rectangles lie inside the picture, so its middle is hidden more often than its
    corners (of 78 in 14 x 14 patches three times in four, and once in twenty).
    `region`: all patches of one part of the face, drawn among those of at most `count` patches, and
    any others; a picture that has no such part is hidden by `block`.
    `hard`: of the M patches a share `hard_share`, rounded down, are the hardest ones, the others
    any (arXiv 2304.05919, section 3.4).

    Args:
      key: PRNG key; rows: B; grid: G; count: M, 1..N.
      regions: uint32 [B, N], bit r set = the patch shows part r; for `region`.
      difficulty: float32 [B, N], higher = harder; for `hard`, as is hard_share, in 0..1.

    Returns:
      int32 [B, M], ascending.
    """
    noise_key, key = jax.random.split(key)
    order = jax.random.uniform(noise_key, (rows, grid * grid))
    if masking == "block":
        order += _first_rectangle(key, rows, grid, count).astype(jnp.float32)
    if masking == "region":
        block_key, key = jax.random.split(key)
        blocks = _first_rectangle(block_key, rows, grid, count)
        order += _behind_region(key, regions, count, blocks).astype(jnp.float32)
    if masking == "hard":
        rank = jnp.argsort(jnp.argsort(-difficulty, axis=1), axis=1)
        order += rank >= jnp.floor(count * jnp.asarray(hard_share, jnp.float32) + 1e-4)
    return jnp.sort(jnp.argsort(order, axis=1)[:, :count], axis=1).astype(jnp.int32)


def _first_rectangle(key: Array, rows: int, grid: int, count: int) -> Array:
    """Number of the first rectangle that covers each patch, int [B, N]; `_RECTANGLES` if none."""
    keys = jax.random.split(key, 4)
    shape = (rows, _RECTANGLES)
    least = min(_LEAST_PATCHES, count)
    area = jax.random.uniform(keys[0], shape, minval=least, maxval=max(count, least + 1))
    limit = -jnp.log(_LEAST_ASPECT)
    aspect = jnp.exp(jax.random.uniform(keys[1], shape, minval=-limit, maxval=limit))

    def span(length: Array, key: Array) -> Array:
        """bool [B, rectangles, G]: rows or columns that a rectangle of this length covers."""
        length = jnp.clip(jnp.round(length), 1, grid)[..., None]
        start = jnp.floor(jax.random.uniform(key, shape)[..., None] * (grid - length + 1))
        place = jnp.arange(grid)
        return (place >= start) & (place < start + length)

    down, across = span(jnp.sqrt(area * aspect), keys[2]), span(jnp.sqrt(area / aspect), keys[3])
    covers = (down[..., :, None] & across[..., None, :]).reshape(rows, _RECTANGLES, -1)
    return jnp.where(covers.any(1), jnp.argmax(covers, axis=1), _RECTANGLES)


def _behind_region(key: Array, regions: Array, count: int, blocks: Array) -> Array:
    """0 at the patches of one region of each picture and 1 elsewhere; `blocks` if it has none."""
    bits = jnp.arange(_REGIONS, dtype=jnp.uint32)
    shows = (regions[:, :, None] >> bits) & 1 == 1  # [B, N, regions]
    size = jnp.sum(shows, axis=1)
    fits = (size >= 1) & (size <= count)
    chosen = jnp.argmax(jnp.where(fits, jax.random.uniform(key, fits.shape), -1.0), axis=1)
    outside = ~jnp.take_along_axis(shows, chosen[:, None, None], axis=2)[:, :, 0]
    return jnp.where(fits.any(axis=1, keepdims=True), outside, blocks)
