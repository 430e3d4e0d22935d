"""Rows of a batch that is cut over a mesh, picked by number: only the wanted rows travel.

Left to itself, XLA brings the whole array to every device before it picks. Here every device works
out, from all the numbers wanted, which rows each pair of devices has to exchange, and
`jax.lax.all_to_all` moves a few rows of every pair at a time, in as many rounds as the busiest pair
needs. A row goes once to a device that wants it, however often. So the result is exact and memory
bounded whatever is asked for; at worst, when all wishes of a device go to one other, about as much
moves as in an all-gather. (`jax.lax.ragged_all_to_all` would leave out the empty places, but
jax 0.10.2 with libtpu 0.0.51 has it neither on CPU nor on v5e slices of more than 16 chips.)

Dims: N devices with b rows each, B = N * b; C rows that a pair exchanges in one of T rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flip_jax.models.layers import add_rows, take_rows

Array = jax.Array


def fetch_rows(x: Array, index: Array, mesh: Mesh | None = None) -> Array:
    """x[index], with the rows of x, index and result cut over all devices of `mesh`.

    The gradient goes back the same way. It is summed in float32 whatever the dtype of x: a sum of
    bfloat16 ones stops at 256, and a row may be wanted that often.

    Args:
      x: float [B, ...]; the number of devices divides B.
      index: int32 [B], each 0..B-1, in any order and any number of times.
      mesh: None = one device.
    """
    if mesh is None or mesh.size == 1:
        return take_rows(x, index)
    return _fetch(x, index, mesh)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _fetch(x: Array, index: Array, mesh: Mesh) -> Array:
    return _on_mesh(_pull, mesh)(x, index)


def _fetch_forward(x: Array, index: Array, mesh: Mesh) -> tuple[Array, Array]:
    return _fetch(x, index, mesh), index


def _fetch_backward(mesh: Mesh, index: Array, grad: Array) -> tuple[Array, None]:
    return _on_mesh(_push, mesh)(grad, index), None


_fetch.defvjp(_fetch_forward, _fetch_backward)


def _on_mesh(f: Callable[..., Array], mesh: Mesh) -> Callable[..., Array]:
    rows = P(mesh.axis_names)
    return jax.shard_map(partial(f, axes=mesh.axis_names), mesh=mesh, in_specs=rows, out_specs=rows)


def _pull(x: Array, index: Array, *, axes: tuple[str, ...]) -> Array:
    """On one device: its rows x [b, ...] and its wishes [b] -> the rows it wished for."""
    plan = make_plan(jax.lax.all_gather(index, axes), jax.lax.axis_index(axes))

    def one_round(number: Array, received: Array) -> Array:
        sent = x.at[plan.rows[number]].get(mode="clip")
        came = jax.lax.all_to_all(sent, axes, 0, 0)
        return received.at[plan.places[number]].set(came, mode="drop")

    received = jax.lax.fori_loop(0, plan.rounds, one_round, jnp.zeros_like(x))
    return received[plan.place_of_wish]


def _push(grad: Array, index: Array, *, axes: tuple[str, ...]) -> Array:
    """The transpose of `_pull`: every row's gradient goes to its owner, who adds them up."""
    plan = make_plan(jax.lax.all_gather(index, axes), jax.lax.axis_index(axes))
    grad = add_rows(grad, plan.place_of_wish, len(grad))

    def one_round(number: Array, total: Array) -> Array:
        sent = grad.at[plan.places[number]].get(mode="clip")
        came = jax.lax.all_to_all(sent, axes, 0, 0).astype(total.dtype)
        return total.at[plan.rows[number]].add(came, mode="drop")

    total = jnp.zeros_like(grad, jnp.float32)
    return jax.lax.fori_loop(0, plan.rounds, one_round, total).astype(grad.dtype)


class Plan(NamedTuple):
    """What one device sends and receives.

    rows: int32 [T, N, C], the own rows that device n wants; b = none.
    places: int32 [T, N, C], where the rows of device n stand among all those received; b = none.
    rounds: int32, the rounds in which any device of the mesh sends anything.
    place_of_wish: int32 [b], where each wished row stands among those received.
    """

    rows: Array
    places: Array
    rounds: Array
    place_of_wish: Array


def make_plan(wanted: Array, device: Array | int) -> Plan:
    """The plan of one device; `wanted` int32 [N, b] are the rows 0..B-1 that each device wants."""
    devices, rows = wanted.shape
    # A quarter of an even share: little is sent empty, and rounds stay few.
    capacity = -(-rows // (4 * devices))
    steps = -(-rows // capacity)

    # The rows that a device receives are those it wants, each once, in rising order, so that those
    # of one owner stand together.
    unique = partial(jnp.unique, size=rows, fill_value=devices * rows, return_inverse=True)
    received, place_of_wish = jax.vmap(unique)(wanted)
    owned = jnp.arange(devices + 1) * rows
    start = jnp.sum(received[:, None, :] < owned[:, None], axis=-1)  # [receiver, owner]
    count = jnp.diff(start, axis=1)

    nth = jnp.arange(steps * capacity)
    wanted_here = jnp.take_along_axis(received, start[:, device, None] + nth, axis=1, mode="clip")
    own_rows = jnp.where(nth < count[:, device, None], wanted_here - device * rows, rows)
    places = jnp.where(nth < count[device, :, None], start[device, :-1, None] + nth, rows)

    def by_round(a: Array) -> Array:
        return a.reshape(devices, steps, capacity).swapaxes(0, 1)

    rounds = -(-jnp.max(count) // capacity)
    return Plan(by_round(own_rows), by_round(places), rounds, place_of_wish[device])
