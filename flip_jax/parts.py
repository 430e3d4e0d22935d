"""A function of rows, applied part by part: memory of one part, result of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

Array = jax.Array


def in_parts(f: Callable[..., Any], parts: int) -> Callable[..., Any]:
    """`f` over `parts` parts of its rows, one after the other; the backward pass recomputes each.

    With the losses taken on what comes out, this is gradient caching (arXiv 2101.06983): the
    gradient is that of the whole batch, while activations are kept for one part only.

    Args:
      f: (keys, *trees) -> tree; every array in and out has one row per example, and no row's
        result depends on other rows. `keys` is a tree of keys or None; each part gets its own.
      parts: divides the rows. Part p holds rows p, p + parts, ..., so that every device of a mesh
        works on its own rows in each part.
    """
    if parts == 1:
        return f

    def split(x: Array) -> Array:
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def join(x: Array) -> Array:
        return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])

    def one(arguments: tuple) -> Any:
        return jax.checkpoint(f)(*arguments)

    def mapped(keys: Any, *trees: Any) -> Any:
        keys = jax.tree.map(lambda k: jax.random.split(k, parts), keys)
        return jax.tree.map(join, jax.lax.map(one, (keys, *jax.tree.map(split, trees))))

    return mapped
