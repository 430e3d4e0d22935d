"""Eight simulated CPU devices for every test, and the places tests read from."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling is most of what tests do; on toy sizes unoptimised code runs as fast.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# `benchmarks` holds the PyTorch peer that doubles as an oracle.
sys.path.insert(0, str(ROOT))


@pytest.fixture
def golden() -> Path:
    """Tensors recorded from the official implementation."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("tensors of the official implementation are not on this machine")
    return folder
