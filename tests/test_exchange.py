"""Rows fetched over a mesh: the routes in numpy, values and gradients on 8 devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_jax.config import MeshConfig
from flip_jax.losses.exchange import fetch_rows, make_plan
from flip_jax.partition import batch_sharding, make_mesh

plans = jax.jit(jax.vmap(make_plan, (None, 0)))


def carry_out(wanted, plan):
    """Move row numbers as the plans of all devices say; returns what arrives, and rows sent."""
    devices, rows = wanted.shape
    arrived = np.full((devices, rows), -1)
    sent = 0
    for number in range(len(plan.rows[0])):
        for owner in range(devices):
            for receiver in range(devices):
                out = plan.rows[owner, number, receiver]
                places = plan.places[receiver, number, owner]
                used = out < rows
                # Both ends agree on what is in the buffer, and nothing is written twice.
                np.testing.assert_array_equal(used, places < rows)
                assert not used.any() or number < plan.rounds[owner]
                assert np.all(arrived[receiver, places[used]] == -1)
                arrived[receiver, places[used]] = owner * rows + out[used]
                sent += used.sum()
    return arrived, sent


def check_routes(wanted):
    plan = jax.device_get(plans(jnp.asarray(wanted, jnp.int32), jnp.arange(len(wanted))))
    arrived, sent = carry_out(wanted, plan)
    met = np.take_along_axis(arrived, plan.place_of_wish, axis=1)
    np.testing.assert_array_equal(met, wanted)
    # Nothing travels but what is wanted, once for every device that wants it.
    assert sent == sum(len(np.unique(wishes)) for wishes in wanted)
    assert len(set(plan.rounds)) == 1  # else some devices would wait for ever
    return plan


WISHES = {
    "random": lambda rng, n, b: rng.integers(0, n * b, (n, b)),
    "permutation": lambda rng, n, b: rng.permutation(n * b).reshape(n, b),
    "own": lambda rng, n, b: np.arange(n * b).reshape(n, b),
    "neighbour's": lambda rng, n, b: np.roll(np.arange(n * b).reshape(n, b)[:, ::-1], 1, axis=0),
    "one device's": lambda rng, n, b: np.tile(rng.permutation(b) + (n - 1) * b, (n, 1)),
    "few": lambda rng, n, b: rng.choice([0, n * b // 2, n * b - 1], (n, b)),
    "the last": lambda rng, n, b: np.full((n, b), n * b - 1),
}


@pytest.mark.parametrize(("devices", "rows"), [(2, 37), (4, 6), (8, 1), (8, 5)])
@pytest.mark.parametrize("kind", WISHES)
def test_routes(kind, devices, rows):
    rng = np.random.default_rng(devices + rows)
    plan = check_routes(WISHES[kind](rng, devices, rows))
    steps, _, capacity = plan.rows.shape[1:]
    if kind in ("neighbour's", "one device's"):
        assert plan.rounds[0] == steps and steps * capacity < rows + capacity
    elif kind == "the last":
        assert plan.rounds[0] == 1


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 4 * 6 - 1), min_size=24, max_size=24))
def test_routes_of_any_wishes(wanted):
    check_routes(np.reshape(wanted, (4, 6)))


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 1), (8, 1), (8, 2), (8, 8)])
def test_values_and_gradients(devices, fsdp):
    mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(2, 40, 3, 2)).astype(np.float32)

    @jax.jit
    def value_and_gradient(x, index, weight):
        rows, back = jax.vjp(lambda x: fetch_rows(x, index, mesh), x)
        return rows, back(weight)[0]

    for wishes in WISHES.values():
        index = wishes(rng, 8, 5).ravel().astype(np.int32)
        arguments = jax.device_put((x, index, weight), batch_sharding(mesh))
        rows, gradient = value_and_gradient(*arguments)
        np.testing.assert_array_equal(rows, x[index])
        expected = np.zeros(x.shape)
        np.add.at(expected, index, weight.astype(np.float64))
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=3e-6)
        assert rows.sharding == gradient.sharding == batch_sharding(mesh)


@pytest.mark.parametrize("devices", [1, 8])
def test_gradient_of_a_row_wanted_very_often(devices):
    """600 ones; a sum of bfloat16 ones would stop at 256."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:devices])
    x, index = jnp.ones((600, 2), jnp.bfloat16), jnp.full(600, 7, jnp.int32)
    arguments = jax.device_put((x, index), batch_sharding(mesh))
    gradient = jax.jit(jax.grad(lambda x, i: jnp.sum(fetch_rows(x, i, mesh).astype(jnp.float32))))
    ours = np.asarray(gradient(*arguments))
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_array_equal(ours, np.where(np.arange(600)[:, None] == 7, [600, 600], 0))


def test_only_small_buffers_travel():
    """One all-to-all each way, of a quarter of an even share per pair, and the numbers wanted."""
    mesh = make_mesh(MeshConfig(fsdp=2))
    x = jax.ShapeDtypeStruct((64 * 8, 7), jnp.float32, sharding=batch_sharding(mesh))
    index = jax.ShapeDtypeStruct((64 * 8,), jnp.int32, sharding=batch_sharding(mesh))

    def both_ways(x, index):
        rows, back = jax.vjp(lambda x: fetch_rows(x, index, mesh), x)
        return back(rows)

    text = jax.jit(both_ways).lower(x, index).compile().as_text()
    found = re.findall(r"= \(?(\w+)\[([\d,]+)\].*? (all-\w+(?:-\w+)?|collective-permute)\(", text)
    assert set(found) == {("s32", "8,64", "all-gather"), ("f32", "1,2,7", "all-to-all")}
