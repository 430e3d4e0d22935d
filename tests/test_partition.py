"""Sharding rules, and a step that does not depend on how many devices run it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.config import Config, LossConfig, MeshConfig, ModelConfig, TextConfig, VisionConfig
from flip_jax.optim import make_optimizer
from flip_jax.train import init_state, make_train_step

TINY = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=32, depth=2, heads=4, mlp_width=64),
    text=TextConfig(
        vocab_size=50, max_length=8, positions=8, width=32, depth=2, heads=4, mlp_width=64
    ),
    embed_dim=16,
    dtype="float32",
)
CFG = Config(
    model=TINY,
    loss=LossConfig(queue_size=32, local_batch=8, same_group="ignore"),
    data=dataclasses.replace(Config().data, batch_size=16),
)


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        length = rng.integers(3, 9, size=(16, 1))
        yield {
            "image": rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8),
            "token_ids": rng.integers(0, 48, (16, 8)).astype(np.int32),
            "token_mask": np.arange(8)[None] < length,
            "group": rng.integers(0, 12, 16).astype(np.int32),
        }


def run(devices, fsdp, steps=3):
    """Three steps on a mesh: metrics of each and the final parameters."""
    mesh = partition.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    tx = make_optimizer(CFG.optim, lambda _: 1e-3)
    shapes = jax.eval_shape(lambda: init_state(CFG, tx))
    shardings = partition.state_shardings(shapes, mesh)
    state = jax.jit(lambda: init_state(CFG, tx), out_shardings=shardings)()
    step = make_train_step(CFG, tx, lambda _: jnp.float32(1e-3), lambda _: jnp.float32(0.4))
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    metrics = []
    for batch in batches(steps):
        state, values = step(state, partition.to_global(batch, mesh))
        metrics.append(jax.device_get(values))
    if fsdp > 1:
        kernel = state["momentum"]["vit"]["blocks"]["attn"]["query"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 32 // fsdp, 32)
    return metrics, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return run(1, 1)


@pytest.mark.parametrize(("devices", "fsdp"), [(2, 1), (8, 1), (8, 2), (8, 8)])
def test_same_steps_on_any_mesh(one_device, devices, fsdp):
    metrics, state = run(devices, fsdp)
    for ours, expected in zip(metrics, one_device[0], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    flat = jax.tree_util.tree_leaves_with_path(state["params"])
    expected = jax.tree.leaves(one_device[1]["params"])
    for (path, ours), value in zip(flat, expected, strict=True):
        name = partition.leaf_path(path)
        if name.endswith("key/bias"):
            continue  # its gradient is exactly zero, so Adam steps along rounding noise
        np.testing.assert_allclose(ours, value, rtol=0, atol=2e-5, err_msg=name)
    for name, value in one_device[1]["queue"].items():
        np.testing.assert_allclose(state["queue"][name], value, rtol=0, atol=2e-5, err_msg=name)


def test_rules():
    spec = partition.partition_spec
    assert spec("params/vit/blocks/attn/query/kernel", (12, 768, 768), 8) == P(None, "fsdp", None)
    assert spec("momentum/bert/blocks/mlp/down/kernel", (12, 64, 32), 8) == P(None, None, "fsdp")
    assert spec("opt_state/0/mu/bert/word_embed", (50, 32), 8) == P(None, "fsdp")
    assert spec("params/vit/blocks/attn/query/kernel", (12, 12, 12), 8) == P()  # 8 does not divide
    assert spec("params/vit/post_norm/scale", (768,), 8) == P()


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (8, 2), (-1, 16)])
def test_impossible_mesh(data, fsdp):
    with pytest.raises(ValueError, match="8 devices"):
        partition.make_mesh(MeshConfig(data=data, fsdp=fsdp))
