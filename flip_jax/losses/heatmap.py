"""Landmarks as heatmaps: targets, the points that heatmaps stand for, and the loss.

Source: FaRL's face alignment (farl/network/geometry.py, farl/experiments/face_alignment/task.py).
Departures: a target Gaussian is not cut off at its radius, where it is exp(-8), so that its mean is
the point; points are read off the same map that is compared with the target; points of which
nothing is known count nowhere; weights are a softmax of log-sigmoids, the same numbers without a
guard against a sum of zero.

Dims: B pictures of S x S pixels, P points, heatmaps of G x G cells, channels last. Points are
(x, y) in pixels of the picture; whole coordinates are centres of pixels, and of cells.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

Array = jax.Array

RADIUS = 5.0  # of a target on a map of 128 cells; a Gaussian's radius is four standard deviations
_RADIUS_CELLS = 128
# Standard deviation, cells: sampled more coarsely, the mean of a Gaussian leaves its centre (by
# 0.02 cells at 0.5, by 3e-8 at 1).
_LEAST_SIGMA = 1.0


def target_sigma(cells: int) -> float:
    """Standard deviation of the target on a map of `cells` cells, in cells."""
    return max(RADIUS / 4 * cells / _RADIUS_CELLS, _LEAST_SIGMA)


def empty_logit(cells: int) -> float:
    """The logit whose sigmoid is the mean of a target.

    Where a head starts there, its first steps do not go into emptying the maps.
    """
    mean = 2 * math.pi * target_sigma(cells) ** 2 / cells**2
    return math.log(mean / (1 - mean)) if mean < 0.5 else 0.0


def target_heatmaps(points: Array, image_size: int, cells: int) -> Array:
    """A Gaussian of height 1 around each point.

    Args:
      points: float32 [B, P, 2].

    Returns:
      float32 [B, G, G, P]
    """
    centre = (points + 0.5) * (cells / image_size) - 0.5
    distance = jnp.arange(cells, dtype=jnp.float32)[:, None, None] - centre.swapaxes(1, 2)[:, None]
    side = jnp.exp(-0.5 * jnp.square(distance / target_sigma(cells)))  # [B, G, 2, P]
    return side[:, :, None, 1] * side[:, None, :, 0]


def soft_argmax(logits: Array, image_size: int) -> Array:
    """The points that heatmaps stand for: the mean place, weighted by the sigmoid.

    Args:
      logits: float [B, G, G, P].

    Returns:
      float32 [B, P, 2]
    """
    rows, cells, _, points = logits.shape
    flat = jax.nn.log_sigmoid(logits.astype(jnp.float32)).reshape(rows, -1, points)
    weights = jax.nn.softmax(flat, axis=1).reshape(logits.shape)
    place = (jnp.arange(cells) + 0.5) * (image_size / cells) - 0.5
    across, down = weights.sum(1), weights.sum(2)
    return jnp.stack([jnp.einsum("bgp,g->bp", side, place) for side in (across, down)], axis=-1)


def landmark_loss(
    logits: Array, points: Array, known: Array, image_size: int
) -> tuple[Array, dict[str, Array]]:
    """Distance of the points plus cross-entropy of the heatmaps, both with weight 1.

    Args:
      logits: float [B, G, G, P].
      points: float32 [B, P, 2]; known: bool [B, P]; what is not known may be anything.

    Returns:
      The loss, and its parts `points`, the mean distance in sides of the picture, and `heatmap`,
      the mean over cells and points. Means are over the known points; 0 where there is none.
    """
    logits = logits.astype(jnp.float32)
    points = jnp.where(known[..., None], points, 0.0)
    count = jnp.maximum(jnp.sum(known), 1)
    step = jnp.where(known[..., None], soft_argmax(logits, image_size) - points, 0.0) / image_size
    distance = jnp.sum(_length(step)) / count
    target = target_heatmaps(points, image_size, logits.shape[1])
    entropy = jnp.mean(jax.nn.softplus(logits) - logits * target, axis=(1, 2))
    entropy = jnp.sum(jnp.where(known, entropy, 0.0)) / count
    return distance + entropy, {"points": distance, "heatmap": entropy}


def _length(step: Array) -> Array:
    """Euclidean norm over the last axis, with gradient 0 at 0."""
    square = jnp.sum(jnp.square(step), axis=-1)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
