"""A trace covers the steps asked for, and only those."""

import jax
import jax.numpy as jnp
import pytest

from flip_jax.config import ProfileConfig
from flip_jax.profile import StepProfile


@pytest.fixture
def calls(monkeypatch):
    """What was asked of JAX's profiler."""
    seen = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: seen.append(str(folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: seen.append("stop"))
    return seen


def run(steps, first, last, folder, calls):
    with StepProfile(ProfileConfig(steps), folder) as profile:
        for step in range(first, last + 1):
            profile.begin(step)
            calls.append(step)
            profile.end(step, jnp.zeros(()))


def test_off(calls, tmp_path):
    run(None, 1, 3, tmp_path, calls)
    assert calls == [1, 2, 3]


def test_steps_in_between(calls, tmp_path):
    run((2, 3), 1, 5, tmp_path, calls)
    assert calls == [1, str(tmp_path), 2, 3, "stop", 4, 5]


def test_a_run_that_starts_or_ends_inside(calls, tmp_path):
    run((2, 9), 4, 5, tmp_path, calls)
    assert calls == [str(tmp_path), 4, 5, "stop"]


def test_a_run_behind_the_steps(calls, tmp_path):
    run((2, 3), 4, 5, tmp_path, calls)
    assert calls == [4, 5]


def test_files_are_written(tmp_path):
    with StepProfile(ProfileConfig((1, 1)), tmp_path / "profile") as profile:
        profile.begin(1)
        profile.end(1, jax.jit(lambda x: x @ x)(jnp.ones((8, 8))))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
