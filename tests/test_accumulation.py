"""Accumulation is the step of the whole batch, not a mean over small ones."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CFG, batches

from flip_jax import partition
from flip_jax.config import Config, MeshConfig
from flip_jax.losses.flip import flip_loss
from flip_jax.models import flip
from flip_jax.optim import make_optimizer
from flip_jax.parts import in_parts
from flip_jax.train import init_state, make_train_step


def in_steps(cfg: Config, parts: int, dropout: float = 0.0) -> Config:
    text = dataclasses.replace(cfg.model.text, dropout=dropout)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, text=text),
        optim=dataclasses.replace(cfg.optim, accum_steps=parts),
    )


def loss_and_gradient(cfg: Config, devices: int):
    mesh = partition.make_mesh(MeshConfig(), jax.devices()[:devices]) if devices else None
    state = init_state(cfg, make_optimizer(cfg.optim, lambda _: 1e-3))
    twins = jax.tree.map(lambda x: 0.9 * x, state["momentum"])
    (batch,) = batches(1)

    def loss(params, batch):
        return flip_loss(
            params,
            twins,
            state["queue"],
            batch,
            0.4,
            jax.random.key(5),
            cfg=cfg,
            graphdef=flip.build(cfg.model),
            mesh=mesh,
        )

    batch = partition.to_global(batch, mesh) if mesh else batch
    (_, aux), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(state["params"], batch)
    return jax.device_get((aux["metrics"], gradient))


@pytest.fixture(scope="module")
def whole():
    return loss_and_gradient(in_steps(CFG, 1), 0)


@pytest.mark.parametrize(
    ("parts", "devices"), [(2, 0), pytest.param(8, 1, marks=pytest.mark.slow), (2, 8)]
)
def test_equals_one_large_batch(whole, parts, devices):
    metrics, gradient = loss_and_gradient(in_steps(CFG, parts), devices)
    for name, value in whole[0].items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
    expected = jax.tree.leaves(whole[1])
    leaves = jax.tree_util.tree_leaves_with_path(gradient)
    for (path, ours), value in zip(leaves, expected, strict=True):
        name = partition.leaf_path(path)
        # Zero but for rounding: a key's bias adds the same number to all logits of a row.
        scale = 1e-2 if name.endswith("key/bias") else np.abs(value).max()
        np.testing.assert_allclose(ours, value, rtol=0, atol=3e-6 * scale, err_msg=name)


@pytest.mark.slow
def test_every_part_has_dropout_of_its_own(whole):
    """Equal rows in one batch come out differently, and so does the loss."""
    seen = in_parts(lambda key, x: x + jax.random.uniform(key, x.shape), 4)
    values = np.asarray(seen(jax.random.key(0), jnp.zeros((8, 3))))
    assert len(np.unique(values)) == values.size
    metrics, _ = loss_and_gradient(in_steps(CFG, 4, dropout=0.5), 0)
    assert np.isfinite(metrics["loss"]) and metrics["loss"] != whole[0]["loss"]


def test_parts_keep_rows_in_place():
    x = jnp.arange(24.0).reshape(12, 2)
    for parts in (1, 2, 3, 12):
        ours = in_parts(lambda _, a, b: {"sum": a + b, "twice": 2 * a}, parts)(None, x, x[:, :1])
        np.testing.assert_array_equal(ours["sum"], x + x[:, :1])
        np.testing.assert_array_equal(ours["twice"], 2 * x)


def temporary_bytes(cfg: Config, rows: int) -> int:
    """What the compiled step of a batch of `rows` needs besides state and batch."""
    tx = make_optimizer(cfg.optim, lambda _: 1e-3)
    step = make_train_step(cfg, tx, lambda _: jnp.float32(1e-3), lambda _: jnp.float32(0.4))
    (batch,) = batches(1)
    batch = {n: jax.ShapeDtypeStruct((rows, *v.shape[1:]), v.dtype) for n, v in batch.items()}
    state = jax.eval_shape(lambda: init_state(cfg, tx))
    return jax.jit(step).lower(state, batch).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_memory_is_that_of_a_part():
    assert temporary_bytes(in_steps(CFG, 8), 64) < 0.4 * temporary_bytes(in_steps(CFG, 1), 64)
