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
