"""The head of the attribute probe: normed vectors, mixed into one, then a linear layer.

`flip`, the official one (models/fflip_celeba_recognition.py): one LayerNorm for all vectors and
free weights. `facer`, FaRL's (facer/farl/classification.py): a LayerNorm for each vector and
weights through a softmax. B rows, V vectors of D values each.

LayerNorm without its scale and bias depends on no parameter. It is applied once
(`normalize_states`), what is left of the head is `sum_v mix[v] * states[v] + shift`, and an epoch
over cached states reads them twice and no more.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array
Head = dict[str, Any]  # nested dict of float32 arrays

HEADS = ("flip", "facer")
EPSILON = 1e-5


def init_head(kind: str, vectors: int, width: int, labels: int, key: Array) -> Head:
    """Start values of the sources: torch's defaults, Xavier-uniform where `flip` says so.

    Returns:
      {"weights": [V], "norm": {"scale", "bias"}: [D] (`flip`) or [V, D] (`facer`),
      "linear": {"kernel": [D, labels], "bias": [labels]}}
    """
    shape = (width,) if kind == "flip" else (vectors, width)
    keys = jax.random.split(key, 3)

    def uniform(key: Array, shape: tuple[int, ...], bound: float) -> Array:
        return jax.random.uniform(key, shape, jnp.float32, -bound, bound)

    default = width**-0.5
    xavier = kind == "flip"
    kernel = math.sqrt(6 / (width + labels)) if xavier else default
    weights = uniform(keys[0], (vectors,), math.sqrt(6 / (vectors + 1)))
    return {
        "weights": weights if xavier else jnp.ones(vectors),
        "norm": {"scale": jnp.ones(shape), "bias": jnp.zeros(shape)},
        "linear": {
            "kernel": uniform(keys[1], (width, labels), kernel),
            "bias": uniform(keys[2], (labels,), default),
        },
    }


def normalize_states(states: Array) -> Array:
    """Each vector of float [..., D] to mean 0 and variance 1, float32: LayerNorm before its affine
    part."""
    states = states.astype(jnp.float32)
    centred = states - states.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + EPSILON)


def combine(kind: str, head: Head, states: Array) -> Array:
    """Normalised vectors [B, V, D], any float dtype -> float32 [B, D]."""
    weights = head["weights"] if kind == "flip" else jax.nn.softmax(head["weights"])
    mix = weights[:, None] * head["norm"]["scale"]
    shift = jnp.sum(weights[:, None] * head["norm"]["bias"], axis=0)
    return jnp.einsum("bvd,vd->bd", states.astype(jnp.float32), mix) + shift


def head_logits(kind: str, head: Head, states: Array) -> Array:
    """Normalised vectors [B, V, D] -> logits float32 [B, labels]."""
    combined = combine(kind, head, states)
    return combined @ head["linear"]["kernel"] + head["linear"]["bias"]


def label_loss(logits: Array, labels: Array) -> Array:
    """Binary cross-entropy, the mean over all known labels.

    Args:
      logits: float32 [B, labels]; labels: int8, 1 present, 0 absent, -1 unknown.
    """
    known = labels >= 0
    each = jax.nn.softplus(logits) - logits * (labels == 1)
    return jnp.sum(jnp.where(known, each, 0.0)) / jnp.maximum(jnp.sum(known), 1)
