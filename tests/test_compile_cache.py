"""Compiled programs in the workdir: found again, and where the environment says so not there."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from flip_jax import main
from flip_jax.compile_cache import FOLDER, keep_compiled

ROOT = Path(__file__).resolve().parent.parent

PROGRAM = """
import sys
from pathlib import Path
import jax
from flip_jax.compile_cache import keep_compiled

events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
keep_compiled(Path(sys.argv[1]))
print(jax.jit(lambda x: 3 * x + 1)(2.0), events.count("/jax/compilation_cache/cache_hits"))
"""


def run(workdir, **environment):
    kept = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    kept |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"} | environment
    command = [sys.executable, "-c", PROGRAM, str(workdir)]
    done = subprocess.run(command, env=kept, capture_output=True, text=True, check=True)
    value, hits = done.stdout.split()
    return float(value), int(hits)


def test_second_process_finds_what_the_first_compiled(tmp_path):
    assert run(tmp_path) == (7.0, 0)
    kept = sorted((tmp_path / FOLDER).iterdir())
    assert kept
    value, hits = run(tmp_path)
    assert value == 7.0 and hits > 0
    assert sorted((tmp_path / FOLDER).iterdir()) == kept


def test_a_truncated_program_is_compiled_again(tmp_path):
    run(tmp_path)
    for path in (tmp_path / FOLDER).iterdir():
        path.write_bytes(path.read_bytes()[:20])
    assert run(tmp_path) == (7.0, 0)


@pytest.mark.parametrize("given", ["", "elsewhere"])
def test_the_environment_comes_first(tmp_path, given):
    folder = str(tmp_path / given) if given else ""
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=folder) == (7.0, 0)
    assert not (tmp_path / FOLDER).exists()
    assert (tmp_path / "elsewhere").exists() == bool(given)


@pytest.mark.parametrize(
    "job, kept", [("train", True), ("eval_only", True), ("print_sharding", False)]
)
def test_jobs_that_run_the_model_keep_programs(tmp_path, monkeypatch, job, kept):
    """The job itself stops at once: only the order of the two is looked at."""
    before = jax.config.jax_compilation_cache_dir
    seen = []

    def note(*_):
        seen.append(jax.config.jax_compilation_cache_dir)
        raise ValueError("enough")

    for name in ("train", "evaluate", "sharding_table"):
        monkeypatch.setattr(f"flip_jax.train.{name}", note)
    jax.config.update("jax_compilation_cache_dir", None)
    arguments = ["--config", str(ROOT / "configs" / "debug.py"), "--workdir", str(tmp_path)]
    try:
        assert main.main(arguments + ([f"--{job}"] if job != "train" else [])) == 1
        assert seen == [str(tmp_path / FOLDER) if kept else None]
        keep_compiled(tmp_path / "other")
        other = jax.config.jax_compilation_cache_dir
        assert other == seen[0] or not kept
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
