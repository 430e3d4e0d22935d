"""Arrays of a pytree by name, and a digest of their content.

A name joins the keys on the way to the array: `vit/blocks/attn/query/kernel`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a tree of dicts, tuples and NamedTuples by name, in `jax.tree.leaves` order.

    A field of a NamedTuple has the field's name. A part of a plain tuple (an optimizer chain) has
    the name of its type, however the tuples are nested, and a number from the second of that type
    on: switching gradient clipping on shifts and nests the other parts, and their moments must
    still be found under the same name.
    """
    leaves = dict(_walk(tree, ()))
    if len(leaves) != len(jax.tree.leaves(tree)):
        raise TypeError("a tree of only dicts, tuples and NamedTuples of arrays is needed")
    return leaves


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The plain nested dict with these names.

    Raises:
      ValueError: a name that is also the beginning of another.
    """
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise ValueError(f"{name}: {parent} is an array")
        if isinstance(node.get(last), dict):
            raise ValueError(f"{name}: {last} is a group of arrays")
        node[last] = leaf
    return tree


def describe(leaves: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    """Shape, dtype and digest of each array, as JSON types.

    The digest, 8 hex digits over all bits, is the same for every sharding; it guards against
    damage, not against intent. With arrays over several processes all of them must call.
    """
    # One after the other: on CPU, programs that exchange data between processes and run at the same
    # time can each wait for the other's peer, for ever.
    return {
        name: {
            "shape": list(leaf.shape),
            "dtype": str(leaf.dtype),
            "digest": f"{int(_digest(leaf)):08x}",
        }
        for name, leaf in leaves.items()
    }


def mismatches(described: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How names, shapes and dtypes of `wanted` differ from what `describe` returned, as text."""
    problems = [f"missing {name}" for name in wanted if name not in described]
    problems += [f"unexpected {name}" for name in described if name not in wanted]
    for name, leaf in wanted.items():
        if name in described:
            found = f"{described[name]['dtype']}{described[name]['shape']}"
            expected = f"{leaf.dtype}{list(leaf.shape)}"
            if found != expected:
                problems.append(f"{name} is {found}, not {expected}")
    return problems


def _walk(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        children = [(key, node[key]) for key in sorted(node)]
    elif hasattr(node, "_fields"):
        children = list(zip(node._fields, node, strict=True))
    elif isinstance(node, tuple):
        children = []
        count = collections.Counter()
        for part in _spliced(node):
            kind = type(part).__name__
            count[kind] += 1
            children.append((kind if count[kind] == 1 else f"{kind}_{count[kind]}", part))
    else:
        children = []
        if node is not None:
            yield "/".join(path), node
    for key, child in children:
        yield from _walk(child, (*path, key))


def _spliced(chain: tuple) -> Iterator[Any]:
    for part in chain:
        plain = isinstance(part, tuple) and not hasattr(part, "_fields")
        yield from _spliced(part) if plain else (part,)


@jax.jit
def _digest(array: Array) -> Array:
    """uint32 scalar: sum over elements of mixed bits times an odd weight of the position.

    It is computed where the array lives, with no copy to the host, and a sum modulo 2**32 does not
    depend on how the array is cut. Any change of one element of up to 32 bits changes it, as the
    mixing is one-to-one and the weight odd; a change of several goes unseen about once in 2**32.
    """
    unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
    if array.dtype == jnp.bool_:
        array = array.astype(unsigned)
    bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        index = jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
        position = position * jnp.uint32(size) + index
    weight = position * jnp.uint32(0x9E3779B1)
    weight = (weight ^ (weight >> 15)) * jnp.uint32(0x85EBCA77) | 1
    return jnp.sum((bits ^ (bits >> 16)) * weight, dtype=jnp.uint32)
