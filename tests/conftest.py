"""Eight simulated CPU devices for every test, and the places tests read from."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# Compiling is most of what tests do; on toy sizes unoptimised code runs as fast.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=2",
)

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Many tests, and the commands they start, compile the same step: all processes share a cache.
COMPILED = "" if "JAX_COMPILATION_CACHE_DIR" in os.environ else tempfile.mkdtemp("compiled")
if COMPILED:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
    jax.config.update("jax_compilation_cache_dir", COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"
# `benchmarks` holds the PyTorch peer that doubles as an oracle.
sys.path.insert(0, str(ROOT))


def pytest_unconfigure():
    if COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(items):
    """First the file with the longest test: the last one would have one process work alone."""
    items.sort(key=lambda item: item.path.name != "test_readme.py")


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A collection of faces to search, made once for all tests of the search page."""
    from search_world import make_world

    return make_world(tmp_path_factory)


@pytest.fixture(scope="session")
def served(world):
    from search_world import Served

    with Served(world.engine) as server:
        yield server


@pytest.fixture
def golden() -> Path:
    """Tensors recorded from the official implementation."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("tensors of the official implementation are not on this machine")
    return folder
