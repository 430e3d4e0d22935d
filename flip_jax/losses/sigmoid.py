"""Sigmoid loss: every image-text pair of the batch is a yes-or-no question of its own.

Source: arXiv 2303.15343 (SigLIP). `sigmoid_loss` writes out all pairs and is the oracle;
`sharded_sigmoid_loss` is the same in memory that does not grow with the square of the batch: images
stay on their device, texts travel round the ring of devices with the gradient they have gathered so
far, and the backward pass only scales what the forward pass found.

Dims: B pairs in the batch, R = B / devices on one device, E joint embedding.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flip_jax.losses.itc import similarity

Array = jax.Array
SameGroup = Literal["negative", "ignore", "positive"]

# Logits of one chunk on one device: 2**22 float32 are 16 MiB.
_CHUNK_LOGITS = 2**22


def sigmoid_loss(
    embeds: dict[str, Array],
    group: Array,
    temperature: Array,
    bias: Array,
    same_group: SameGroup = "negative",
) -> tuple[Array, Array]:
    """Mean over images of the sum over all texts of -log sigmoid(label * logit).

        logits = e_image @ e_text.T / temperature + bias; label = 1 for positives, else -1

    Gradients flow into both embeddings, temperature and bias; there are no twins and no queue.

    Args:
      embeds: {"image", "text": float32 [B, E]}, unit norm.
      group: int32 [B]; equal numbers = same person or same picture.
      temperature: scalar; 1 / temperature is the t of the paper, which starts at 10.
      bias: scalar; the paper's starts at -10, as there are B - 1 negatives to each positive.
      same_group: what another pair of the row's group is: `negative`; `ignore`, left out of the
        sum; or `positive`.

    Returns:
      (loss, mean number of same-group candidates per row)
    """
    own = jnp.eye(len(group), dtype=bool)
    same = group[:, None] == group[None, :]
    logits = similarity(embeds["image"], embeds["text"]) / temperature + bias
    label, used = _labels(own, same, same_group)
    losses = jnp.where(used, -jax.nn.log_sigmoid(label * logits), 0.0)
    count = jnp.mean(jnp.sum(same & ~own, axis=1, dtype=jnp.float32))
    return jnp.mean(jnp.sum(losses, axis=1)), count


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def sharded_sigmoid_loss(
    embeds: dict[str, Array],
    group: Array,
    temperature: Array,
    bias: Array,
    same_group: SameGroup,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """`sigmoid_loss` with its value and gradient, in memory for R * (E + chunk) numbers a device.

    Args:
      embeds, group, temperature, bias, same_group: as there; rows over all devices of the mesh.
      mesh: its devices divide B; None = one device.

    Returns:
      as `sigmoid_loss`
    """
    return _forward(embeds, group, temperature, bias, same_group, mesh)[0]


def _forward(embeds, group, temperature, bias, same_group, mesh):
    axes = mesh.axis_names if mesh is not None and mesh.size > 1 else ()
    rows_loss = functools.partial(_rows_loss, same_group=same_group, axes=axes)
    if axes:
        over_rows = P(axes)
        rows_loss = jax.shard_map(
            rows_loss,
            mesh=mesh,
            in_specs=(over_rows, over_rows, P(), P()),
            out_specs=over_rows,
            # All results are rows; nothing replicated comes out that would need the check.
            check_vma=False,
        )
    sums, grads = rows_loss(embeds, group, temperature, bias)
    rows = len(group)
    grads = jax.tree.map(lambda g: g / rows, grads)
    # The logits hold e_image / temperature, so that one gradient gives the other.
    inner = jnp.sum(embeds["image"] * grads["image"])
    residuals = grads, -inner / temperature, jnp.sum(sums["bias"]) / rows
    return (jnp.sum(sums["loss"]) / rows, jnp.sum(sums["same"]) / rows), residuals


def _backward(same_group, mesh, gradients, cotangents):
    del same_group, mesh
    embeds, temperature, bias = jax.tree.map(lambda g: cotangents[0] * g, gradients)
    return embeds, None, temperature, bias


sharded_sigmoid_loss.defvjp(_forward, _backward)


def _labels(own: Array, same: Array, same_group: SameGroup) -> tuple[Array, Array]:
    """Labels 1 or -1 float32, and which pairs take part bool; of the shape of `same`."""
    positive = same if same_group == "positive" else own
    used = own | ~same if same_group == "ignore" else jnp.ones_like(same)
    return jnp.where(positive, 1.0, -1.0), used


def _rows_loss(
    embeds: dict[str, Array],
    group: Array,
    temperature: Array,
    bias: Array,
    *,
    same_group: SameGroup,
    axes: tuple[str, ...],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """What a device does: its images against all texts.

    Returns:
      {"loss", "same", "bias": [R]}: sums over texts of the losses, of same-group candidates, and of
      the losses' derivatives by logit; their gradient {"image", "text": [R, E]}
    """
    rows, width = embeds["text"].shape
    devices = lax.axis_size(axes) if axes else 1
    first = lax.axis_index(axes) * rows if axes else 0
    row = first + jnp.arange(rows)
    queries = embeds["image"] / temperature
    size = max(_CHUNK_LOGITS // rows, 1)
    chunks = -(-rows // size)
    size = -(-rows // chunks)
    padded = chunks * size

    def fill(x: Array) -> Array:
        widths = [(0, padded - rows)] + [(0, 0)] * (x.ndim - 1)
        return jnp.pad(x, widths).reshape(chunks, size, *x.shape[1:])

    def add(carry: tuple[Array, dict[str, Array]], texts: dict[str, Array]):
        grad_image, sums = carry
        own = row[:, None] == texts["row"]
        same = (group[:, None] == texts["group"]) & texts["there"]
        label, used = _labels(own, same, same_group)
        signed = label * (similarity(queries, texts["text"]) + bias)
        used &= texts["there"]
        losses = jnp.where(used, -jax.nn.log_sigmoid(signed), 0.0)
        slopes = jnp.where(used, -label * jax.nn.sigmoid(-signed), 0.0)
        sums = {
            "loss": sums["loss"] + jnp.sum(losses, axis=1),
            "same": sums["same"] + jnp.sum(same & ~own, axis=1, dtype=jnp.float32),
            "bias": sums["bias"] + jnp.sum(slopes, axis=1),
        }
        grad_image += similarity(slopes, texts["text"].T)
        grad_text = texts["grad"] + similarity(slopes.T, queries.T)
        return (grad_image, sums), texts | {"grad": grad_text}

    def hop(carry, _):
        result, travelling = carry
        result, travelling = lax.scan(add, result, travelling)
        if axes:
            ring = [(i, (i + 1) % devices) for i in range(devices)]
            travelling = lax.ppermute(travelling, axes, ring)
        return (result, travelling), None

    travelling = {
        "text": fill(embeds["text"]),
        "grad": jnp.zeros((chunks, size, width)),
        "group": fill(group),
        "row": fill(row),
        "there": fill(jnp.ones(rows, bool)),
    }
    sums = {name: jnp.zeros(rows) for name in ("loss", "same", "bias")}
    start = (jnp.zeros((rows, width)), sums), travelling
    # After as many hops as there are devices each text is at home again, with its whole gradient.
    ((grad_image, sums), travelling), _ = lax.scan(hop, start, length=devices)
    grad_text = travelling["grad"].reshape(padded, width)[:rows]
    return sums, {"image": grad_image / temperature, "text": grad_text}
