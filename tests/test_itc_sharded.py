"""The loss in chunks over devices against the dense one, and against float64 numpy."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.config import MeshConfig
from flip_jax.losses import itc_sharded
from flip_jax.losses.itc import grouped_itc_loss
from flip_jax.losses.itc_sharded import sharded_itc_loss
from flip_jax.models.flip import unit_norm

E = 16
MODES = ("negative", "ignore", "positive")
NAMES = ("image", "text")


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks and a shorter last one, also at toy sizes."""
    monkeypatch.setattr(itc_sharded, "_CHUNK_LOGITS", 1)
    monkeypatch.setattr(itc_sharded, "_MIN_COLUMNS", 16)


def make_mesh(shape):
    if shape is None:
        return None
    data, fsdp = shape
    return partition.make_mesh(MeshConfig(data, fsdp), jax.devices()[: data * fsdp])


def make_case(batch, queue, groups=7, seed=0):
    """The arrays of the loss; groups are shared within the batch and with the queue."""
    rng = np.random.default_rng(seed)

    def pair(rows):
        x = rng.normal(size=(2, rows, E))
        x = (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)
        return dict(zip(NAMES, x, strict=True))

    return {
        "embeds": pair(batch),
        "twin_embeds": pair(batch),
        "queue": pair(queue) | {"group": rng.integers(-1, groups, queue).astype(np.int32)},
        "group": rng.integers(0, groups, batch).astype(np.int32),
    }


def place(case, mesh):
    """The case as the train step has it: rows over all devices, the queue on each."""
    if mesh is None:
        return case
    rows, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())
    return {
        name: jax.device_put(value, whole if name == "queue" else rows)
        for name, value in case.items()
    }


def with_gradient(loss, **options):
    """(case, temperature, alpha) -> loss, count, gradients of image, text and temperature."""

    @jax.jit
    def f(case, temperature, alpha):
        def of(embeds, temperature):
            arguments = case | {"embeds": embeds} | options
            return loss(**arguments, temperature=temperature, alpha=alpha)

        both = jax.value_and_grad(of, argnums=(0, 1), has_aux=True)
        (value, count), (grads, grad_temperature) = both(case["embeds"], temperature)
        return value, count, grads["image"], grads["text"], grad_temperature

    return f


@functools.cache
def dense(**options):
    return with_gradient(grouped_itc_loss, **options)


def assert_equal(actual, expected, temperature):
    """To float32's rounding: logits are up to 1 / temperature, and so is what they lose."""
    tolerance = 2e-6 + 6e-8 / temperature
    for name, a, b in zip(("loss", "count", *NAMES, "temperature"), actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.max(np.abs(b)), err_msg=name)


def assert_equals_dense(batch, queue, same_group, local_batch, shape, groups=7):
    mesh, case = make_mesh(shape), make_case(batch, queue, groups)
    options = {"same_group": same_group, "local_batch": local_batch}
    sharded = with_gradient(sharded_itc_loss, **options, mesh=mesh)
    placed = place(case, mesh)
    for temperature, alpha in [(0.07, 0.4), (0.07, 0.0), (0.5, 1.0), (0.001, 0.4)]:
        expected = dense(**options)(case, temperature, alpha)
        assert_equal(sharded(placed, temperature, alpha), expected, temperature)


@pytest.mark.parametrize("same_group", MODES)
@pytest.mark.parametrize("shape", [None, (8, 1), (4, 2)])
def test_equals_dense(shape, same_group, small_chunks):
    assert_equals_dense(48, 37, same_group, 48, shape)


@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (1, 8)])
def test_equals_dense_on_other_meshes(shape, small_chunks):
    assert_equals_dense(48, 37, "ignore", 48, shape)


# Of 6 rows per device: whole blocks on a device (2, 6), blocks across its edge (4) and over
# several devices (24).
@pytest.mark.parametrize("same_group", MODES)
@pytest.mark.parametrize("local_batch", [2, 4, 6, 24])
def test_local_candidates_equal_dense(local_batch, same_group, small_chunks):
    assert_equals_dense(48, 37, same_group, local_batch, (4, 2))


@pytest.mark.parametrize(
    ("local_batch", "same_group"), [(1, "negative"), (3, "ignore"), (24, "positive")]
)
def test_local_candidates_on_one_device_equal_dense(local_batch, same_group, small_chunks):
    assert_equals_dense(48, 37, same_group, local_batch, None)


@pytest.mark.parametrize(("batch", "queue"), [(8, 1), (8, 17), (24, 16), (40, 97)])
def test_odd_sizes_equal_dense(batch, queue, small_chunks):
    assert_equals_dense(batch, queue, "positive", batch, (8, 1))


def test_one_chunk_equals_dense():
    assert_equals_dense(16, 100, "positive", 16, (8, 1))


@pytest.mark.parametrize("temperature", [0.07, 0.001])
def test_all_but_the_own_pair_left_out(temperature, small_chunks):
    mesh, case = make_mesh((8, 1)), make_case(16, 37, groups=1)
    case["queue"]["group"] = np.zeros(37, np.int32)
    sharded = with_gradient(sharded_itc_loss, same_group="ignore", local_batch=16, mesh=mesh)
    loss, count, *grads = sharded(place(case, mesh), temperature, 0.4)
    assert count == 15 + 37
    np.testing.assert_allclose(loss, 0.0, atol=2e-7 / temperature)
    for grad in grads[:2]:
        np.testing.assert_allclose(grad, np.zeros((16, E)), atol=1e-8 / temperature)


@pytest.mark.parametrize(
    ("candidates", "columns"),
    [(1, 1), (1, 9), (8, 1), (8, 7), (8, 8), (37, 16), (13, 12), (40, 10)],
)
def test_chunks_hold_every_candidate_once(candidates, columns):
    def add(seen, chunk):
        assert chunk["group"].size <= columns
        return seen.at[chunk["group"]].add(chunk.get("new", True))

    source = {"group": jnp.arange(candidates)[None, None]}
    seen = itc_sharded._over_chunks(add, jnp.zeros(candidates, jnp.int32), source, columns)
    np.testing.assert_array_equal(seen, np.ones(candidates))


def oracle(case, temperature, alpha, same_group, local_batch):
    """Loss, count and gradients in float64, from the formula."""
    case = jax.tree.map(lambda x: np.asarray(x, np.float64), case)
    batch = len(case["group"])
    loss, count, grad_temperature = 0.0, 0.0, 0.0
    grads = {name: np.zeros((batch, E)) for name in NAMES}
    for start in range(0, batch, local_batch):
        rows = slice(start, start + local_batch)
        group = np.concatenate([case["group"][rows], case["queue"]["group"]])
        same = group[:local_batch, None] == group
        own = np.eye(*same.shape)
        count += np.sum(same) - local_batch
        hidden = same & (own == 0) if same_group == "ignore" else np.zeros_like(same)
        hard = own if same_group != "positive" else same / same.sum(-1, keepdims=True)
        for query, key in (NAMES, NAMES[::-1]):
            candidates = np.concatenate([case["twin_embeds"][key][rows], case["queue"][key]])

            def probabilities(queries, candidates=candidates, hidden=hidden):
                logits = np.where(hidden, -np.inf, queries @ candidates.T / temperature)
                logits -= logits.max(-1, keepdims=True)
                return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), logits

            student = case["embeds"][query][rows]
            p, logits = probabilities(student)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            soft, _ = probabilities(case["twin_embeds"][query][rows])
            target = alpha * soft + (1 - alpha) * hard
            loss -= np.sum(np.where(hidden, 0, target * np.where(hidden, 0, log_p)))
            change = (p - target) / (2 * batch * temperature)
            grads[query][rows] = change @ candidates
            grad_temperature -= np.sum(change * (student @ candidates.T)) / temperature
    return loss / (2 * batch), count / batch, *grads.values(), grad_temperature


@pytest.mark.parametrize("temperature", [0.07, 0.001])
@pytest.mark.parametrize("same_group", MODES)
def test_equals_float64(same_group, temperature, small_chunks):
    case, mesh = make_case(48, 37, seed=1), make_mesh((4, 2))
    options = {"same_group": same_group, "local_batch": 24}
    sharded = with_gradient(sharded_itc_loss, **options, mesh=mesh)
    expected = oracle(case, temperature, 0.4, **options)
    assert_equal(sharded(place(case, mesh), temperature, 0.4), expected, temperature)


def test_inside_a_larger_function(small_chunks):
    """Another loss beside it, weights before it, the mesh also around it as in the train step."""
    mesh, case = make_mesh((4, 2)), make_case(16, 37)
    weight = np.random.default_rng(2).normal(size=(E, E)).astype(np.float32)

    def total(loss, case, params):
        embeds = {n: unit_norm(case["embeds"][n] @ params["weight"]) for n in NAMES}
        twins = jax.lax.stop_gradient(embeds)
        arguments = case | {"embeds": embeds, "twin_embeds": twins}
        value, _ = loss(**arguments, temperature=params["temperature"], alpha=0.4)
        return 3 * value + jnp.sum(embeds["image"] * embeds["text"]) + params["temperature"]

    params = {"weight": weight, "temperature": np.float32(0.07)}
    options = {"same_group": "positive", "local_batch": 16}
    plain = functools.partial(total, functools.partial(grouped_itc_loss, **options))
    sharded = functools.partial(total, functools.partial(sharded_itc_loss, **options, mesh=mesh))
    expected = jax.jit(jax.value_and_grad(plain, argnums=1))(case, params)
    with use_abstract_mesh(mesh.abstract_mesh):
        actual = jax.jit(jax.value_and_grad(sharded, argnums=1))(place(case, mesh), params)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), *(actual, expected)
    )


@pytest.mark.parametrize("shape", [None, (8, 1)])
def test_no_gradient_into_twins_queue_and_alpha(shape):
    mesh, case = make_mesh(shape), make_case(16, 37)

    def loss(twins, queue, alpha):
        arguments = case | {"twin_embeds": twins, "queue": case["queue"] | queue}
        return sharded_itc_loss(
            **arguments,
            temperature=0.07,
            alpha=alpha,
            same_group="ignore",
            local_batch=16,
            mesh=mesh,
        )[0]

    queue = {name: case["queue"][name] for name in NAMES}
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(case["twin_embeds"], queue, 0.4)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def compiled(loss, batch, queue, embed, **options):
    """Value and gradient on 8 devices, compiled for arrays that are never made."""
    mesh = make_mesh((8, 1))
    rows, whole = NamedSharding(mesh, P(mesh.axis_names)), NamedSharding(mesh, P())

    def shape(*dims, dtype=jnp.float32, sharding=whole):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    embeds = {name: shape(batch, embed, sharding=rows) for name in NAMES}
    case = {
        "embeds": embeds,
        "twin_embeds": embeds,
        "queue": {name: shape(queue, embed) for name in NAMES}
        | {"group": shape(queue, dtype=jnp.int32)},
        "group": shape(batch, dtype=jnp.int32, sharding=rows),
    }
    if loss is sharded_itc_loss:
        options["mesh"] = mesh
    return with_gradient(loss, **options).lower(case, shape(), shape()).compile()


def largest_array(program):
    shapes = re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", program.as_text())
    return max(math.prod(map(int, dims.split(","))) for dims in shapes)


@pytest.mark.parametrize("same_group", MODES)
def test_nothing_of_all_rows_by_all_candidates_is_kept(same_group):
    sizes, options = (16_384, 8192, 64), {"same_group": same_group, "local_batch": 16_384}
    plain = compiled(grouped_itc_loss, *sizes, **options)
    sharded = compiled(sharded_itc_loss, *sizes, **options)
    per_device = 16_384 * (16_384 + 8192) // 8
    assert largest_array(plain) >= per_device
    assert largest_array(sharded) < per_device / 10
    used, plain_used = (p.memory_analysis().temp_size_in_bytes for p in (sharded, plain))
    assert plain_used >= 20 * used


def test_blocks_on_one_device_are_not_gathered():
    gathers = {
        local_batch: "all-gather"
        in compiled(
            sharded_itc_loss, 64, 32, E, same_group="ignore", local_batch=local_batch
        ).as_text()
        for local_batch in (4, 64)
    }
    assert gathers == {4: False, 64: True}
