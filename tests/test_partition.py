"""Sharding rules, and a step that does not depend on how many devices run it."""

import dataclasses
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from tiny_run import CFG, SIGMOID, batches

from flip_jax import main, partition
from flip_jax.config import MeshConfig
from flip_jax.optim import make_optimizer
from flip_jax.train import init_state, make_train_step


def first_moments(state):
    """AdamW's, {parameter: array}; after one step a tenth of the gradient."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(state["opt_state"]))
    named = {partition.leaf_path(path): leaf for path, leaf in leaves}
    return {name.split("/mu/")[1]: leaf for name, leaf in named.items() if "/mu/" in name}


def run(devices, fsdp, cfg=CFG, steps=3, tokenizer=None):
    """Three steps on a mesh: metrics of each, the first gradient, the final state."""
    mesh = partition.make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    # Adam's own eps of 1e-8 makes steps of full size out of gradients that are rounding noise.
    tx = make_optimizer(dataclasses.replace(cfg.optim, eps=1e-4), lambda _: 1e-3)
    shapes = jax.eval_shape(lambda: init_state(cfg, tx))
    shardings = partition.state_shardings(shapes, mesh)
    state = jax.jit(lambda: init_state(cfg, tx), out_shardings=shardings)()
    rate, alpha = (lambda _: jnp.float32(1e-3)), (lambda _: jnp.float32(0.4))
    step = make_train_step(cfg, tx, rate, alpha, mesh, lambda _: 0.4)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    metrics, gradient, tokenizer = [], None, partition.replicated(tokenizer, mesh)
    for batch in batches(steps):
        state, values = step(state, partition.to_global(batch, mesh), tokenizer)
        metrics.append(jax.device_get(values))
        gradient = gradient or first_moments(state)
    if fsdp > 1:
        kernel = (state["momentum"] or state["params"])["vit"]["blocks"]["attn"]["query"]["kernel"]
        assert kernel.addressable_shards[0].data.shape == (2, 32 // fsdp, 32)
    return metrics, gradient, jax.device_get(state)


@pytest.fixture(scope="module")
def one_device():
    return run(1, 1)


@pytest.mark.parametrize(
    ("devices", "fsdp"), [pytest.param(2, 1, marks=pytest.mark.slow), (8, 2), (8, 8)]
)
def test_same_steps_on_any_mesh(one_device, devices, fsdp):
    assert_same_steps(run(devices, fsdp), one_device)


@pytest.mark.slow
def test_same_steps_of_the_sigmoid_loss():
    meshed, alone = run(8, 2, SIGMOID), run(1, 1, SIGMOID)
    assert "loss_sigmoid" in alone[0][0] and "loss_itc" not in alone[0][0]
    assert alone[2]["params"]["logit_bias"] != SIGMOID.model.logit_bias
    assert_same_steps(meshed, alone)


def assert_same_steps(results, one_device):
    metrics, gradient, state = results
    for ours, expected in zip(metrics, one_device[0], strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(ours[name], value, rtol=2e-5, atol=1e-6, err_msg=name)
    assert len(gradient) > 30 and gradient.keys() == one_device[1].keys()
    for name, value in one_device[1].items():
        # Zero but for rounding: a key's bias adds the same number to all logits of a row.
        scale = 1e-2 if name.endswith("key/bias") else np.abs(value).max()
        np.testing.assert_allclose(gradient[name], value, rtol=0, atol=5e-6 * scale, err_msg=name)
    for part in ("params", "queue"):
        flat = jax.tree_util.tree_leaves_with_path(state[part])
        expected = jax.tree.leaves(one_device[2][part])
        for (path, ours), value in zip(flat, expected, strict=True):
            name = f"{part}/{partition.leaf_path(path)}"
            np.testing.assert_allclose(ours, value, rtol=0, atol=2e-5, err_msg=name)


def test_rules():
    spec = partition.partition_spec
    assert spec("params/vit/blocks/attn/query/kernel", (12, 768, 768), 8) == P(None, "fsdp", None)
    assert spec("momentum/bert/blocks/mlp/down/kernel", (12, 64, 32), 8) == P(None, None, "fsdp")
    assert spec("opt_state/0/mu/bert/word_embed", (50, 32), 8) == P(None, "fsdp")
    assert spec("params/vit/blocks/attn/query/kernel", (12, 12, 12), 8) == P()  # 8 does not divide
    assert spec("params/vit/post_norm/scale", (768,), 8) == P()


@pytest.mark.parametrize(("data", "fsdp"), [(3, 1), (-1, 3), (8, 2), (-1, 16)])
def test_impossible_mesh(data, fsdp):
    with pytest.raises(ValueError, match=r"8 devices .* 1, 2, 4, 8"):
        partition.make_mesh(MeshConfig(data=data, fsdp=fsdp))


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the mesh asks of a device."""

    id: int
    process_index: int
    slice_index: int = 0


def mesh_of(chips):
    # `Mesh` itself takes real devices only; the order of `make_mesh` is what counts here.
    grid = np.array(chips, dtype=object)
    return types.SimpleNamespace(devices=grid)


def test_hosts_hold_stretches_of_rows(monkeypatch):
    # Ids interleaved between hosts, as on slices where a host is a square of chips.
    chips = [Chip(i, process_index=(i // 2) % 2, slice_index=i // 8) for i in range(16)]
    monkeypatch.setattr(partition, "Mesh", lambda grid, *_, **__: mesh_of(grid))
    mesh = partition.make_mesh(MeshConfig(data=4, fsdp=4), chips[::-1])
    assert mesh.devices.shape == (4, 4)
    assert [c.slice_index for c in mesh.devices.flat] == [0] * 8 + [1] * 8
    assert [c.id for c in mesh.devices[0]] == [0, 1, 4, 5]


def test_host_slice():
    mesh = mesh_of([Chip(i, process_index=p) for i, p in enumerate([2, 2, 0, 0, 1, 1])])
    assert [partition.host_slice(mesh, p) for p in (0, 1, 2)] == [(1, 3), (2, 3), (0, 3)]
    with pytest.raises(ValueError, match="process 3 has no device"):
        partition.host_slice(mesh, 3)
    for owners in ([0, 1, 0, 1], [0, 0, 0, 1]):
        with pytest.raises(ValueError, match="not equal stretches"):
            partition.host_slice(mesh_of([Chip(i, p) for i, p in enumerate(owners)]), 0)


def test_sharding_table():
    mesh = partition.make_mesh(MeshConfig(fsdp=8))
    tx = make_optimizer(CFG.optim, lambda _: 1e-3)
    shapes = jax.eval_shape(lambda: init_state(CFG, tx))
    shardings = partition.state_shardings(shapes, mesh)
    state = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings
    )
    lines = partition.sharding_table(state).splitlines()
    (line,) = [row for row in lines if row.startswith("params/vit/blocks/attn/query/kernel ")]
    assert "float32[2, 32, 32]" in line and "'fsdp'" in line
    assert float(line.split()[-1]) == round(2 * 32 * 32 * 4 / 8 / 2**20, 2)
    total = sum(
        s.dtype.itemsize * np.prod(p.shard_shape(s.shape))
        for s, p in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    )
    assert float(lines[-1].split()[-1]) == round(total / 2**20, 2)


def test_the_command_that_prints_it(caplog):
    caplog.set_level("INFO")
    debug = str(Path(__file__).parents[1] / "configs" / "debug.py")
    assert main.main(["--config", debug, "--config.mesh.fsdp=2", "--print_sharding"]) == 0
    assert "opt_state/0/mu/bert/word_embed" in caplog.text and "MiB on each device" in caplog.text
