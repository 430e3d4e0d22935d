"""The benchmarks are scripts for an idle machine; here, that each finds what it imports."""

import importlib
import sys
from pathlib import Path

import pytest

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


def test_the_step_of_a_gpu(monkeypatch):
    """All of it but the card: on the CPU at a small size, without compiled layers of the peer."""
    pytest.importorskip("torch", reason="the peer of the benchmarks is PyTorch")
    gpu = importlib.import_module("benchmarks.train_step_gpu")
    monkeypatch.setattr(gpu.torch_peer, "compile_layers", lambda peer: None)
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
    batches = {
        ("grammar", size): gpu.steps.make_batch(gpu.np.full(size, 30), side=32) for size in (4, 8)
    }
    # One that a card has no room for.
    run = gpu.torch_peer.update

    def update(peer, optimizer, batch, *options):
        if len(batch["image"]) == 8:
            raise gpu.torch.OutOfMemoryError
        return run(peer, optimizer, batch, *options)

    monkeypatch.setattr(gpu.torch_peer, "update", update)
    rows = gpu.measure(cfg, batches, count=2, rate=1e12, device="cpu")
    assert [(row["batch"], row["columns"]) for row in rows] == [(4, 32), (8, 32)]
    for row in rows:
        ours, peer = row["flip_jax"], row["pytorch"]
        assert len(ours["all"]) == 3 and ours["gib_per_pair"] > 0
        assert ours["pairs_per_second"] == pytest.approx(row["batch"] / ours["seconds"])
        assert ours["mfu"] == pytest.approx(row["flops"] / 1e12 / ours["seconds"])
        if row["batch"] == 4:
            assert row["ratio"] == peer["seconds"] / ours["seconds"]
        else:
            assert row["ratio"] is None and peer["error"] == "out of memory"

    start = gpu.steps.Step(gpu.with_batch(cfg, 4)).state
    monkeypatch.setattr(gpu.steps, "ALPHA", 0.9)  # the peer's
    with pytest.raises(AssertionError, match="loss_itc"):
        gpu.peer_times(cfg, start, batches, 1, "cpu")
