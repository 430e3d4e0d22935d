"""Complete or absent, exact on any mesh, and never silently wrong."""

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flip_jax import checkpoint, step_folder
from flip_jax.checkpoint import Checkpointer, CheckpointError, load_params, read_meta
from flip_jax.config import CheckpointConfig

META = {
    "config": {
        "model": {"embed_dim": 4, "dtype": "bfloat16", "text": {"vocab_size": 50}},
        "loss": {"queue_size": 16, "alpha": 0.4},
        "optim": {"lr": 1e-3},
    },
    "vocab_hash": "aa11",
    "data_hash": "dd22",
}
MANUAL = CheckpointConfig(every_steps=None, every_minutes=None)


def make_mesh(data: int, fsdp: int) -> Mesh:
    grid = np.asarray(jax.devices()[: data * fsdp]).reshape(data, fsdp)
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def shardings(state, mesh: Mesh):
    def sharding(leaf):
        cut = leaf.ndim > 1 and leaf.shape[-1] % mesh.shape["fsdp"] == 0
        axes = (None,) * (leaf.ndim - 1) + ("fsdp",) if cut else ()
        return NamedSharding(mesh, PartitionSpec(*axes))

    return jax.tree.map(sharding, state)


def make_state(step: int, mesh: Mesh, tx=None, width: int = 8):
    """A train state of random numbers that depend on `step`."""
    rng = np.random.default_rng(step)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    params = {
        "vit": {"blocks": {"mlp": {"up": {"kernel": draw(2, width, 16), "bias": draw(2, 16)}}}},
        "text_proj": {"kernel": draw(width, 4)},
        "temperature": jnp.float32(0.07),
    }
    tx = optax.adamw(lambda count: 1e-3) if tx is None else tx
    _, opt_state = tx.update(params, tx.init(params), params)
    queue = {"image": draw(16, 4), "group": jnp.arange(16), "pointer": jnp.int32(step % 16)}
    state = {
        "step": jnp.int32(step),
        "params": params,
        "opt_state": opt_state,
        "momentum": {"vit": jax.tree.map(lambda leaf: leaf + 1, params["vit"])},
        "queue": queue,
    }
    return jax.device_put(state, shardings(state, mesh))


def target_of(state, mesh: Mesh):
    def abstract(leaf, sharding):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(abstract, state, shardings(state, mesh))


def assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save_steps(workdir: Path, steps, cfg: CheckpointConfig = MANUAL, recalls=None):
    mesh = make_mesh(4, 2)
    with Checkpointer(workdir, cfg, META) as saver:
        for step in steps:
            metrics = {"mean_recall": recalls[step]} if recalls and step in recalls else None
            assert saver.save(step, make_state(step, mesh), metrics=metrics)


def steps_on_disk(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    names = [path.parent.name for path in folder.glob("*/commit_success.txt")]
    return sorted(int(name) for name in names if name.isdecimal())


def run_python(code: str, *args: str, **options) -> subprocess.Popen:
    code = "import sys\n" + textwrap.dedent(code)
    here = Path(__file__).parent
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *args], env=env, text=True, stdout=subprocess.PIPE, **options
    )


# What is restored


@pytest.mark.parametrize("saved, restored", [((4, 2), (1, 1)), ((4, 2), (2, 4)), ((1, 1), (4, 2))])
def test_restore_on_another_mesh_is_exact(tmp_path, saved, restored):
    state = make_state(7, make_mesh(*saved))
    target = target_of(state, make_mesh(*restored))
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        assert saver.latest_step() is None
        saver.save(7, state)
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        assert saver.latest_step() == 7
        found = saver.restore(target)
    assert_same(found, state)
    for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)


@pytest.mark.parametrize("mesh_shape", [(1, 1), (4, 2)])
def test_donating_the_saved_buffers_does_not_reach_the_files(tmp_path, mesh_shape):
    mesh = make_mesh(*mesh_shape)
    state = make_state(1, mesh)
    big = jax.device_put(jnp.zeros((64, 1 << 16)), NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    state["params"]["big"] = big
    expected = jax.tree.map(np.array, state)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    overwrite = overwrite.lower(state).compile()  # so that the next line runs during the writing
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        saver.save(1, state)
        for _ in range(3):
            state = overwrite(state)
        jax.block_until_ready(state)
        found = saver.restore(target_of(expected, mesh))
    assert_same(found, expected)


def test_moments_are_found_after_switching_clipping_on(tmp_path):
    mesh = make_mesh(1, 1)
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(lambda count: 1e-3))
    old, new = make_state(3, mesh), make_state(3, mesh, clipped)
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        saver.save(3, old)
        found = saver.restore(target_of(new, mesh))
    assert jax.tree.structure(found) == jax.tree.structure(new)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(a, b)


def test_layout_is_pinned(tmp_path):
    """Any change here makes old checkpoints unreadable: raise LAYOUT_VERSION and migrate."""
    save_steps(tmp_path, [5], recalls={5: 12.5})
    folder = tmp_path / "checkpoints" / "5"
    assert checkpoint.LAYOUT_VERSION == 1
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {
        *("params", "opt_state", "momentum", "meta"),
        "metrics",  # Orbax's own, for keep_best
    }
    meta = read_meta(tmp_path)
    arrays = meta.pop("arrays")
    assert set(meta) == {
        *("step", "layout_version", "config", "vocab_hash", "data_hash", "metrics", "versions"),
        "meta_crc32",
    }
    assert (meta["step"], meta["layout_version"]) == (5, 1)
    assert meta["metrics"] == {"mean_recall": 12.5}
    params = {
        "temperature": [],
        "text_proj/kernel": [8, 4],
        "vit/blocks/mlp/up/bias": [2, 16],
        "vit/blocks/mlp/up/kernel": [2, 8, 16],
    }
    moments = {f"ScaleByAdamState/{m}/{n}": s for m in ("mu", "nu") for n, s in params.items()}
    counts = {"ScaleByAdamState/count": [], "ScaleByScheduleState/count": []}
    twins = {f"twins/{name}": params[name] for name in params if name.startswith("vit")}
    queue = {"queue/image": [16, 4], "queue/group": [16], "queue/pointer": []}
    shapes = {item: {n: a["shape"] for n, a in named.items()} for item, named in arrays.items()}
    assert shapes == {
        "params": params,
        "opt_state": moments | counts,
        "momentum": twins | queue,
    }
    assert set(arrays["params"]["text_proj/kernel"]) == {"shape", "dtype", "digest"}


# Parameters alone


def test_load_params_from_every_kind_of_path(tmp_path):
    save_steps(tmp_path, [1, 2])
    for path, step in [
        (tmp_path, 2),
        (tmp_path / "checkpoints", 2),
        (tmp_path / "checkpoints" / "1", 1),
    ]:
        found = load_params(path)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
        assert_same(found, make_state(step, make_mesh(1, 1))["params"])
        assert read_meta(path)["step"] == step
    copy = tmp_path / "released"
    shutil.copytree(tmp_path / "checkpoints" / "1", copy)
    assert_same(load_params(copy), make_state(1, make_mesh(1, 1))["params"])


def test_load_params_by_glob_and_target(tmp_path):
    save_steps(tmp_path, [1])
    expected = make_state(1, make_mesh(1, 1))["params"]
    assert_same(load_params(tmp_path, only="vit/*"), {"vit": expected["vit"]})
    target = target_of(expected, make_mesh(2, 4))
    assert_same(load_params(tmp_path, target=target), expected)
    with pytest.raises(ValueError, match=r"only='bert/\*' matches no .*temperature.*vit"):
        load_params(tmp_path, only="bert/*")
    target["extra"] = target.pop("text_proj")
    with pytest.raises(ValueError, match=r"missing extra/kernel; unexpected text_proj/kernel"):
        load_params(tmp_path, target=target)


def test_load_params_in_a_process_with_one_device(tmp_path):
    save_steps(tmp_path, [3])
    code = """
        import jax
        from flip_jax.checkpoint import load_params
        assert jax.device_count() == 1
        print(float(load_params(sys.argv[1], only="text_proj/*")["text_proj"]["kernel"].sum()))
    """
    process = run_python(code, str(tmp_path))
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    expected = make_state(3, make_mesh(1, 1))["params"]["text_proj"]["kernel"]
    np.testing.assert_allclose(float(out), np.asarray(expected).sum(), rtol=1e-6)


def test_two_processes_write_one_checkpoint(tmp_path):
    code = """
        import jax
        port, rank, workdir = sys.argv[1:]
        jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
        import test_checkpoint as t
        one = t.Mesh([[jax.local_devices()[0]]], ("data", "fsdp"))
        mesh = t.make_mesh(1, 2)
        def state_at(step):
            local = jax.tree.map(t.np.asarray, t.make_state(step, one))
            place = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i])
            return jax.tree.map(place, local, t.shardings(local, mesh))
        cfg = t.CheckpointConfig(every_steps=None, every_minutes=0)
        with t.Checkpointer(workdir, cfg, t.META) as saver:
            due = [saver.due(step) for step in (3, 20)]
            saver.save(20, state_at(20))
            state = saver.restore(t.target_of(state_at(20), mesh))
            same = [
                (a.data == b.data).all()
                for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(20)))
                for a, b in zip(x.addressable_shards, y.addressable_shards)
            ]
            print(due, int(state["step"]), all(same))
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = [run_python(code, port, rank, str(tmp_path)) for rank in "01"]
    for process in ranks:
        out, _ = process.communicate(timeout=60)
        # Step 3 is not one at which the clock is asked.
        assert out.splitlines()[-1] == "[False, True] 20 True"
        assert process.returncode == 0
    assert_same(load_params(tmp_path), make_state(20, make_mesh(1, 1))["params"])


# What is kept, and when


def test_a_falling_metric_keeps_the_best_and_the_latest(tmp_path):
    cfg = CheckpointConfig(keep_last=2, keep_best=1)
    save_steps(tmp_path, range(1, 7), cfg, recalls={2: 50.0, 4: 40.0, 6: 30.0})
    assert steps_on_disk(tmp_path) == [2, 5, 6]
    save_steps(tmp_path, [7, 8], cfg, recalls={7: 60.0, 8: float("nan")})
    assert steps_on_disk(tmp_path) == [7, 8]


def test_periodic_steps_stay(tmp_path):
    cfg = CheckpointConfig(keep_last=1, keep_best=0, keep_every_steps=3)
    save_steps(tmp_path, range(1, 8), cfg)
    assert steps_on_disk(tmp_path) == [3, 6, 7]


def test_due_by_steps_and_by_minutes(tmp_path):
    by_steps = CheckpointConfig(every_steps=2, every_minutes=None)
    with Checkpointer(tmp_path / "a", by_steps, META) as saver:
        assert [saver.due(step) for step in range(1, 5)] == [False, True, False, True]
    by_time = CheckpointConfig(every_steps=None, every_minutes=0.2 / 60)
    with Checkpointer(tmp_path / "b", by_time, META) as saver:
        assert not saver.due(1)
        time.sleep(0.2)
        assert saver.due(2)
        saver.save(2, make_state(2, make_mesh(1, 1)))
        assert not saver.due(3)


def test_a_step_is_written_once_and_must_be_the_states(tmp_path):
    state = make_state(4, make_mesh(1, 1))
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        assert saver.save(4, state)
        assert not saver.save(4, state)
        with pytest.raises(ValueError, match="save of step 5, but the state's step is 4"):
            saver.save(5, state)


def test_steps_after_an_older_restored_one_are_set_aside(tmp_path):
    mesh = make_mesh(1, 1)
    cfg = CheckpointConfig(keep_last=2, keep_best=0)
    save_steps(tmp_path, [10, 20], cfg)
    with Checkpointer(tmp_path, cfg, META) as saver:
        saver.restore(target_of(make_state(10, mesh), mesh), step=10)
        assert saver.latest_step() == 20
        saver.save(15, make_state(15, mesh))
    assert steps_on_disk(tmp_path) == [10, 15]
    (aside,) = (tmp_path / "checkpoints").glob("20.set-aside-*")
    assert (aside / "params").is_dir()


# What is refused


def changed_meta(**changes) -> dict:
    meta = json.loads(json.dumps(META))
    for name, value in changes.items():
        node = meta
        *parents, last = name.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    return meta


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vocab_hash": "bb"}, "vocab_hash is 'aa11' in the checkpoint and 'bb' now"),
        ({"config__model__embed_dim": 8}, "model.embed_dim is 4 in the checkpoint and 8 now"),
        ({"config__loss__queue_size": 32}, "loss.queue_size is 16 in the checkpoint and 32 now"),
        ({"config__model__text": {}}, "model.text.vocab_size is 50 in the checkpoint and 'absent'"),
    ],
)
def test_another_model_or_vocabulary_is_refused(tmp_path, change, message):
    save_steps(tmp_path, [1])
    mesh = make_mesh(1, 1)
    with (
        Checkpointer(tmp_path, MANUAL, changed_meta(**change)) as saver,
        pytest.raises(ValueError, match=message) as caught,
    ):
        saver.restore(target_of(make_state(1, mesh), mesh))
    assert "Choose a new workdir" in str(caught.value)


def test_a_step_without_what_is_needed_is_refused(tmp_path):
    mesh = make_mesh(1, 1)
    whole = make_state(1, mesh)
    bare = whole | {"momentum": {}, "queue": {}}
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        assert saver.save(1, bare)
    with (
        Checkpointer(tmp_path, MANUAL, META) as saver,
        pytest.raises(ValueError, match=r"has no momentum, which this run needs .*new workdir"),
    ):
        saver.restore(target_of(whole, mesh))


def test_other_settings_may_change_and_are_reported(tmp_path, caplog):
    save_steps(tmp_path, [1])
    mesh = make_mesh(1, 1)
    meta = changed_meta(config__optim__lr=2e-3, config__model__dtype="float32", data_hash="ee")
    with (
        Checkpointer(tmp_path, MANUAL, meta) as saver,
        caplog.at_level(logging.WARNING, "flip_jax.checkpoint"),
    ):
        saver.restore(target_of(make_state(1, mesh), mesh))
    assert "optim.lr is 0.001 in the checkpoint and 0.002 now" in caplog.text
    assert "model.dtype" in caplog.text
    assert "data_hash is 'dd22'" in caplog.text


def test_all_differing_leaves_are_listed(tmp_path):
    save_steps(tmp_path, [1])
    mesh = make_mesh(1, 1)
    state = make_state(1, mesh, width=6)
    state["params"]["extra"] = state["params"].pop("temperature")
    with (
        Checkpointer(tmp_path, MANUAL, META) as saver,
        pytest.raises(ValueError, match=r"params of .* does not fit") as caught,
    ):
        saver.restore(target_of(state, mesh))
    for part in (
        "missing extra",
        "unexpected temperature",
        "text_proj/kernel is float32[8, 4], not float32[6, 4]",
        "vit/blocks/mlp/up/kernel is float32[2, 8, 16], not float32[2, 6, 16]",
    ):
        assert part in str(caught.value)


def test_another_layout_version_is_refused(tmp_path, monkeypatch):
    save_steps(tmp_path, [1])
    monkeypatch.setattr(step_folder, "LAYOUT_VERSION", 2)
    with pytest.raises(ValueError, match=r"layout version 1, this flip_jax reads 2"):
        load_params(tmp_path)


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"checkpoint.keep_last is 0"):
        Checkpointer("unused", CheckpointConfig(keep_last=0), META)
    with pytest.raises(ValueError, match=r"lacks \['data_hash', 'vocab_hash'\]"):
        Checkpointer("unused", MANUAL, {"config": {}})
    assert not Path("unused").exists()


# Damage


def flip_byte(path: Path, position: float) -> bytes:
    content = path.read_bytes()
    changed = bytearray(content)
    changed[int(position * (len(changed) - 1))] ^= 0x10
    path.write_bytes(changed)
    return content


def test_no_flipped_byte_is_restored(tmp_path):
    """Every data file of a checkpoint, at several places: an error, or the very same state."""
    mesh = make_mesh(1, 1)
    save_steps(tmp_path, [4])
    # Large enough for files of their own; small arrays lie in the index, which has checksums.
    expected = make_state(5, mesh, width=512)
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        saver.save(5, expected)
    folder = tmp_path / "checkpoints" / "5"
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "_sharding"]
    errors = []
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        for path in files:
            for position in (0.3, 0.8) if path.parent.name == "d" else (0.5,):
                content = flip_byte(path, position)
                try:
                    assert_same(saver.restore(target_of(expected, mesh)), expected)
                except (CheckpointError, ValueError) as error:
                    errors.append(str(error))
                path.write_bytes(content)
    assert len(errors) >= 8
    named = [e for e in errors if "other content than was saved in" in e]
    assert any("params/" in error for error in named)
    assert all("other complete steps there: [4]" in e for e in errors if "damaged" in e)


def test_damage_names_step_item_leaf_and_what_is_left(tmp_path):
    mesh = make_mesh(1, 1)
    save_steps(tmp_path, [4, 5])
    path = tmp_path / "checkpoints" / "5" / "meta" / "metadata"
    meta = json.loads(path.read_text())
    meta["arrays"]["momentum"]["queue/image"]["digest"] = "00000000"
    del meta["meta_crc32"]
    meta["meta_crc32"] = step_folder.json_crc32(meta)
    path.write_text(json.dumps(meta))
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        with pytest.raises(CheckpointError) as caught:
            saver.restore(target_of(make_state(5, mesh), mesh))
        assert "checkpoints/5 is damaged: other content than was saved in " in str(caught.value)
        assert "momentum/queue/image." in str(caught.value)
        assert "away to use 4" in str(caught.value)
        assert_same(saver.restore(target_of(make_state(4, mesh), mesh), 4), make_state(4, mesh))


def test_folders_that_are_no_complete_step_are_ignored(tmp_path):
    save_steps(tmp_path, [1])
    folder = tmp_path / "checkpoints"
    (folder / "7").mkdir()
    shutil.copytree(folder / "1", folder / "8")
    (folder / "8" / "commit_success.txt").unlink()
    (folder / "9.orbax-checkpoint-tmp").mkdir()
    (folder / "notes").mkdir()
    (folder / "010").mkdir()
    mesh = make_mesh(1, 1)
    with Checkpointer(tmp_path, CheckpointConfig(keep_last=1), META) as saver:
        assert saver.latest_step() == 1
        assert saver.restore(target_of(make_state(1, mesh), mesh))["step"] == 1
        with pytest.raises(FileNotFoundError, match=r"step 8 .* \[1\], unfinished: \[7, 8\]"):
            saver.restore(target_of(make_state(1, mesh), mesh), step=8)
        saver.save(8, make_state(8, mesh))  # replaces the unfinished one
    assert steps_on_disk(tmp_path) == [8]
    assert_same(load_params(tmp_path), make_state(8, mesh)["params"])
    assert {path.name for path in folder.iterdir()} >= {"7", "9.orbax-checkpoint-tmp", "notes"}


def test_nothing_to_restore(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no complete checkpoint in .* Give a workdir"):
        load_params(tmp_path / "nowhere")


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write checkpoints to .*file/checkpoints"):
        Checkpointer(tmp_path / "file", MANUAL, META)


def test_full_disk_leaves_older_checkpoints_and_says_so(tmp_path):
    # A limit on the file size stands in for the full disk: writes fail in the same place.
    code = """
        import resource
        import test_checkpoint as t
        from flip_jax.checkpoint import Checkpointer, CheckpointError
        mesh = t.make_mesh(1, 1)
        def big(step):
            state = t.make_state(step, mesh)
            noise = t.np.random.default_rng(step).standard_normal((256, 1024))
            state["params"]["big"] = t.jnp.asarray(noise, t.jnp.float32)
            return state
        cfg = t.CheckpointConfig(keep_last=1, keep_best=0)
        saver = Checkpointer(sys.argv[1], cfg, t.META)
        saver.save(1, big(1))
        saver._wait()
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
        saver.save(2, big(2))
        try:
            saver.save(3, big(3))
        except CheckpointError as error:
            print(error)
        print("latest", saver.latest_step())
        saver.save(4, big(4))
        try:
            saver.close()
        except CheckpointError as error:
            print(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        with Checkpointer(sys.argv[1], cfg, t.META) as saver:
            print("latest", saver.latest_step())
            saver.save(5, big(5))
    """
    process = run_python(code, str(tmp_path), stderr=subprocess.DEVNULL)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    lines = out.splitlines()
    assert len(lines) == 4
    for line, step in ((lines[0], 2), (lines[2], 4)):
        assert f"checkpoint of step {step} could not be written" in line
        assert "File too large" in line
        assert "Complete steps there: [1]" in line
    assert lines[1] == lines[3] == "latest 1"
    assert steps_on_disk(tmp_path) == [5]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["5"]


def test_kill_during_save_leaves_the_previous_step(tmp_path):
    code = """
        import test_checkpoint as t
        mesh = t.make_mesh(1, 1)
        saver = t.Checkpointer(sys.argv[1], t.MANUAL, t.META)
        saver.save(1, t.make_state(1, mesh))
        saver._wait()
        state = t.make_state(2, mesh)
        noise = t.np.random.default_rng(0).random((24, 1024, 1024), t.np.float32)
        state["params"]["big"] = t.jnp.asarray(noise)
        saver.save(2, state)
        print("saving", flush=True)
        saver.close()
        print("saved", flush=True)
    """
    process = run_python(code, str(tmp_path))
    assert process.stdout.readline() == "saving\n"
    process.send_signal(signal.SIGKILL)
    assert process.stdout.read() == ""
    assert process.wait() == -signal.SIGKILL
    assert (tmp_path / "checkpoints" / "2").is_dir()
    mesh = make_mesh(4, 2)
    with Checkpointer(tmp_path, MANUAL, META) as saver:
        assert saver.latest_step() == 1
        state = make_state(1, mesh)
        assert_same(saver.restore(target_of(state, mesh)), state)
        saver.save(2, make_state(2, mesh))
    assert steps_on_disk(tmp_path) == [1, 2]
    assert_same(load_params(tmp_path), make_state(2, mesh)["params"])
