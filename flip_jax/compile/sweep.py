"""One compiled step after the other, each in a process of its own: a table and a picture."""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flip_jax.compile import topology

# What a point is, and what is written of it.
KEY = ("config", "topology", "slices", "pairs_per_chip", "fields")
COLUMNS = (
    *KEY,
    "verdict",
    "chips",
    "batch_size",
    "hbm_gib",
    "arguments_gib",
    "capacity_gib",
    "model_tflop",
    "dot_tflop",
    "sent_mb",
    "step_seconds_best",
    "step_seconds_worst",
    "pairs_per_second_best",
    "pairs_per_second_worst",
    "chip_hours_best",
    "chip_hours_worst",
    "compile_seconds",
    "host_gib",
    "message",
)
ERROR = "error"  # verdict of a point that could not be compiled; it is tried again


def sweep(args: argparse.Namespace, fields: list[str]) -> int:
    """Compiles every combination that is not in the table yet.

    Returns:
      the exit status: 1 if a point could not be compiled, else 0, whether they fit or not.

    Raises:
      ValueError: nothing to vary, or a list that cannot be read.
      OSError: the folder cannot be written.
    """
    points = list(combinations(args, fields))
    for point in points:
        topology.check_name(point["topology"], args.slices)
    args.sweep.mkdir(parents=True, exist_ok=True)
    path = args.sweep / "sweep.csv"
    rows = read_rows(path)
    for number, point in enumerate(points, 1):
        name = f"{number}/{len(points)} {_line(point)}, {point['pairs_per_chip']} pairs per chip"
        done = rows.get(_key(point))
        if done is None or done["verdict"] == ERROR:
            print(f"{name} ...", flush=True)
            done = rows[_key(point)] = _compile(point, args, fields)
            _write_rows(path, list(rows.values()))
        print(f"{name}: {summary(done)}", flush=True)
    picture = args.sweep / "sweep.png"
    plot(list(rows.values()), picture)
    print(f"{path}, {picture}")
    return int(any(rows[_key(point)]["verdict"] == ERROR for point in points))


def combinations(args: argparse.Namespace, fields: list[str]) -> Iterator[dict[str, Any]]:
    """The points that the command line asks for."""
    if args.topology is None or args.pairs_per_chip is None:
        raise ValueError("--sweep needs --topology and --pairs-per-chip, lists with commas")
    pairs = args.pairs_per_chip.split(",")
    for text in pairs:
        if not text.isdigit() or int(text) == 0:
            raise ValueError(
                f"--pairs-per-chip={args.pairs_per_chip}: {text!r} is no number above 0"
            )
    shared = {"slices": str(args.slices)}
    for config, name, count in itertools.product(args.config, args.topology.split(","), pairs):
        yield (
            dict.fromkeys(KEY, "")
            | shared
            | {
                "config": config,
                "topology": name,
                "pairs_per_chip": count,
                "fields": " ".join(fields),
            }
        )


def read_rows(path: Path) -> dict[tuple[str, ...], dict[str, str]]:
    """The table of an earlier sweep, by point; empty if there is none.

    Raises:
      ValueError: it has other columns.
    """
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has other columns than this version writes; move it away")
        return {_key(row): row for row in reader}


def summary(row: dict[str, str]) -> str:
    """One line about a finished point."""
    if row["verdict"] == ERROR:
        return row["message"]
    text = f"{row['verdict']}, {row['hbm_gib']} of {row['capacity_gib']} GiB"
    if row["pairs_per_second_best"]:
        text += f", {row['pairs_per_second_worst']} to {row['pairs_per_second_best']} pairs/s"
    return text


def plot(rows: list[dict[str, str]], path: Path) -> None:
    """Memory, with the capacity of the chip, and estimated pairs/s against pairs per chip."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    memory, speed = figure.subplots(1, 2)
    usable = [row for row in rows if row["hbm_gib"]]
    for number, label in enumerate(sorted({_line(row) for row in usable})):
        found = [row for row in usable if _line(row) == label]
        found.sort(key=lambda row: int(row["pairs_per_chip"]))
        colour = f"C{number % 10}"
        pairs = [int(row["pairs_per_chip"]) for row in found]
        memory.plot(
            pairs, [float(row["hbm_gib"]) for row in found], "o-", color=colour, label=label
        )
        if found[0]["capacity_gib"]:
            memory.axhline(float(found[0]["capacity_gib"]), color=colour, linestyle="--")
        known = [row for row in found if row["verdict"] == "fits" and row["pairs_per_second_best"]]
        pairs = [int(row["pairs_per_chip"]) for row in known]
        ends = [[float(row[f"pairs_per_second_{e}"]) for row in known] for e in ("worst", "best")]
        speed.fill_between(pairs, *ends, color=colour, alpha=0.3)
        speed.plot(pairs, ends[0], "o-", color=colour, label=label)
    memory.set(title="peak memory of a chip, dashed: capacity", ylabel="GiB", ylim=(0, None))
    speed.set(title="estimate: nothing to everything overlaps", ylabel="pairs/s")
    for axis in (memory, speed):
        axis.set_xlabel("pairs per chip")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _line(row: dict[str, str]) -> str:
    """What the points of one line in the picture have in common."""
    slices = "" if row["slices"] == "1" else f"{row['slices']} slices of"
    words = Path(row["config"]).stem, slices, row["topology"], row["fields"]
    return " ".join(word for word in words if word)


def _key(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in KEY)


def _compile(point: dict[str, str], args: argparse.Namespace, fields: list[str]) -> dict[str, str]:
    """One point, compiled in a child process: libtpu and XLA keep what they once took."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "point.json"
        command = [sys.executable, "-m", "flip_jax.compile", "--json", str(out)]
        for name in ("config", "topology", "slices", "pairs_per_chip"):
            command += [f"--{name.replace('_', '-')}", point[name]]
        command += ["--pairs", str(args.pairs)]
        if args.efficiency is not None:
            command += ["--efficiency", str(args.efficiency)]
        child = subprocess.run([*command, *fields], capture_output=True, text=True, check=False)
        if not out.exists():
            last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
            return dict.fromkeys(COLUMNS, "") | point | {"verdict": ERROR, "message": last}
        return dict.fromkeys(COLUMNS, "") | point | _columns(json.loads(out.read_text()))


def _columns(values: dict[str, Any]) -> dict[str, str]:
    memory, estimate = values["memory"], values["estimate"]
    found = {
        "chips": values["chips"],
        "batch_size": values["config"]["data"]["batch_size"],
        "hbm_gib": _scaled(memory["total"], 2**30),
        "arguments_gib": _scaled(memory["arguments"], 2**30),
        "capacity_gib": _scaled(memory["capacity"], 2**30),
        "model_tflop": _scaled(values["model_flops"], 1e12),
        "dot_tflop": _scaled(values["dot_flops"], 1e12),
        "compile_seconds": _scaled(values["compile_seconds"], 1),
        "host_gib": _scaled(values["host_bytes"], 2**30),
        "verdict": values["verdict"],
    }
    if values["collectives"] is not None:
        found["sent_mb"] = _scaled(sum(c["sent_bytes"] for c in values["collectives"]), 1e6)
    if estimate is not None:
        for end in ("best", "worst"):
            found[f"step_seconds_{end}"] = _scaled(estimate["step"][end], 1)
            found[f"pairs_per_second_{end}"] = _scaled(estimate["pairs_per_second"][end], 1)
            found[f"chip_hours_{end}"] = _scaled(estimate["chip_hours"][end], 1)
    return {name: str(value) for name, value in found.items()}


def _scaled(value: float | None, unit: float) -> str:
    """Four digits."""
    if not value:
        return "" if value is None else "0"
    value /= unit
    return f"{value:.{max(3 - math.floor(math.log10(abs(value))), 0)}f}"


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    copy = path.with_suffix(".csv.new")
    with copy.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    copy.replace(path)
