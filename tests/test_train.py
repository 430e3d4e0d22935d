"""The whole job: it learns, stops, resumes bit for bit, and complains well."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import CFG, SIGMOID, batches

from flip_jax import checkpoint, config, main
from flip_jax.data.sources import write_drawn
from flip_jax.metrics import NonFiniteLoss
from flip_jax.optim import make_optimizer
from flip_jax.train import init_state, make_train_step, train

ROOT = Path(__file__).parent.parent
DEBUG = str(ROOT / "configs" / "debug.py")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The debug faces, drawn once."""
    return write_drawn(config.load(DEBUG).data.drawn, tmp_path_factory.mktemp("faces") / "data")


def start(workdir, data, *extra):
    """The command of a run, as a process with one CPU device."""
    command = [sys.executable, "-m", "flip_jax.main", "--config", DEBUG]
    command += ["--workdir", str(workdir), f"--config.data.path={data}", *extra]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def wait_for_step(workdir, process, step):
    """Until the log holds `step` or more."""
    path = workdir / "metrics.jsonl"
    while process.poll() is None:
        lines = path.read_text().splitlines() if path.exists() else []
        if lines and lines[-1].endswith("}") and json.loads(lines[-1])["step"] >= step:
            return
        time.sleep(0.02)


def final_state(workdir):
    """Every array of the newest checkpoint."""
    folder = workdir / "checkpoints"
    meta = checkpoint.read_meta(folder)
    return meta["step"], meta["arrays"], checkpoint.load_params(folder)


def curve(workdir):
    """Loss lines without what the clock says."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    clock = {"pairs_per_second", "step_seconds", "data_wait_share"}
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    code, output = finish(start(workdir, data))
    assert code == 0, output
    return workdir, output


def test_a_run_leaves_everything_it_promises(unbroken):
    workdir, output = unbroken
    assert "chance" in output and "step 0, cosine" in output and "reranked" in output
    assert (workdir / "report.png").read_bytes().startswith(b"\x89PNG")
    assert list((workdir / "tensorboard").glob("events.out.*"))
    results = json.loads((workdir / "results.json").read_text())
    assert results["images"] == 24 and results["rerank_k"] == 4
    assert results["step"] == 18 and set(results["trained"]) == set(results["start"])
    rows = curve(workdir)
    assert [r["step"] for r in rows if "loss" in r][-1] == 18
    assert [r["step"] for r in rows if "eval/mean_recall" in r] == [0, 6, 12, 18]
    assert {"loss_itc", "loss_itm", "temperature", "grad_norm", "bad_records"} <= set(rows[1])
    step, _, _ = final_state(workdir)
    assert step == 18


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(signal.SIGKILL, id="SIGKILL"),
        pytest.param(signal.SIGTERM, id="SIGTERM", marks=pytest.mark.slow),
    ],
)
def test_a_broken_run_equals_an_unbroken_one(how, unbroken, data, tmp_path):
    """Signalled at a random step, resumed with other loader threads: the same bits."""
    # The early half, so that the run is still going when the signal comes.
    step = random.choice([3, 6, 9])
    process = start(tmp_path, data)
    wait_for_step(tmp_path, process, step)
    assert process.poll() is None, f"ended before the signal at step {step}"
    process.send_signal(how)
    code, output = finish(process)
    assert code == (0 if how == signal.SIGTERM else -signal.SIGKILL), output
    if how == signal.SIGTERM:
        assert "the same command goes on from there" in output
    code, output = finish(start(tmp_path, data, "--config.data.threads=1"))
    assert code == 0, output

    step, arrays, params = final_state(tmp_path)
    expected_step, expected_arrays, expected = final_state(unbroken[0])
    assert step == expected_step
    assert arrays == expected_arrays  # digests of params, optimizer state, twins and queue
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    last = [row for row in curve(tmp_path) if "eval/mean_recall" in row][-1]
    assert last == [row for row in curve(unbroken[0]) if "eval/mean_recall" in row][-1]


def test_eval_only_repeats_the_final_numbers(unbroken, data, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "copy")
    results = tmp_path / "copy" / "results.json"
    before = json.loads(results.read_text())
    results.unlink()
    code, output = finish(start(tmp_path / "copy", data, "--eval_only"))
    assert code == 0, output
    assert json.loads(results.read_text()) == before


def test_a_finished_run_trains_no_further(unbroken, data, tmp_path):
    shutil.copytree(unbroken[0], tmp_path / "copy")
    code, output = finish(start(tmp_path / "copy", data))
    assert code == 0 and "nothing to train" in output, output
    assert curve(tmp_path / "copy") == curve(unbroken[0])


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_another(unbroken, data, tmp_path):
    """`init.checkpoint`: its first evaluation is the other's last, its step and schedule fresh."""
    given = f"--config.init.checkpoint={unbroken[0]}"
    code, output = finish(start(tmp_path, data, given, "--config.epochs=0.2"))
    assert code == 0 and "init.checkpoint: " in output, output
    first, *_ = [row for row in curve(tmp_path) if "eval/mean_recall" in row]
    *_, last = [row for row in curve(unbroken[0]) if "eval/mean_recall" in row]
    assert first == last | {"step": 0}
    assert final_state(tmp_path)[0] == 1


def test_eval_only_without_a_checkpoint(capsys, tmp_path):
    message = complain(capsys, "--workdir", tmp_path / "typo", "--eval_only")
    assert "typo" in message and "no checkpoint" in message
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize(
    "cfg",
    [pytest.param(CFG, id="itc"), pytest.param(SIGMOID, id="sigmoid", marks=pytest.mark.slow)],
)
def test_loss_falls_on_a_fixed_batch(cfg):
    cfg = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, dtype="bfloat16"))
    tx = make_optimizer(dataclasses.replace(cfg.optim, weight_decay=0.0), lambda _: 2e-3)
    step = jax.jit(make_train_step(cfg, tx, lambda _: jnp.float32(2e-3), lambda _: 0.0))
    state = init_state(cfg, tx)
    (batch,) = batches(1)
    batch["group"] = np.arange(16, dtype=np.int32)
    losses = []
    for _ in range(40):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert np.mean(losses[-5:]) < 0.7 * losses[0]
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state["params"]))


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_stops_the_run(data, tmp_path):
    cfg = config.load(DEBUG)
    for field, value in (
        ("data.path", str(data)),
        ("optim.lr", "1e30"),
        ("optim.warmup_steps", "0"),
        ("checkpoint.every_steps", "1"),
    ):
        cfg = config.override(cfg, field, value)
    with pytest.raises(NonFiniteLoss) as error:
        train(cfg, tmp_path)
    message = str(error.value)
    assert "step 2: " in message and "loss_itc=" in message
    assert message.count("drawn") == 8  # the ids of the batch
    assert "last checkpoint is step 1" in message
    # The state that came out of the bad step was not kept.
    assert checkpoint.read_meta(tmp_path)["step"] == 1


def test_parameters_that_are_not_numbers_are_not_saved(data, tmp_path):
    """Of the last update no later loss would tell. With beta1 = 1 Adam divides by zero."""
    cfg = config.load(DEBUG)
    for field, value in (("data.path", str(data)), ("epochs", "0.01"), ("optim.beta1", "1.0")):
        cfg = config.override(cfg, field, value)
    with pytest.raises(NonFiniteLoss, match=r"step 1: its update left.*No checkpoint was written"):
        train(cfg, tmp_path)
    assert checkpoint.complete_steps(tmp_path / checkpoint.FOLDER) == []


def complain(capsys, *arguments):
    """The one line on stderr of a run that cannot start."""
    assert main.main(["--config", DEBUG, *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_no_data_configured(capsys, tmp_path):
    message = complain(capsys, "--workdir", tmp_path, "--config.data.drawn.train_identities=0")
    for word in ("config.data.path is not set", "flip_jax.data build", "configs/demo.py"):
        assert word in message


def test_the_reference_recipe_asks_for_data(capsys, tmp_path):
    base = str(ROOT / "configs" / "base.py")
    assert main.main(["--config", base, "--workdir", str(tmp_path)]) == 1
    assert "config.data.path is not set" in capsys.readouterr().err


def test_missing_data_folder(capsys, tmp_path):
    message = complain(capsys, "--workdir", tmp_path, "--config.data.path=/no/such/folder")
    assert "/no/such/folder" in message


def test_batch_that_does_not_fit_the_devices(capsys, tmp_path, data):
    message = complain(
        capsys,
        *("--workdir", tmp_path, f"--config.data.path={data}", "--config.data.batch_size=12"),
        *("--config.loss.queue_size=36",),
    )
    assert "config.data.batch_size=12: must be a multiple of the 8 devices" in message


def test_parts_that_do_not_fit_the_devices(capsys, tmp_path, data):
    message = complain(
        capsys,
        *("--workdir", tmp_path, f"--config.data.path={data}", "--config.data.batch_size=16"),
        *("--config.loss.queue_size=32", "--config.optim.accum_steps=4"),
    )
    assert "config.optim.accum_steps=4: the 8 devices of the mesh must divide" in message
    assert "data.batch_size=16, 4 rows" in message


def test_vocabulary_of_another_size(capsys, tmp_path, data):
    message = complain(
        capsys,
        *("--workdir", tmp_path, f"--config.data.path={data}"),
        "--config.model.text.vocab_size=600",
    )
    assert "config.model.text.vocab_size=600" in message and "529" in message


def test_workdir_of_another_model(capsys, unbroken, data):
    message = complain(
        capsys,
        *("--workdir", unbroken[0], f"--config.data.path={data}"),
        "--config.model.embed_dim=24",
    )
    assert "model.embed_dim" in message and "16" in message and "new workdir" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere; the next test stands in")
def test_unwritable_workdir(capsys, tmp_path, data):
    tmp_path.chmod(0o500)
    message = complain(capsys, "--workdir", tmp_path / "run", f"--config.data.path={data}")
    assert str(tmp_path) in message


def test_workdir_that_is_a_file(capsys, tmp_path, data):
    (tmp_path / "run").write_text("")
    message = complain(capsys, "--workdir", tmp_path / "run", f"--config.data.path={data}")
    assert str(tmp_path / "run") in message
