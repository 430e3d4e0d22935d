"""How time and memory of the training step grow: with batch, image, queue and devices.

    python benchmarks/scaling.py [--png scaling.png] [--rounds 2] [--depth 2]

The whole recipe in float32 with half the width of base and two layers in both towers, captions of
65 tokens, no dropout. One point has batch 8, 224 px, a queue of 61,440 and one device; from there
one axis at a time changes. `devices` are simulated on this CPU and share the batch: what memory
each needs means something, the time does not and is not taken. Chips that are not here are compiled
for by `python -m flip_jax.compile` (docs/compile.md).

`growth` is the slope in a log-log plot, least squares: 1 = in proportion, 0 = not at all. Time is
measured, memory is what XLA plans on each device for temporary results and for the state with the
batch. The last line is JSON.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flip_jax.huge_pages import restart_with_huge_pages

if __name__ == "__main__":
    restart_with_huge_pages()  # before what takes seconds to import

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks import steps
from benchmarks.result import print_result
from flip_jax import partition
from flip_jax.config import Config


@dataclass(frozen=True)
class Point:
    batch: int = 8
    image: int = 224
    queue: int = 61_440
    devices: int = 1


AXES = {
    "batch": (2, 4, 8),
    "image": (112, 160, 224),
    "queue": (8192, 61_440, 245_760),
    "devices": (1, 2, 8),
}
WHAT = {"time": "s per step", "temp": "MiB, temporary", "state": "MiB, state and batch"}


def main() -> None:
    steps.keep_programs()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--png", type=Path, default=None, help="draws the growth into this file")
    parser.add_argument("--rounds", type=int, default=2, help="of each step, in turns")
    parser.add_argument("--depth", type=int, default=2, help="layers of each tower; base has 12")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", max(AXES["devices"]))
    points = list(dict.fromkeys(Point(**{axis: n}) for axis in AXES for n in AXES[axis]))
    # Start values for all points: to compile what makes them takes seconds at each.
    start = steps.Step(config_of(Point(), args.depth)).state
    found = {}
    for point in points:
        found[point] = measure(point, args.rounds, args.depth, start)
        print(f"{point}: { ({name: round(n, 2) for name, n in found[point].items()}) }", flush=True)
    rows = []
    for axis, values in AXES.items():
        line = [found[Point(**{axis: value})] for value in values]
        for what in line[-1]:
            numbers = [each[what] for each in line]
            row = {"axis": axis, "values": values, "what": what, "numbers": numbers}
            rows.append(row | {"growth": growth(values, numbers)})
            print(
                f"{axis:8} {what:6} growth {rows[-1]['growth']:5.2f}: "
                + ", ".join(f"{v:,}: {n:.4g}" for v, n in zip(values, numbers, strict=True))
            )
    if args.png is not None:
        draw(rows, args.png)
    print_result("scaling", depth=args.depth, rows=rows)


def config_of(point: Point, depth: int) -> Config:
    cfg = steps.half_config(point.batch, dropout=0.0)
    vision = replace(cfg.model.vision, image_size=point.image, depth=depth)
    text = replace(cfg.model.text, depth=depth)
    return replace(
        cfg,
        model=replace(cfg.model, vision=vision, text=text),
        loss=replace(cfg.loss, queue_size=point.queue),
    )


def measure(point: Point, rounds: int, depth: int, start: Any) -> dict[str, float]:
    """What `WHAT` names, but the time of several devices. Points come one by one: their states
    together would fill the memory.

    Args:
      start: the state of another point. Its arrays are repeated or cut to the sizes of this one.
    """
    step = steps.Step(config_of(point, depth), point.devices)
    batch = steps.make_batch(np.full(point.batch, 65), side=point.image)
    batch = partition.to_global(batch, step.mesh)
    memory = step.memory(batch)
    memory = {what: memory[what] for what in WHAT if what in memory}
    if point.devices > 1:
        return memory
    step.state = jax.tree.map(
        lambda a, own: jax.device_put(jnp.resize(a, own.shape), own.sharding, may_alias=False),
        start,
        step.target,
    )
    return steps.medians(steps.in_turns({"time": lambda: step(batch)}, rounds)) | memory


def growth(values: tuple[int, ...], numbers: list[float]) -> float:
    return float(np.polyfit(np.log(values), np.log(numbers), 1)[0])


def draw(rows: list[dict], path: Path) -> None:
    figure, panels = plt.subplots(len(WHAT), len(AXES), figsize=(13, 8), layout="constrained")
    for panel in panels.flat:
        panel.set_axis_off()  # until something was measured
    for row in rows:
        panel = panels[list(WHAT).index(row["what"]), list(AXES).index(row["axis"])]
        panel.set_axis_on()
        panel.plot(row["values"], row["numbers"], "o-", color="#20639b")
        panel.set(xscale="log", xlabel=row["axis"], ylabel=WHAT[row["what"]])
        panel.set_ylim(0, 1.1 * max(row["numbers"]))
        panel.set_xticks(row["values"], [f"{value:,}" for value in row["values"]])
        panel.minorticks_off()
        panel.set_title(f"growth {row['growth']:.2f}", fontsize=10)
    figure.savefig(path, dpi=80)


if __name__ == "__main__":
    main()
