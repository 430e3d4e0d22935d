"""What a task leaves behind: `report.json`, `report.md` and `report.png` in one folder.

The JSON holds every number with all it depends on: task, command, settings, versions, checkpoint
(path, step, digest of the weights), data (path, SHA-256 of the manifest, splits, records, groups).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import flip_jax
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import FaceData
from flip_jax.downstream.intervals import Breakdown, Interval

FILES = ("report.json", "report.md", "report.png")
Cell = str | int | float | Interval
_MOST_COLUMNS = 10


@dataclass(frozen=True)
class Table:
    """A table of the Markdown page. Numbers are printed with two places, NaN as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""

    def markdown(self) -> str:
        lines = [f"## {self.title}", ""]
        if self.note:
            lines += [self.note, ""]
        lines.append(_line(self.columns))
        lines.append("|" + "---|" * len(self.columns))
        lines += [_line([cell_text(value) for value in row]) for row in self.rows]
        return "\n".join(lines)

    def upright(self) -> Table:
        """With a row per column where there are more columns than fit beside each other."""
        if len(self.columns) - 1 <= _MOST_COLUMNS:
            return self
        first, *columns = zip(self.columns, *self.rows, strict=True)
        return dataclasses.replace(self, columns=[str(name) for name in first], rows=columns)


@dataclass(frozen=True)
class TaskReport:
    """The outcome of one task.

    Attributes:
      task: its name on the command line.
      results: row -> metric -> number. Rows are `trained`, `random` (a random-initialised backbone
        of the same shape) and `chance`; the metrics are what `suite` compares.
      units: what the numbers are and of what, in one line under the table.
      tables: of the page, after the results.
      breakdowns: row -> the results by the columns of `--by`.
      metrics: names of the numbers of a breakdown.
      details: further numbers for the JSON.
      notes: lines about the protocol.
      figure: the picture.
    """

    task: str
    results: Mapping[str, Mapping[str, Interval | float]]
    figure: Figure
    units: str = ""
    tables: Sequence[Table] = ()
    breakdowns: Mapping[str, Sequence[Breakdown]] = field(default_factory=dict)
    metrics: Sequence[str] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def all_tables(self) -> list[Table]:
        """Results first, then those of the task, then the breakdowns."""
        names = list(dict.fromkeys(name for row in self.results.values() for name in row))
        rows = [
            [label, *(row.get(name, math.nan) for name in names)]
            for label, row in self.results.items()
        ]
        found = [Table("Results", ["", *names], rows, self.units).upright(), *self.tables]
        for label, parts in self.breakdowns.items():
            found += [_breakdown_table(label, one, self.metrics) for one in parts]
        return found


def write_report(
    report: TaskReport,
    out: Path,
    *,
    command: Sequence[str],
    settings: Any,
    backbone: Backbone,
    data: FaceData,
) -> dict[str, Any]:
    """Writes the three files, each whole or not at all, and returns what the JSON holds.

    Args:
      command: the command line.
      settings: the task's dataclass.
      backbone, data: what it ran on.

    Raises:
      OSError: the folder cannot be written.
    """
    about = {
        "task": report.task,
        "command": shlex.join(command),
        "settings": dataclasses.asdict(settings),
        "versions": {"flip_jax": flip_jax.__version__, "jax": metadata.version("jax")},
        **_inputs(backbone, data),
    }
    numbers = {
        "units": report.units,
        "results": plain(report.results),
        "by": {
            label: {one.column: plain(one.to_dict(list(report.metrics))) for one in parts}
            for label, parts in report.breakdowns.items()
        },
        "details": plain(report.details),
        "notes": list(report.notes),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "report.json", json.dumps(about | numbers, indent=1, allow_nan=False) + "\n")
    write_text(out / "report.md", _page(report, about))
    write_figure(out / "report.png", report.figure)
    return about | numbers


def write_text(path: Path, text: str) -> None:
    """Writes a text file; it appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def write_figure(path: Path, figure: Figure) -> None:
    """Writes a PNG; it appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.replace(path)


def plain(value: Any) -> Any:
    """JSON types of nested dicts and lists of numbers and intervals; NaN and infinity are null."""
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if math.isfinite(value) else None
    return value.item() if isinstance(value, np.generic) else value


def _page(report: TaskReport, about: Mapping[str, Any]) -> str:
    lines = [
        f"# {report.task}",
        "",
        "```sh",
        about["command"],
        "```",
        "",
        *(f"* {line}" for line in provenance_lines(about)),
        *(f"* {note}" for note in report.notes),
        "",
        "Brackets hold 95 % intervals from resampled groups of the test split.",
        "",
    ]
    for table in report.all_tables():
        lines += [table.markdown(), ""]
    lines += [f"![{report.task}](report.png)", ""]
    return "\n".join(lines)


def _inputs(backbone: Backbone, data: FaceData) -> dict[str, Any]:
    return {
        "checkpoint": backbone.origin | {"dtype": backbone.dtype},
        "data": data.describe(),
    }


def provenance_lines(about: Mapping[str, Any]) -> list[str]:
    """What a report's JSON says of the weights and the data, in Markdown."""
    origin, data = about["checkpoint"], about["data"]
    splits = "; ".join(
        f"{s['split']}: {s['records']:,} pictures of {s['groups']:,} groups" for s in data["splits"]
    )
    return [
        f"checkpoint `{origin['checkpoint']}`, step {origin['step']}, weights "
        f"`{origin['digest'][:16]}`, computed in {origin['dtype']}",
        f"data `{data['path']}`, manifest `{data['manifest_sha256'][:16]}`; {splits}",
    ]


def _breakdown_table(label: str, found: Breakdown, metrics: Sequence[str]) -> Table:
    rows: list[list[Cell]] = [
        [value, count, *numbers] for value, (count, numbers) in found.parts.items()
    ]
    if found.gaps:
        rows.append(["gap", "", *found.gaps])
    title = f"By {found.column}, {label} backbone"
    return Table(title, [found.column, "pictures", *metrics], rows).upright()


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def cell_text(value: Cell) -> str:
    """As it stands in a table."""
    if isinstance(value, Interval):
        return str(value) if math.isfinite(value.value) else "-"
    if isinstance(value, float | np.floating):
        return f"{value:.2f}" if math.isfinite(value) else "-"
    return str(value)
