"""`python -m flip_jax.inspect` on a checkpoint of eight devices, in a process of one."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import config
from flip_jax.checkpoint import Checkpointer
from flip_jax.config import Config
from flip_jax.inspect import main

ONE_DEVICE = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Steps 2 and 5 of a run with a few arrays, sharded over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    kernel = jax.device_put(jnp.ones((16, 8)), rows)
    assert len(kernel.sharding.device_set) == 8
    params = {
        "vit": {"kernel": kernel, "half": jnp.ones((4,), jnp.bfloat16)},
        "temperature": jnp.asarray(0.07),
    }
    meta = {"config": config.to_dict(Config()), "vocab_hash": "c0ffee", "data_hash": "beef"}
    folder = tmp_path_factory.mktemp("run")
    with Checkpointer(folder, Config().checkpoint, meta) as checkpointer:
        for step in (2, 5):
            state = {
                "step": jnp.asarray(step, jnp.int32),
                "params": params,
                "opt_state": {"count": jnp.zeros((), jnp.int32)},
                "momentum": {"vit": params["vit"]},
                "queue": {"pointer": jnp.zeros((), jnp.int32)},
            }
            checkpointer.save(step, state, metrics={"mean_recall": 12.5})
    return folder


def inspect(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "flip_jax.inspect", *map(str, args)],
        env=os.environ | ONE_DEVICE,
        capture_output=True,
        text=True,
    )


def test_everything_is_listed(workdir):
    done = inspect(workdir)
    assert done.returncode == 0, done.stderr
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    for wanted in (
        "vit/kernel float32 16x8 512 B",
        "vit/half bfloat16 4 8 B",
        "temperature float32 scalar 4 B",
        "params: 3 arrays, 133 values, 524 B",
        "total vit: 2 arrays, 132 values, 520 B",
        "total twins/vit: 2 arrays, 132 values, 520 B",
        "vocabulary bert-base-uncased, hash c0ffee",
        "data hash beef",
        "mean_recall 12.5",
        "model.vision.image_size = 224",
        "optim.lr = 3e-05",
    ):
        assert wanted in lines, wanted
    assert lines[0].startswith("step 5, layout version 1, flip_jax ")


def test_a_step_of_a_run(workdir, capsys):
    assert main([str(workdir), "--step", "2"]) == 0
    assert capsys.readouterr().out.startswith("step 2,")
    assert main([str(workdir / "checkpoints" / "2"), "--json"]) == 0
    meta = json.loads(capsys.readouterr().out)
    assert meta["step"] == 2 and meta["arrays"]["params"]["vit/kernel"]["shape"] == [16, 8]


def test_a_reader_that_stops_early(workdir):
    command = [sys.executable, "-m", "flip_jax.inspect", str(workdir)]
    with subprocess.Popen(
        command, env=os.environ | ONE_DEVICE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == 0


def test_no_checkpoint_is_one_line(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: no complete checkpoint") and error.count("\n") == 1


def test_a_broken_meta_is_named(workdir, tmp_path, capsys):
    step = tmp_path / "checkpoints" / "5"
    (step / "meta").mkdir(parents=True)
    (step / "commit_success.txt").touch()
    (step / "meta" / "metadata").write_text("{")
    assert main([str(tmp_path)]) == 1
    assert "meta cannot be read" in capsys.readouterr().err
