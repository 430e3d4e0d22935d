"""The memory of one chip: what a step keeps there, and whether it fits."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from flip_jax import partition
from flip_jax.config import Config

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# Two ways in which libtpu says that a program is too large.
_NEEDED = (
    re.compile(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)"),
    re.compile(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm"),
)
_BUFFER = re.compile(
    r"^ *\S+\( *\d+%\); *([\d.]+)([KMGT]?)i?B; *\d+; *\d+; (?:\d+×)?(\w+\[[\d,]*\])", re.MULTILINE
)


@dataclass(frozen=True)
class Memory:
    """Bytes on one chip.

    Attributes:
      parts: of the state and the batch, by shape; the compiler pads some of them.
      arguments: all of `parts`, padded if the step was compiled.
      temporaries: activations and workspace; None = not compiled, as `arguments` do not fit.
      outputs: results that do not take the place of an argument.
      total: peak, what must fit.
      capacity: None = unknown, as on a CPU.
      largest: the largest temporaries, (bytes, type and shape), if the compiler tells.
    """

    parts: dict[str, float]
    arguments: float
    temporaries: float | None
    outputs: float
    total: float
    capacity: float | None
    largest: Sequence[tuple[float, str]] = ()

    @property
    def fits(self) -> bool | None:
        """None = unknown."""
        return None if self.capacity is None else self.total <= self.capacity


def parts_of(state: Any, batch: Any) -> dict[str, float]:
    """Bytes on one device of each part of an abstract train state and of the batch, largest first.

    Args:
      state, batch: trees of `jax.ShapeDtypeStruct` with shardings; the parts are the first names.
    """
    totals: dict[str, float] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path({**state, "batch": batch}):
        part = partition.leaf_path(path).split("/")[0]
        size = leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
        totals[part] = totals.get(part, 0.0) + size
    return dict(sorted(totals.items(), key=lambda item: -item[1]))


def without_temporaries(parts: dict[str, float], capacity: float | None) -> Memory:
    """What is known before compiling: a lower bound."""
    whole = sum(parts.values())
    return Memory(parts, whole, None, 0.0, whole, capacity)


def of_program(
    parts: dict[str, float],
    compiled: jax.stages.Compiled,
    capacity: float | None,
    dump: str,
    whole: bool = False,
) -> Memory:
    """Of a program that compiled; `dump` is the folder of the compiler's reports.

    Args:
      whole: temporaries are one piece of memory, as on GPUs, so that their peak is all of it. Of
        CPUs the compiler tells no peak.
    """
    found = compiled.memory_analysis()
    arguments = found.argument_size_in_bytes
    outputs = found.output_size_in_bytes - found.alias_size_in_bytes
    # On TPU `temp_size_in_bytes` is not what is taken at any one time; the peak is.
    peak = 0 if whole else found.peak_memory_in_bytes
    total = peak or arguments + outputs + found.temp_size_in_bytes
    temporaries = max(total - arguments - outputs, 0)
    return Memory(parts, arguments, temporaries, outputs, total, capacity, largest_buffers(dump))


def of_failure(
    parts: dict[str, float], message: str, capacity: float | None, dump: str
) -> Memory | None:
    """Of a program that the compiler refused for its size; None if that is not what happened."""
    found = next((f for pattern in _NEEDED if (f := pattern.search(message))), None)
    if found is None:
        return None
    total = float(found[1]) * _UNITS[found[2]]
    arguments = sum(parts.values())
    temporaries = max(total - arguments, 0.0)
    capacity = float(found[3]) * _UNITS[found[4]]
    return Memory(parts, arguments, temporaries, 0.0, total, capacity, largest_buffers(dump))


def largest_buffers(dump: str, count: int = 5) -> list[tuple[float, str]]:
    """The largest temporaries by the compiler's report; empty if it wrote none (CPU, GPU)."""
    reports = glob.glob(os.path.join(dump, "*memory-usage-report.txt"))
    if not reports:
        return []
    with open(max(reports, key=os.path.getsize), encoding="utf-8") as file:
        # The first table is the heap of temporaries; the next ones are single arguments.
        table = file.read().split("cumulative_size", 2)[1]
    found = [(float(size) * _UNITS[unit], kind) for size, unit, kind in _BUFFER.findall(table)]
    return sorted(found, reverse=True)[:count]


def advice(cfg: Config, memory: Memory, chips: int, sharded: dict[int, float]) -> list[str]:
    """What to change so that a step that does not fit may fit.

    Args:
      chips: of the mesh.
      sharded: possible `mesh.fsdp` -> bytes of state and batch on one chip.
    """
    lines = []
    half = 0.5 * memory.capacity
    fsdp = min((n for n, size in sharded.items() if size <= half), default=cfg.mesh.fsdp)
    if memory.arguments > half and fsdp > cfg.mesh.fsdp:
        now, then = memory.arguments / 2**30, sharded[fsdp] / 2**30
        lines.append(f"--config.mesh.fsdp={fsdp}: arguments of {then:.2f} instead of {now:.2f} GiB")
    if memory.temporaries is None:
        return lines or ["more chips, or chips with more memory"]
    if remat := {"none": "dots", "dots": "full"}.get(cfg.model.remat):
        lines.append(f"--config.model.remat={remat}: recompute more in the backward pass")
    parts = cfg.optim.accum_steps * 2
    if cfg.data.batch_size // chips % parts == 0:
        lines.append(f"--config.optim.accum_steps={parts}: the towers see the batch in parts")
    lines.append("fewer pairs per chip: a smaller --pairs-per-chip, or more chips")
    return lines
