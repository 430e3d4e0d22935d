"""The benchmarks are scripts for an idle machine; here, that each finds what it imports."""

import dataclasses
import importlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from flip_jax.compile.hlo import Module
from flip_jax.config import (
    Config,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    VisionConfig,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_can_be_imported(name):
    pytest.importorskip("torch", reason="the peer of the benchmarks is PyTorch")
    module = importlib.import_module(f"benchmarks.{name}")
    assert module.__doc__


def test_a_step_is_timed_after_one_of_its_own(monkeypatch):
    steps = importlib.import_module("benchmarks.steps")
    made = []
    monkeypatch.setattr(steps, "timed", lambda work: work() or len(made))  # which call it was
    found = steps.in_turns({name: lambda n=name: made.append(n) for name in "ab"}, rounds=3)
    assert made == list("aabbbaaabb")
    assert found == {"a": [2, 7, 8], "b": [4, 5, 10]}
    made.clear()
    found = steps.in_turns({name: lambda n=name: made.append(n) for name in "ab"}, 2, warm=False)
    assert made == list("abba") and found == {"a": [1, 4], "b": [2, 3]}


def test_a_profile_has_all_products_of_a_program(capsys):
    profile = importlib.import_module("benchmarks.step_profile")
    a, weights = jnp.ones((64, 32)), jnp.ones((3, 32, 32))

    def layers(a, weights):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), a, weights)[0]

    program = jax.jit(layers).lower(a, weights).compile()
    module = Module(program.as_text())

    def run():
        jax.block_until_ready(program(a, weights))

    def kind(instruction, flops):
        return f"products {profile.shape(instruction)}" if flops else "others"

    found = profile.profile(run, module, kind)
    assert found["products [64, 32]"].flops == 3 * 2 * 64 * 32 * 32
    assert found["products [64, 32]"].seconds > 0
    assert "GFLOP/s" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="the trace has 0 of"):
        profile.profile(lambda: None, module, kind)


def test_a_result_says_where_it_was_found_and_how(monkeypatch, capsys):
    result = importlib.import_module("benchmarks.result")
    monkeypatch.setattr(sys, "argv", ["/somewhere/benchmarks/masking.py", "--size", "a b"])
    result.print_result("masking", rows=[1])
    found = json.loads(capsys.readouterr().out)
    assert found.pop("load") >= 0 and found.pop("cores") >= 1 and found.pop("processor")
    command = "python benchmarks/masking.py --size 'a b'"
    assert found == {"benchmark": "masking", "rows": [1], "command": command}


@pytest.fixture
def gpu():
    pytest.importorskip("torch", reason="the peer of the benchmarks is PyTorch")
    return importlib.import_module("benchmarks.train_step_gpu")


@pytest.mark.slow
def test_the_step_of_a_gpu(gpu, capfd):
    """All of it but the card: on the CPU at a small size, without compiled layers of the peer."""
    tower = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
    cfg = Config(
        model=ModelConfig(
            vision=VisionConfig(image_size=32, **tower),
            text=TextConfig(vocab_size=30_524, **tower),
            embed_dim=16,
            remat="dots",
            dtype="bfloat16",
        ),
        loss=LossConfig(candidates="global", queue_size=64, alpha=0.4, alpha_ramp_epochs=0.0),
        optim=OptimConfig(schedule="constant", warmup_steps=0),
    )
    found = gpu.measure(cfg, [("grammar", 4, [30, 20, 10, 25]), ("full", 8, [65] * 8)], count=2)
    rows = found["rows"]
    assert [(row["batch"], row["flip_jax"]["columns"]) for row in rows] == [(4, 32), (8, 65)]
    for row in rows:
        ours, peer = row["flip_jax"], row["pytorch"]
        assert len(ours["all"]) == 3 and ours["gib_per_pair"] > 0
        assert row["ratio"] == peer["seconds"] / ours["seconds"]
        for side in (ours, peer):
            assert side["pairs_per_second"] == pytest.approx(row["batch"] / side["seconds"])
            rate = side["mfu"] * side["seconds"] * found["product_flops"]
            of_ours = gpu.model_flops_per_pair(gpu.with_batch(cfg, row["batch"]), ours["columns"])
            assert rate == pytest.approx(of_ours * row["batch"])
    assert "grammar  same losses" in capfd.readouterr().out

    with pytest.raises(gpu.subprocess.CalledProcessError):
        other = dataclasses.replace(cfg, loss=dataclasses.replace(cfg.loss, alpha=0.9))
        gpu.measure(other, [("grammar", 4, [30, 20, 10, 25])], count=1)
    assert "AssertionError: grammar, loss_itc" in capfd.readouterr().err


@pytest.mark.parametrize(
    "message",
    ["RESOURCE_EXHAUSTED: 1 GiB", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED"],
)
def test_a_batch_that_a_card_has_no_room_for(gpu, message):
    def fail(error):
        raise error

    found = gpu.times(lambda: fail(RuntimeError(f"{message}\nmore")), 1)
    assert found == {"error": f"out of memory: {message}"}
    with pytest.raises(RuntimeError, match="something else"):
        gpu.times(lambda: fail(RuntimeError("something else")), 1)


def test_what_the_ablation_tries():
    pytest.importorskip("torch", reason="the peer of the benchmarks is PyTorch")
    ablation = importlib.import_module("benchmarks.ablation")
    cpu = ablation.steps.half_config(4)
    gpu = ablation.with_model(cpu, dtype="bfloat16", remat="dots")
    on_cpu, on_gpu = ablation.variants(cpu, gpu=False), ablation.variants(gpu, gpu=True)
    assert set(on_cpu) - set(on_gpu) == {"remat dots"}
    assert ablation.trials(cpu, gpu=False)["bfloat16"][0].model.dtype == "bfloat16"
    assert "bfloat16" not in ablation.trials(gpu, gpu=True)
    assert on_gpu["float32"][0].model.dtype == "float32"
    assert set(on_gpu) - set(on_cpu) == {"remat none", "float32", "flash"}
    assert on_gpu["remat none"][0].model.remat == "none"
    assert on_gpu["flash"][0].model.vision.attention == "flash"
    assert list(ablation.chosen_of(on_gpu, ["flash"])) == ["all levers", "flash"]
    assert ablation.chosen_of(on_gpu, None) == on_gpu
    with pytest.raises(SystemExit, match=r"no \['slow'\]; there are \['all levers', "):
        ablation.chosen_of(on_gpu, ["slow"])
    with pytest.raises(AssertionError, match="flash: loss is nan"):
        ablation.assert_same("flash", {"loss": float("nan")}, {"loss": 1.0}, 0.05)
