"""What the benchmarks of the training step share: batches, compiled steps, timing in turns."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, MutableMapping
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax import partition
from flip_jax.compile_cache import keep_compiled
from flip_jax.config import Config, MeshConfig
from flip_jax.data.captions import captions
from flip_jax.data.drawn_faces import draw_traits
from flip_jax.data.face_traits import attribute_vector
from flip_jax.data.text_buckets import crop_texts
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.train import Compiled

ALPHA = 0.4
BUCKETS = (32, 40, 48, 56)


def keep_programs() -> None:
    """Has a benchmark that is run again find its compiled programs. To be called first.

    They are in `flip_jax/compiled` in the user's cache (`XDG_CACHE_HOME`, else `~/.cache`), about a
    megabyte each. JAX_COMPILATION_CACHE_DIR names another folder; set to nothing it turns that off.
    """
    keep_compiled(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flip_jax")


def take_gpu_memory(environment: MutableMapping[str, str]) -> None:
    """JAX may have nearly all of a GPU's memory, if the environment that it starts in says nothing
    else."""
    if not any(name.endswith("CLIENT_MEM_FRACTION") for name in environment):
        environment["XLA_CLIENT_MEM_FRACTION"] = "0.95"


def card() -> str:
    """As `nvidia-smi` names it: its name, driver and memory."""
    fields = "--query-gpu=name,driver_version,memory.total"
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={first}", fields, "--format=csv,noheader"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return jax.devices()[0].device_kind


def our_config(batch: int, dropout: float = 0.1) -> Config:
    """The reference recipe at base size in float32, all of the batch as local candidates."""
    cfg = Config()
    text = dataclasses.replace(cfg.model.text, dropout=dropout)
    return dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, text=text, dtype="float32"),
        loss=dataclasses.replace(
            cfg.loss, candidates="global", queue_size=61_440, alpha=ALPHA, alpha_ramp_epochs=0.0
        ),
        optim=dataclasses.replace(cfg.optim, schedule="constant", warmup_steps=0),
        data=dataclasses.replace(cfg.data, batch_size=batch),
    )


def half_config(batch: int, dropout: float = 0.1) -> Config:
    """As `our_config` with half the width in both towers, a quarter of the work; 224 px still."""
    cfg = our_config(batch, dropout)
    towers = {
        name: dataclasses.replace(getattr(cfg.model, name), width=384, heads=6, mlp_width=1536)
        for name in ("vision", "text")
    }
    return dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, **towers))


CONFIGS = {"half": half_config, "base": our_config}


def make_batch(lengths: np.ndarray, seed: int = 0, side: int = 224) -> dict[str, np.ndarray]:
    """Random pixels and ids; caption b has lengths[b] real tokens of 65."""
    rng = np.random.default_rng(seed)
    return make_texts(lengths, seed) | {
        "image": rng.normal(size=(len(lengths), side, side, 3)).astype(np.float32),
        "group": np.arange(len(lengths), dtype=np.int32),
    }


def make_texts(lengths: np.ndarray, seed: int = 0) -> dict[str, np.ndarray]:
    """Random ids; caption b has lengths[b] real tokens of 65."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1000, 30_000, (len(lengths), 65)).astype(np.int32)
    ids[:, 0] = 101
    mask = np.arange(65) < lengths[:, None]
    return {"token_ids": np.where(mask, ids, 0), "token_mask": mask}


def grammar_lengths(batch: int, seed: int = 0) -> np.ndarray:
    """Tokens of captions that the grammar writes about drawn faces, at most 65."""
    faces = [attribute_vector(*draw_traits(seed, number, picture=0)) for number in range(batch)]
    texts = [text for face in faces for text in captions(face, seed, count=1)]
    return Tokenizer.load("grammar", 65)(texts)[1].sum(axis=1)


def cut(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The texts cut to the first of `BUCKETS` that holds the longest."""
    return crop_texts(batch, BUCKETS, lambda value: [value])


class Step:
    """A training step, compiled once for each shape of a batch; it changes its state.

    Args:
      start: the state to begin with, which is copied; by default start values, once they are asked
        for: their program takes seconds to compile.

    Attributes:
      state: what it was started with, then what its last step made of it.
      target: shapes, dtypes and shardings of `state`.
    """

    def __init__(self, cfg: Config, devices: int = 1, start: Any = None):
        self.mesh = partition.make_mesh(MeshConfig(), jax.devices()[:devices])
        compiled = Compiled(cfg, self.mesh, steps_per_epoch=1000, steps=1000)
        if start is not None:
            self.state = jax.tree.map(jnp.copy, start)
        self.target = compiled.target
        self._functions, self._programs = compiled, {}

    @cached_property
    def state(self) -> Any:
        return self._functions.init()

    def __call__(self, batch: dict[str, Any], count: int = 1) -> dict[str, float]:
        """Returns the parts of the loss of the last of `count` steps, which alone is waited for."""
        for _ in range(count):
            self.state, metrics = self._compiled(batch)(self.state, batch)
        jax.block_until_ready(self.state)
        return {name: float(metrics[name]) for name in metrics if name.startswith("loss_")}

    def _compiled(self, batch: dict[str, Any]) -> Any:
        shapes = tuple((name, np.shape(value)) for name, value in jax.tree.leaves_with_path(batch))
        if shapes not in self._programs:
            self._programs[shapes] = self._functions.step.lower(self.target, batch).compile()
        return self._programs[shapes]

    def text(self, batch: dict[str, Any]) -> str:
        """The compiled program (HLO)."""
        return self._compiled(batch).as_text()

    def memory(self, batch: dict[str, Any]) -> dict[str, float]:
        """MiB on each device that XLA plans: of `state` and batch, of `temp`orary results, and of
        `all`, with the new state where that has no place in the old one."""
        found = self._compiled(batch).memory_analysis()
        state, temp = found.argument_size_in_bytes, found.temp_size_in_bytes
        new = found.output_size_in_bytes - found.alias_size_in_bytes
        sizes = {"state": state, "temp": temp, "all": state + temp + new}
        return {name: size / 2**20 for name, size in sizes.items()}


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turns(
    calls: Mapping[str, Callable[[], object]], rounds: int, *, warm: bool = True
) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, back again and so on, so that a busy machine
    slows all.

    Args:
      warm: one that is timed follows another one of its own, as a step of a training does. After
        something else the memory that it takes may have gone back to the host of a virtual machine,
        which can make a step half as long again; the first call of all also compiles.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    before = None
    for turn in range(rounds):
        for name in reversed(calls) if turn % 2 else calls:
            if warm and name != before:
                calls[name]()
            seconds[name].append(timed(calls[name]))
            before = name
    return seconds


def medians(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(each) for name, each in seconds.items()}


def spread(seconds: list[float]) -> str:
    """How much longer the slowest took than the fastest."""
    return f"{max(seconds) / min(seconds) - 1:.0%}"
