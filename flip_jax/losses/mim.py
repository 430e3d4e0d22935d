"""Masked image modelling (MIM): which patches to hide, and how well they were guessed.

Dims: B pictures, a grid of G x G patches, N = G * G, M of them hidden.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

# Rectangles that are drawn, of which the first ones hide as many patches as are asked for. Of
# 20,000 draws of 78 patches of 14 x 14, 999 in a thousand needed five or fewer.
_RECTANGLES = 16
_LEAST_PATCHES = 16  # of a rectangle, if they are to be hidden at all
_LEAST_ASPECT = 0.3  # height / width, or the inverse


def hidden_patches(
    key: Array, rows: int, grid: int, count: int, masking: Literal["block", "random"]
) -> Array:
    """Draws which patches to hide: exactly `count` of every picture, so shapes are static.

    `block` follows BEiT (arXiv 2106.08254, algorithm 1): rectangles of random area, shape and
    place, one after the other, until enough is hidden. Of the last one that is needed some patches
    are taken, as it falls; what no rectangle covers is hidden only if all together are too small.
    Rectangles lie inside the picture, so its middle is hidden more often than its corners (of 78 in
    14 x 14 patches three times in four, and once in twenty).

    Args:
      key: PRNG key; rows: B; grid: G; count: M, 1..N.

    Returns:
      int32 [B, M], ascending.
    """
    noise_key, key = jax.random.split(key)
    order = jax.random.uniform(noise_key, (rows, grid * grid))
    if masking == "block":
        order += _first_rectangle(key, rows, grid, count).astype(jnp.float32)
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


def pixel_targets(patches: Array, hidden: Array) -> Array:
    """Hidden patches with mean 0 and variance 1 each, float32 [B, M, P*P*3].

    Args:
      patches: float32 [B, N, P*P*3], see `VisionTransformer.patches`; hidden: int32 [B, M].

    Source: arXiv 2111.06377 (MAE), section 4.1, normalised pixels.
    """
    shown = jnp.take_along_axis(patches.astype(jnp.float32), hidden[:, :, None], axis=1)
    mean = jnp.mean(shown, axis=-1, keepdims=True)
    variance = jnp.var(shown, axis=-1, keepdims=True, ddof=1)
    return (shown - mean) * jax.lax.rsqrt(variance + 1e-6)


def mim_loss(predicted: Array, targets: Array) -> Array:
    """Mean squared error over hidden patches; both float32 [B, M, P*P*3]. Guessing 0 gives 1."""
    return jnp.mean(jnp.square(predicted - jax.lax.stop_gradient(targets)))
