"""The page of a suite: Markdown, HTML with its pictures inside, JSON and a PNG, of the same blocks.

A row per metric, a column per checkpoint, then random backbones and chance.
"""

from __future__ import annotations

import base64
import html
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flip_jax.downstream.intervals import Interval
from flip_jax.downstream.task_report import (
    Cell,
    Table,
    cell_text,
    provenance_lines,
    write_figure,
    write_text,
)

PAGE_FILES = ("comparison.html", "comparison.md", "comparison.json", "comparison.png")


@dataclass
class Entry:
    """A checkpoint and what its tasks gave.

    Attributes:
      label: its short name, and the folder of its reports.
      reports: task -> what `report.json` holds.
      left_out, failed: task -> why.
    """

    label: str
    reports: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


# Parts of the page.
@dataclass(frozen=True)
class _Heading:
    level: int
    text: str


@dataclass(frozen=True)
class _Lines:
    items: Sequence[str]  # Markdown with `code` only


@dataclass(frozen=True)
class _Code:
    text: str


@dataclass(frozen=True)
class _Picture:
    path: str  # from the folder of the page
    title: str
    folded: bool


_Block = _Heading | _Lines | _Code | _Picture | Table


def write_page(
    out: Path, entries: Sequence[Entry], names: Sequence[str], command: Sequence[str]
) -> None:
    """Writes `PAGE_FILES` into `out`, each whole or not at all.

    Args:
      entries: whose reports are in `out/LABEL/TASK`.
      names: of the tasks, in order.

    Raises:
      OSError: the folder cannot be written, or a picture not be read.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = {name: comparison(entries, name) for name in names}
    rows = {name: found for name, found in rows.items() if found}
    write_figure(out / "comparison.png", _figure(rows))
    blocks = list(_blocks(entries, rows, command))
    write_text(out / "comparison.md", "\n\n".join(_markdown(block) for block in blocks) + "\n")
    write_text(out / "comparison.html", _html(blocks, out))
    write_text(out / "comparison.json", _json(entries, rows, command))


def comparison(entries: Sequence[Entry], name: str) -> dict[str, dict[str, Any]]:
    """Of a task: label -> metric -> what the JSON holds; checkpoints, random backbones, chance."""
    found = {e.label: e.reports[name]["results"] for e in entries if name in e.reports}
    rows = {label: results["trained"] for label, results in found.items()}
    random: dict[str, Any] = {}
    for label, results in found.items():
        # Checkpoints of one shape have the same random backbone, hence the same numbers.
        if "random" in results and results["random"] not in random.values():
            random[label] = results["random"]
    for label, results in random.items():
        rows["random" if len(random) == 1 else f"random, shape of {label}"] = results
    for results in found.values():
        rows["chance"] = results["chance"]
    return rows


def _blocks(
    entries: Sequence[Entry], rows: Mapping[str, dict], command: Sequence[str]
) -> Iterator[_Block]:
    yield _Heading(1, "Comparison")
    yield _Code(shlex.join(command))
    for entry in entries:
        yield _Heading(2, f"Checkpoint {entry.label}")
        yield _Lines(list(_about(entry)))
    yield _Lines(
        [
            "brackets hold 95 % intervals from resampled groups of the test split; `random` is a "
            "random-initialised backbone of the same shape, heads trained as for the checkpoint"
        ]
    )
    yield _Picture("comparison.png", "all tasks", folded=False)
    for name, found in rows.items():
        own = [entry for entry in entries if name in entry.reports]
        yield _Heading(2, name)
        yield _Lines([own[0].reports[name]["units"], *_notes(own, name)])
        yield _table("Results", found)
        for column in dict.fromkeys(
            c for e in own for c in e.reports[name]["by"].get("trained", {})
        ):
            yield from _by_tables(own, name, column)
        for entry in own:
            path = f"{entry.label}/{name}/report.png"
            yield _Picture(path, f"{name}, {entry.label}", folded=True)


def _notes(entries: Sequence[Entry], name: str) -> Iterator[str]:
    """Lines about the protocol of a task; what is not said of all checkpoints, with whose it is."""
    notes = {entry.label: entry.reports[name]["notes"] for entry in entries}
    shared = set.intersection(*(set(lines) for lines in notes.values()))
    for label, lines in notes.items():
        yield from (f"{label}: {line}" for line in lines if line not in shared)
    yield from (line for line in notes[entries[0].label] if line in shared)


def _about(entry: Entry) -> Iterator[str]:
    if entry.reports:
        yield from provenance_lines(next(iter(entry.reports.values())))
    yield from (f"{name} is left out: {why}" for name, why in entry.left_out.items())
    yield from (f"{name} failed: {why}" for name, why in entry.failed.items())


def _table(title: str, rows: Mapping[str, Mapping[str, Any]], note: str = "") -> Table:
    """A row per metric, a column per row of results."""
    metrics = dict.fromkeys(metric for row in rows.values() for metric in row)
    lines = [[m, *(_number(row.get(m)) for row in rows.values())] for m in metrics]
    return Table(title, ["metric", *rows], lines, note)


def _by_tables(entries: Sequence[Entry], name: str, column: str) -> Iterator[Table]:
    for entry in entries:
        for label, found in entry.reports[name]["by"].items():
            if column not in found:
                continue
            parts = {
                f"{value} ({numbers['rows']:,})": {m: n for m, n in numbers.items() if m != "rows"}
                for value, numbers in found[column]["parts"].items()
            }
            if found[column]["gap"]:
                parts["gap"] = found[column]["gap"]
            whose = entry.label if label == "trained" else f"{label}, shape of {entry.label}"
            yield _table(f"By {column}, {whose}", parts)


def _number(stored: Any) -> Cell:
    """What a report's JSON holds of a number."""
    if isinstance(stored, Mapping):
        return Interval(*(math.nan if stored[n] is None else stored[n] for n in _ENDS))
    return math.nan if stored is None else stored


_ENDS = ("value", "low", "high")


def _json(entries: Sequence[Entry], rows: Mapping[str, dict], command: Sequence[str]) -> str:
    """The numbers of the page, and where the rest is."""
    values = {
        "command": shlex.join(command),
        "checkpoints": {
            entry.label: {
                "tasks": {
                    name: {
                        "report": f"{entry.label}/{name}/report.json",
                        **{part: report[part] for part in ("checkpoint", "data", "settings", "by")},
                    }
                    for name, report in entry.reports.items()
                },
                "left_out": entry.left_out,
                "failed": entry.failed,
            }
            for entry in entries
        },
        "results": rows,
    }
    return json.dumps(values, indent=1, allow_nan=False) + "\n"


def _markdown(block: _Block) -> str:
    match block:
        case _Heading(level, text):
            return f"{'#' * level} {text}"
        case _Lines(items):
            return "\n".join(f"* {item}" for item in items)
        case _Code(text):
            return f"```sh\n{text}\n```"
        case _Picture(path, title):
            return f"![{title}]({path.replace(' ', '%20')})"
    return block.markdown().replace("## ", "### ", 1)


_STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; margin: 0 0 1.5rem }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8884; text-align: right }
th:first-child, td:first-child { text-align: left }
td small { color: #888; white-space: nowrap }
.wide { overflow-x: auto }
img { max-width: 100%; background: white }
pre { overflow-x: auto; padding: .6rem; background: #8882 }
summary { cursor: pointer }
"""


def _html(blocks: Sequence[_Block], out: Path) -> str:
    body = "\n".join(_html_block(block, out) for block in blocks)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width">\n<title>Comparison</title>\n'
        f"<style>{_STYLE}</style>\n{body}\n</html>\n"
    )


def _html_block(block: _Block, out: Path) -> str:
    match block:
        case _Heading(level, text):
            return f"<h{level}>{_inline(text)}</h{level}>"
        case _Lines(items):
            return f"<ul>{''.join(f'<li>{_inline(item)}</li>' for item in items)}</ul>"
        case _Code(text):
            return f"<pre>{html.escape(text)}</pre>"
        case _Picture(path, title, folded):
            data = base64.b64encode((out / path).read_bytes()).decode()
            image = f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">'
            if not folded:
                return f"<p>{image}</p>"
            return f"<details><summary>{html.escape(title)}</summary>{image}</details>"
    head = "".join(f"<th>{html.escape(name)}</th>" for name in block.columns)
    lines = [f"<tr>{''.join(f'<td>{_html_cell(v)}</td>' for v in row)}</tr>" for row in block.rows]
    note = f"<p>{_inline(block.note)}</p>" if block.note else ""
    table = f"<table><tr>{head}</tr>{''.join(lines)}</table>"
    return f'<h3>{_inline(block.title)}</h3>{note}<div class="wide">{table}</div>'


def _html_cell(value: Cell) -> str:
    text, bracket, rest = html.escape(cell_text(value)).partition(" [")
    return f"{text} <small>[{rest}</small>" if bracket and isinstance(value, Interval) else text


def _inline(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _figure(tasks: Mapping[str, dict[str, dict[str, Any]]]) -> Figure:
    """Of each task, every metric in percent: dots with intervals, chance as a line."""
    metrics = {
        name: [m for m in next(iter(rows.values())) if "median rank" not in m]
        for name, rows in tasks.items()
    }
    heights = [1.2 + 0.32 * len(found) for found in metrics.values()] or [1.0]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    grid = {"height_ratios": heights}
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw=grid)[:, 0]
    for axis, (name, rows) in zip(axes, tasks.items(), strict=False):
        _plot_task(axis, rows, metrics[name])
        axis.set_title(name)
    return figure


def _plot_task(axis: Axes, rows: dict[str, dict[str, Any]], metrics: Sequence[str]) -> None:
    shown = [label for label in rows if label != "chance"]
    for number, label in enumerate(shown):
        found = [_number(rows[label].get(m)) for m in metrics]
        found = [n if isinstance(n, Interval) else Interval(n, n, n) for n in found]
        places = [m + 0.6 * ((number + 0.5) / len(shown) - 0.5) for m in range(len(metrics))]
        # A skewed interval may leave out its own number.
        low = [max(n.value - n.low, 0.0) for n in found]
        high = [max(n.high - n.value, 0.0) for n in found]
        mark = "s" if label.startswith("random") else "o"
        values = [n.value for n in found]
        axis.errorbar(values, places, xerr=[low, high], fmt=mark, markersize=4, label=label)
    for place, metric in enumerate(metrics):
        chance = _number(rows["chance"].get(metric))
        value = chance.value if isinstance(chance, Interval) else chance
        label = "chance" if place == 0 else None
        axis.plot([value, value], [place - 0.4, place + 0.4], color="0.5", label=label)
    axis.set_yticks(range(len(metrics)), metrics, fontsize=8)
    axis.set_ylim(len(metrics) - 0.5, -0.5)
    axis.set_xlim(left=0)
    axis.grid(alpha=0.3, axis="x")
    axis.legend(fontsize=8)
