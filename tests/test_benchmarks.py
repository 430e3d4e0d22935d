"""The benchmarks are scripts for an idle machine; here, that each finds what it imports."""

import importlib
import sys
from pathlib import Path

import pytest

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
