"""ITC over rows on many devices, candidates chunk by chunk; never writes out [B, B+Q].

Same loss as `itc.grouped_itc_loss`, which stays as its oracle. Rows stay on their device, one chunk
of candidates after the other passes by, and the softmax sums are kept as in arXiv 1805.02867 and
arXiv 2205.14135 (online softmax, FlashAttention): a running maximum, and sums that are rescaled
when it rises. Besides the normaliser the sums hold the softmax-weighted candidates, and with those
the gradient is known when the forward pass ends; the backward pass only scales it.

Dims: R rows in each of G blocks on one device, N candidates in a chunk, E joint embedding.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flip_jax.losses.itc import similarity

Array = jax.Array

# Logits of one chunk on one device: 2**22 float32 are 16 MiB.
_CHUNK_LOGITS = 2**22
# With many rows a chunk is no narrower than this: the sums [rows, E] are read and written once
# per chunk, which must stay small against the matrix products.
_MIN_COLUMNS = 256

# Query and key of image to text, and of text to image.
_DIRECTIONS = (("image", "text"), ("text", "image"))


class SoftmaxSums(NamedTuple):
    """What is kept of the candidates seen so far, for rows as student (0) and as teacher (1)."""

    top: Array  # [G, 2, R, 1], largest logit
    total: Array  # [G, 2, R, 1], sum of exp(logit - top)
    weighted: Array  # [G, 2, R, E], sum of exp(logit - top) * candidate
    # [G, 1, R, E], sum of the positives; None where the row's own pair is the only one.
    positive: Array | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def sharded_itc_loss(
    embeds: dict[str, Array],
    twin_embeds: dict[str, Array],
    queue: dict[str, Array],
    group: Array,
    temperature: Array,
    alpha: Array | float,
    same_group: Literal["negative", "ignore", "positive"],
    local_batch: int,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """`grouped_itc_loss` with its value and gradient, in memory for B/n * (E + chunk) numbers.

    Per direction and row, with student logits s and teacher logits t over candidates c:

        loss = logsumexp(s) - e @ target / temperature
        dloss/de = (softmax(s) @ c - target) / temperature
        target = alpha * softmax(t) @ c + (1 - alpha) * mean of the positives

    Gradients flow into the online embeddings and the temperature only.

    Args:
      embeds, twin_embeds, queue, group, temperature, alpha, same_group: see `itc.itc_loss`; rows
        over all devices of the mesh, the rest replicated.
      local_batch: see `itc.grouped_itc_loss`; divides B, and B makes the whole batch candidates.
      mesh: n devices, n divides B; None = one device.

    Returns:
      (loss, mean number of same-group candidates per row)
    """
    arguments = embeds, twin_embeds, queue, group, temperature, alpha
    return _forward(*arguments, same_group, local_batch, mesh)[0]


def _forward(embeds, twin_embeds, queue, group, temperature, alpha, same_group, local_batch, mesh):
    axes = mesh.axis_names if mesh is not None and mesh.size > 1 else ()
    rows_loss = functools.partial(
        _rows_loss, same_group=same_group, local_batch=local_batch, axes=axes
    )
    if axes:
        over_rows = P(axes)
        rows_loss = jax.shard_map(
            rows_loss,
            mesh=mesh,
            in_specs=(over_rows, over_rows, P(), over_rows, P(), P()),
            out_specs=over_rows,
            # All results are rows; nothing replicated comes out that would need the check.
            check_vma=False,
        )
    loss, grads, same = rows_loss(embeds, twin_embeds, queue, group, temperature, alpha)
    grads = jax.tree.map(lambda g: g / (2 * len(group)), grads)
    # The logits hold e / temperature, so that one gradient gives the other.
    inner = sum(jnp.sum(embeds[name] * grads[name]) for name in grads)
    return (jnp.mean(loss), jnp.mean(same)), (grads, -inner / temperature)


def _backward(same_group, local_batch, mesh, gradients, cotangents):
    del same_group, local_batch, mesh
    grads, grad_temperature = jax.tree.map(lambda g: cotangents[0] * g, gradients)
    return grads, None, None, None, grad_temperature, None


sharded_itc_loss.defvjp(_forward, _backward)


def _rows_loss(
    embeds: dict[str, Array],
    twin_embeds: dict[str, Array],
    queue: dict[str, Array],
    group: Array,
    temperature: Array,
    alpha: Array | float,
    *,
    same_group: str,
    local_batch: int,
    axes: tuple[str, ...],
) -> tuple[Array, dict[str, Array], Array]:
    """What a device does: `sharded_itc_loss` for its rows.

    Returns:
      losses [rows], mean of both directions; the gradient of each direction's losses with respect
      to its query, {"image", "text": [rows, E]}; number of same-group candidates, float32 [rows]
    """
    rows = len(group)
    # Blocks of rows that share their candidates need no gather where they lie on one device.
    apart = rows % local_batch == 0
    blocks = rows // local_batch if apart else 1

    def split(x: Array) -> Array:
        return x.reshape(blocks, 1, rows // blocks, *x.shape[1:])

    batch = jax.tree.map(split, twin_embeds | {"group": group})
    if not apart and local_batch < rows * lax.axis_size(axes):
        index = lax.axis_index(axes) * rows + jnp.arange(rows)
        batch["block"] = split(index // local_batch)
    queries = {
        name: jnp.concatenate([split(embeds[name]), batch[name]], axis=1) / temperature
        for name in embeds
    }

    def add(carry: tuple, candidates: dict[str, Array]) -> tuple:
        sums, count = carry
        same, used = _masks(batch, candidates, same_group)
        sums = {
            query: _add(sums[query], queries[query], candidates[key], used, same)
            for query, key in _DIRECTIONS
        }
        return sums, count + jnp.sum(same, axis=-1, keepdims=True, dtype=jnp.float32)

    sums = {query: _start(queries[query], batch[key], same_group) for query, key in _DIRECTIONS}
    count = jnp.full((*batch["group"].shape, 1), -1.0)  # without the own pair
    columns = max(_MIN_COLUMNS, _CHUNK_LOGITS // (2 * rows))
    carry = _over_chunks(add, (sums, count), batch, columns, () if apart else axes)
    shared = {name: queue[name][None, None] for name in ("image", "text", "group")}
    sums, count = _over_chunks(add, carry, shared, columns)

    losses, grads = [], {}
    for query, key in _DIRECTIONS:
        hard = batch[key] if same_group != "positive" else sums[query].positive / (count + 1)
        loss, grad = _finish(sums[query], queries[query], hard, alpha)
        losses.append(loss.reshape(rows))
        grads[query] = grad.reshape(rows, -1) / temperature
    return (losses[0] + losses[1]) / 2, grads, count.reshape(rows)


def _masks(
    batch: dict[str, Array], candidates: dict[str, Array], same_group: str
) -> tuple[Array, Array]:
    """Which candidates are of the row's group, bool [G, 1, R, N]; and which of all take part, bool
    that broadcasts to it."""

    def equal(name: str) -> Array:
        return batch[name][..., None] == candidates[name][..., None, :]

    used = jnp.ones((1, 1, 1, 1), bool)
    if "new" in candidates:
        used &= candidates["new"][..., None, :]
    if "block" in candidates:
        used &= equal("block")
    same = used & equal("group")
    return same, used & ~same if same_group == "ignore" else used


def _over_chunks(
    add: Callable[[tuple, dict[str, Array]], tuple],
    carry: tuple,
    source: dict[str, Array],
    columns: int,
    axes: tuple[str, ...] = (),
) -> tuple:
    """`add` all candidates to `carry`, about `columns` at a time.

    Args:
      source: arrays [G or 1, 1, N, ...], N candidates of each block of rows.
      axes: mesh axes; a chunk is then a stretch of every device's N, one of each at least.
    """
    total = source["group"].shape[2]
    devices = lax.axis_size(axes) if axes else 1
    size = -(-total // -(-total * devices // columns))
    chunks = -(-total // size)

    def chunk(carry: tuple, start: Array) -> tuple[tuple, None]:
        candidates = {n: lax.dynamic_slice_in_dim(x, start, size, 2) for n, x in source.items()}
        if axes:
            candidates = lax.all_gather(candidates, axes, axis=2, tiled=True)
        if total % size:
            # The last slice begins early, with candidates that were in the one before.
            place = jnp.minimum(start, total - size) + jnp.arange(size)
            candidates["new"] = jnp.tile(place >= start, devices)[None, None]
        return add(carry, candidates), None

    # All chunks in the loop: XLA for CPU would work out one behind it at the same time as others.
    return lax.scan(chunk, carry, size * jnp.arange(chunks))[0]


def _start(queries: Array, own: Array, same_group: str) -> SoftmaxSums:
    """The sums before any candidate.

    The own pair's logit is the first maximum, so that no chunk can be without a finite one. If
    all candidates of the row's group are left out, the own pair is counted here already.

    Args:
      queries: [G, 2, R, E], divided by the temperature; own: [G, 1, R, E].
    """
    top = jnp.sum(queries * own, axis=-1, keepdims=True)
    total, weighted = jnp.zeros_like(top), jnp.zeros_like(queries)
    if same_group == "ignore":
        total, weighted = total + 1.0, weighted + own
    positive = jnp.zeros_like(own) if same_group == "positive" else None
    return SoftmaxSums(top, total, weighted, positive)


def _add(
    sums: SoftmaxSums, queries: Array, candidates: Array, used: Array, same: Array
) -> SoftmaxSums:
    """`candidates` [G or 1, 1, N, E] join the sums.

    Args:
      used, same: see `_masks`.
    """
    logits = jnp.where(used, similarity(queries, candidates), -jnp.inf)
    top = jnp.maximum(sums.top, jnp.max(logits, axis=-1, keepdims=True))
    weights = jnp.exp(logits - top)
    shrink = jnp.exp(sums.top - top)
    total = shrink * sums.total + jnp.sum(weights, axis=-1, keepdims=True)
    weighted = shrink * sums.weighted + _mix(weights, candidates)
    positive = sums.positive
    if positive is not None:
        positive += _mix(same.astype(jnp.float32), candidates)
    return SoftmaxSums(top, total, weighted, positive)


def _finish(
    sums: SoftmaxSums, queries: Array, hard: Array, alpha: Array | float
) -> tuple[Array, Array]:
    """Losses [G, 1, R, 1], and their gradient [G, 1, R, E] with respect to the student's queries.

    Args:
      queries: [G, 2, R, E], divided by the temperature; hard: [G, 1, R, E], mean of the positives.
    """
    student, teacher = jnp.split(sums.weighted / sums.total, 2, axis=1)
    target = alpha * teacher + (1.0 - alpha) * hard
    normaliser = (sums.top + jnp.log(sums.total))[:, :1]
    loss = normaliser - jnp.sum(queries[:, :1] * target, axis=-1, keepdims=True)
    return loss, student - target


def _mix(weights: Array, candidates: Array) -> Array:
    """Weights [..., R, N] of candidates [..., N, E] -> their sums [..., R, E], float32."""
    return similarity(weights, candidates.swapaxes(-1, -2))
