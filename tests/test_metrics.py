"""Metric files survive a kill, rates and FLOPs are right, a NaN names its cause."""

import contextlib
import dataclasses
import io
import json
import math
import os
import select
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flip_jax import metrics
from flip_jax.config import Config, DataConfig, LossConfig, ModelConfig, TextConfig, VisionConfig
from flip_jax.train import init_state, make_train_step


def read_lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


# Files


def test_lines_and_tensorboard_files(tmp_path):
    with metrics.MetricsWriter(tmp_path / "run") as writer:
        writer.write(1, {"loss": np.float32(0.5), "lr": 1e-6})
        writer.write(2, {"loss": math.nan})
        assert read_lines(tmp_path / "run") == [
            {"step": 1, "loss": 0.5, "lr": 1e-6},
            {"step": 2, "loss": None},
        ]
    (events,) = (tmp_path / "run" / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"loss", b"lr"):
        assert name in content


@pytest.mark.parametrize("cut_off", ['{"step": 4, "lo', "", "[]x"])
def test_resuming_drops_later_and_cut_off_lines(tmp_path, cut_off):
    with metrics.MetricsWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut_off)
    with metrics.MetricsWriter(tmp_path, start_step=2) as writer:
        writer.write(3, {"loss": 30})
    assert [(line["step"], line["loss"]) for line in read_lines(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "tensorboard"}


def test_a_new_run_starts_an_empty_file(tmp_path):
    with metrics.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": 1.0})
    metrics.MetricsWriter(tmp_path).close()
    assert read_lines(tmp_path) == []


def test_unwritable_workdir(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write metrics to .*file/metrics.jsonl.*workdir"):
        metrics.MetricsWriter(tmp_path / "file")


# Rates


def test_timer_counts_waiting_and_leaves_pauses_out(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    timer = metrics.StepTimer(pairs_per_step=8, peak=48.0)
    for _ in range(4):
        with timer.waiting():
            clock.now += 0.5
        clock.now += 1.5
        timer.step(flops_per_pair=3.0)
    with timer.paused():
        clock.now += 100.0
    assert timer.report() == {
        "pairs_per_second": 4.0,
        "step_seconds": 2.0,
        "data_wait_share": 0.25,
        "mfu": 0.25,
    }
    assert timer.report() == {}
    clock.now += 1.0
    timer.step(flops_per_pair=3.0)
    assert timer.report()["pairs_per_second"] == 8.0


def test_no_mfu_without_a_peak():
    timer = metrics.StepTimer(8, metrics.peak_flops(jax.devices("cpu")[0]))
    timer.step(3.0)
    assert set(timer.report()) == {"pairs_per_second", "step_seconds", "data_wait_share"}


@pytest.mark.parametrize(
    "kind, tera",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("TPU v3", None),
        ("cpu", None),
    ],
)
def test_peaks(kind, tera):
    found = metrics.peak_flops(SimpleNamespace(device_kind=kind))
    assert found == (None if tera is None else tera * 1e12)


# FLOPs


def matmul_flops(jaxpr) -> int:
    """2 m n k of every matrix product in a program, those in a loop times its length, those of
    several platforms once."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "cond":
            assert eqn.params["branches_platforms"], "a branch of unknown length"
            (flops,) = {matmul_flops(branch.jaxpr) for branch in eqn.params["branches"]}
            total += flops
            continue
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            inner = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
            total += 2 * inner * math.prod(eqn.outvars[0].aval.shape)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        assert eqn.primitive.name != "while", "a loop of unknown length"
        for param in eqn.params.values():
            for value in param if isinstance(param, tuple | list) else (param,):
                value = getattr(value, "jaxpr", value)
                if hasattr(value, "eqns"):
                    total += times * matmul_flops(value)
    return total


def small_config(keep_patches, candidates) -> Config:
    vision = VisionConfig(16, 4, width=12, depth=3, heads=2, mlp_width=20)
    text = TextConfig(
        vocab_size=50, max_length=7, positions=16, width=8, depth=2, heads=2, mlp_width=28
    )
    return Config(
        model=ModelConfig(dataclasses.replace(vision, keep_patches=keep_patches), text, 6),
        loss=LossConfig(queue_size=32, local_batch=2, candidates=candidates),
        data=DataConfig(batch_size=4),
    )


@pytest.mark.parametrize(
    "keep_patches, candidates, tokens, part_tokens",
    [(None, "local", None, None), (9, "global", 5, 4)],
)
def test_flops_are_those_of_the_traced_step(keep_patches, candidates, tokens, part_tokens):
    cfg = small_config(keep_patches, candidates)
    tx = optax.sgd(1e-3)
    step = make_train_step(cfg, tx, lambda _: jnp.float32(1e-3), lambda _: jnp.float32(0.4))
    state = jax.eval_shape(lambda: init_state(cfg, tx))
    text, part = (4, tokens or 7), (4, part_tokens or 7)
    batch = {
        "image": jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.uint8),
        "token_ids": jax.ShapeDtypeStruct(text, jnp.int32),
        "token_mask": jax.ShapeDtypeStruct(text, jnp.bool_),
        "part_ids": jax.ShapeDtypeStruct(part, jnp.int32),
        "part_mask": jax.ShapeDtypeStruct(part, jnp.bool_),
        "group": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    traced = matmul_flops(jax.make_jaxpr(step)(state, batch).jaxpr)
    assert metrics.model_flops_per_pair(cfg, tokens, part_tokens) == traced / 4


def test_flops_at_base_size():
    cfg = Config()
    flops = metrics.model_flops_per_pair(cfg)
    assert flops == pytest.approx(0.3095e12, rel=1e-3)
    # The reference computes cross-attention keys and values for all three rows,
    unshared = 3 * 12 * (3 - 1) * 4 * 197 * 768**2
    # and in the last layers all tokens: of the text and its twin (3 + 1 passes), of the three fused
    # rows with cross-attention (3 * 3), and of the image's twin.
    text, image, width = 64, 196, 768
    unread = (3 + 1 + 9) * text * (4 * width**2 + 4 * 65 * width + 4 * width * 3072)
    unread += 9 * text * (4 * width**2 + 4 * 197 * width)
    unread += image * (4 * width**2 + 4 * 197 * width + 4 * width * 3072)
    assert flops + unshared + unread == pytest.approx(0.357e12, rel=1e-3)


# The guard


def test_a_non_finite_loss_names_what_is_known():
    metrics.check_finite(7, {"loss": 1.0, "grad_norm": 2.0}, ["a"], None)
    values = {"loss": math.nan, "loss_itc": 3.25, "grad_norm": math.inf}
    with pytest.raises(metrics.NonFiniteLoss) as caught:
        metrics.check_finite(8, values, ["face_1", "face_2"], 5)
    message = str(caught.value)
    for part in (
        "step 8: loss, grad_norm not finite",
        "loss_itc=3.25",
        "face_1, face_2",
        "The last checkpoint is step 5",
        "optim.clip_norm=1.0",
    ):
        assert part in message
    with pytest.raises(metrics.NonFiniteLoss, match="No checkpoint was written yet"):
        metrics.check_finite(8, values, ["face_1"], None)


# The line


VALUES = {"loss_itc": 11.03, "learning_rate": 3e-5, "data_wait_share": 0.02, "other": 1.0}


def test_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    with contextlib.closing(
        metrics.ProgressReporter(100, 0, batch_size=640, stream=stream)
    ) as reporter:
        reporter.step()
        reporter.log(50, VALUES | {"bad_records": 3})
    assert stream.getvalue() == (
        "step 50/100, examples 32000, itc 11.0300, lr 3.00e-05, data wait 2%, bad records 3\n"
    )


def test_a_bar_on_a_terminal():
    controller, terminal = os.openpty()
    with os.fdopen(terminal, "w") as stream:
        with contextlib.closing(
            metrics.ProgressReporter(100, 40, batch_size=640, stream=stream)
        ) as reporter:
            for _ in range(10):
                reporter.step()
            reporter.log(50, VALUES)
        shown = ""
        while "50/100 [" not in shown:  # a terminal hands on what is written when it likes
            assert select.select([controller], [], [], 10)[0], shown
            shown += os.read(controller, 100_000).decode()
    os.close(controller)
    assert "step 50/100, examples 32000" in shown
    assert "40%" in shown
