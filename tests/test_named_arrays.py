"""Names of leaves do not move with the optimizer chain; digests see any change, on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flip_jax.named_arrays import describe, mismatches, named_leaves, nested

PARAMS = {"vit": {"kernel": jnp.zeros((2, 3))}, "temperature": jnp.zeros(())}


def digest(array) -> str:
    return describe({"x": array})["x"]["digest"]


def numpy_digest(array: np.ndarray) -> str:
    """The formula of `_digest` once more, in 64-bit integers."""
    words = array.view(f"uint{8 * array.itemsize}").astype(np.uint64).ravel()
    weight = np.arange(words.size, dtype=np.uint64) * 0x9E3779B1 % 2**32
    weight = (weight ^ (weight >> 15)) * 0x85EBCA77 % 2**32 | 1
    return f"{int(((words ^ (words >> 16)) * weight % 2**32).sum() % 2**32):08x}"


def test_names_follow_the_order_of_jax():
    state = optax.adamw(1e-3).init(PARAMS)
    leaves = named_leaves(state)
    assert list(leaves) == [
        "ScaleByAdamState/count",
        "ScaleByAdamState/mu/temperature",
        "ScaleByAdamState/mu/vit/kernel",
        "ScaleByAdamState/nu/temperature",
        "ScaleByAdamState/nu/vit/kernel",
    ]
    assert all(a is b for a, b in zip(leaves.values(), jax.tree.leaves(state), strict=True))


@pytest.mark.parametrize("mask", [None, {"vit": {"kernel": True}, "temperature": False}])
def test_clipping_and_decay_mask_keep_the_names_of_the_moments(mask):
    plain = optax.adamw(lambda step: 1e-3).init(PARAMS)
    adamw = optax.adamw(lambda step: 1e-3, mask=mask)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), adamw).init(PARAMS)
    assert list(named_leaves(plain)) == list(named_leaves(clipped))


def test_repeated_parts_of_a_chain_are_numbered():
    schedule = optax.scale_by_schedule(lambda step: 1.0)
    names = list(named_leaves(optax.chain(schedule, schedule).init(PARAMS)))
    assert names == ["ScaleByScheduleState/count", "ScaleByScheduleState_2/count"]


def test_nested_is_the_inverse_for_dicts():
    assert nested(named_leaves(PARAMS)) == PARAMS


def test_other_containers_are_refused():
    with pytest.raises(TypeError, match="dicts, tuples and NamedTuples"):
        named_leaves({"a": [jnp.zeros(2), jnp.ones(2)]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_digest_is_the_documented_formula(dtype):
    array = np.random.default_rng(0).integers(0, 2, (3, 5, 7)).astype(jnp.dtype(dtype))
    assert digest(jnp.asarray(array)) == digest(array) == numpy_digest(array)


def test_every_single_bit_counts():
    array = np.random.default_rng(1).standard_normal((4, 33)).astype(np.float32)
    seen = {digest(array)}
    for bit in range(32):
        for index in (0, 5, 131):
            changed = array.copy()
            changed.view(np.uint32).reshape(-1)[index] ^= np.uint32(1 << bit)
            seen.add(digest(changed))
    assert len(seen) == 1 + 32 * 3


def test_swaps_and_pairs_of_sign_flips_count():
    array = np.arange(1, 65, dtype=np.float32)
    swapped, negated = array.copy(), array.copy()
    swapped[[3, 40]] = swapped[[40, 3]]
    negated[[3, 40]] *= -1
    assert len({digest(array), digest(swapped), digest(negated)}) == 3


def test_digest_does_not_depend_on_the_mesh():
    array = np.random.default_rng(2).standard_normal((16, 24)).astype(np.float32)
    grid = np.asarray(jax.devices()[:8]).reshape(4, 2)
    mesh = Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))
    for spec in [PartitionSpec("data", "fsdp"), PartitionSpec(None, "data"), PartitionSpec()]:
        placed = jax.device_put(array, NamedSharding(mesh, spec))
        assert digest(placed) == numpy_digest(array)


def test_mismatches_name_each_difference():
    described = describe({"a": jnp.zeros(2), "b": jnp.zeros(3), "d": jnp.zeros(1)})
    wanted = {"a": jnp.zeros(2), "b": jnp.zeros(4), "c": jnp.zeros(1)}
    assert mismatches(described, wanted) == [
        "missing c",
        "unexpected d",
        "b is float32[3], not float32[4]",
    ]
    assert mismatches(describe({"a": jnp.zeros(2)}), {"a": jnp.zeros(2, jnp.bfloat16)}) == [
        "a is float32[2], not bfloat16[2]"
    ]
