"""The sigmoid loss round the ring of devices against the dense one, and against float64 numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.config import MeshConfig
from flip_jax.losses import sigmoid
from flip_jax.losses.sigmoid import sharded_sigmoid_loss, sigmoid_loss

E = 16
MODES = ("negative", "ignore", "positive")
NAMES = ("loss", "count", "image", "text", "temperature", "bias")


def make_mesh(shape):
    if shape is None:
        return None
    data, fsdp = shape
    return partition.make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


def make_case(batch, seed=0):
    """Embeddings of which the pairs are alike, and groups of several pairs."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(batch, E))
    text = image + rng.normal(size=(batch, E))
    embeds = {
        name: (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
        for name, x in (("image", image), ("text", text))
    }
    return embeds, rng.integers(0, batch // 3 + 1, batch).astype(np.int32)


def with_gradient(loss, **options):
    """(embeds, group, temperature, bias) -> loss, count and the gradients, as in NAMES."""

    @jax.jit
    def f(embeds, group, temperature, bias):
        def of(embeds, temperature, bias):
            return loss(embeds, group, temperature, bias, **options)

        both = jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True)
        (value, count), (grads, *scalars) = both(embeds, temperature, bias)
        return value, count, grads["image"], grads["text"], *scalars

    return f


def assert_equal(actual, expected):
    for name, a, b in zip(NAMES, actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.max(np.abs(b)), err_msg=name)


def oracle(embeds, group, temperature, bias, same_group):
    """The formula in float64, with its derivative by hand."""
    image, text = (np.asarray(embeds[name], np.float64) for name in ("image", "text"))
    rows = len(group)
    own = np.eye(rows, dtype=bool)
    same = group[:, None] == group
    label = np.where(same if same_group == "positive" else own, 1.0, -1.0)
    used = own | ~same if same_group == "ignore" else np.ones_like(own)
    logits = image @ text.T / temperature + bias
    loss = np.sum(np.where(used, np.logaddexp(0.0, -label * logits), 0.0)) / rows
    slopes = np.where(used, -label / (1.0 + np.exp(label * logits)), 0.0) / rows
    by_temperature = -np.sum(slopes * (image @ text.T)) / temperature**2
    grads = slopes @ text / temperature, slopes.T @ image / temperature
    return loss, np.sum(same & ~own) / rows, *grads, by_temperature, np.sum(slopes)


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks on each device, the last one filled up."""
    monkeypatch.setattr(sigmoid, "_CHUNK_LOGITS", 24)


@pytest.mark.parametrize("same_group", MODES)
@pytest.mark.parametrize(("temperature", "bias"), [(0.1, -10.0), (0.02, 3.0)])
def test_dense_equals_float64(same_group, temperature, bias):
    case = make_case(40)
    actual = with_gradient(sigmoid_loss, same_group=same_group)(*case, temperature, bias)
    assert_equal(actual, oracle(*case, temperature, bias, same_group))


@pytest.mark.parametrize("same_group", MODES)
@pytest.mark.parametrize("shape", [None, (1, 1), (2, 1), (8, 1), (4, 2), (1, 8)])
def test_ring_equals_dense(shape, same_group, small_chunks):
    mesh, (embeds, group) = make_mesh(shape), make_case(40, seed=1)
    expected = with_gradient(sigmoid_loss, same_group=same_group)(embeds, group, 0.1, -3.0)
    if mesh is not None:
        rows = NamedSharding(mesh, P(mesh.axis_names))
        embeds, group = jax.device_put((embeds, group), rows)
    ring = with_gradient(sharded_sigmoid_loss, same_group=same_group, mesh=mesh)
    assert_equal(ring(embeds, group, 0.1, -3.0), expected)


def test_the_gradient_is_scaled_as_any_other():
    embeds, group = make_case(24, seed=2)

    def total(loss, embeds):
        value, count = loss(embeds, group, 0.1, -10.0, "negative")
        return 3.0 * value + count + jnp.sum(embeds["image"] ** 2)

    ring = functools.partial(sharded_sigmoid_loss, mesh=None)
    expected, actual = (
        jax.grad(functools.partial(total, loss))(embeds)
        for loss in (sigmoid_loss, lambda *a: ring(*a))
    )
    for name, grad in expected.items():
        np.testing.assert_allclose(actual[name], grad, rtol=0, atol=1e-6, err_msg=name)


def test_memory_does_not_grow_with_the_square_of_the_batch():
    """8 devices, 16,384 pairs: all logits of a device are 128 MiB, a chunk of them 16 MiB."""
    mesh, batch = make_mesh((8, 1)), 16_384
    rows = NamedSharding(mesh, P(mesh.axis_names))
    shapes = {n: jax.ShapeDtypeStruct((batch, E), jnp.float32, sharding=rows) for n in NAMES[2:4]}
    group = jax.ShapeDtypeStruct((batch,), jnp.int32, sharding=rows)
    ring = with_gradient(sharded_sigmoid_loss, same_group="negative", mesh=mesh)
    memory = ring.lower(shapes, group, 0.1, -10.0).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100 * 2**20
