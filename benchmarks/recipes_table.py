"""What the runs of `recipes.py` found, as one table."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

TIMES = "times.json"
ORDERS = ("cosine", "reranked")
# Column -> (task, metric of its report). Names are tried in turn.
TASK_METRICS = {
    "probe AP": ("attributes", ("AP",)),
    "probe accuracy": ("attributes", ("accuracy",)),
    "parsing F1": ("parsing", ("F1",)),
    "alignment NME": ("alignment", ("NME ocular", "NME box")),
}
# Metric -> heading.
COLUMNS = {
    "recall cosine": "mean recall, cosine",
    "recall reranked": "mean recall, re-ranked",
    **{name: name for name in TASK_METRICS},
    "same group": "same-group candidates",
}


def collect(out: Path, sets: Sequence[str], changes: Mapping[str, str]) -> dict[str, Any]:
    """Every number of every run that is finished, and the rows of the table.

    Args:
      out: the folder of `recipes.py`; sets: names of data sets; changes: recipe -> what it changes.
    """
    times = out / TIMES
    seconds = json.loads(times.read_text())["seconds"] if times.exists() else {}
    runs = {name: {row: _runs(out / name, row) for row in changes} for name in sets}
    rows = []
    for name in sets:
        reference = runs[name]["reference"]
        rows += _baselines(out / name, name, reference)
        for row, change in changes.items():
            if runs[name][row]:
                summary = _summary(runs[name][row], reference if row != "reference" else {})
                step = statistics.median(seconds[row]) if row in seconds else None
                base = seconds.get("reference")
                ratio = step / statistics.median(base) if step and base else None
                about = {"data": name, "recipe": row, "change": change}
                rows.append(about | summary | {"step_seconds": step, "step_ratio": ratio})
    return {"rows": rows, "runs": runs}


def _runs(folder: Path, row: str) -> dict[str, dict[str, float]]:
    """Seed -> metric -> number, of the runs that are finished."""
    found = {}
    for path in sorted(folder.glob(f"{row}-*/results.json")):
        found[path.parent.name.removeprefix(f"{row}-")] = _numbers(path.parent)
    return found


def _numbers(workdir: Path) -> dict[str, float]:
    trained = json.loads((workdir / "results.json").read_text())["trained"]
    numbers = {f"recall {order}": _mean_recall(trained, order) for order in ORDERS}
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    same = [line["same_group"] for line in map(json.loads, lines) if "same_group" in line]
    numbers["same group"] = statistics.mean(same)
    for name, value in _task_numbers(workdir, "trained").items():
        numbers[name] = value
    return {name: value for name, value in numbers.items() if value is not None}


def _task_numbers(workdir: Path, backbone: str) -> dict[str, float]:
    found = {}
    for name, (task, metrics) in TASK_METRICS.items():
        # Those of --dense first: they were asked for besides.
        for folder in ("tasks-dense-*", "tasks"):
            for path in sorted(workdir.glob(f"{folder}/*/{task}/report.json")):
                result = json.loads(path.read_text())["results"].get(backbone, {})
                for metric in metrics:
                    if name not in found and metric in result:
                        number = result[metric]
                        found[name] = number["value"] if isinstance(number, dict) else number
    return found


def _mean_recall(values: Mapping[str, float], order: str) -> float | None:
    """Mean of R@1/5/10 of both directions; `order` "" for chance, which has no order."""
    prefix = f"{order}/" if order else ""
    names = [f"{prefix}{way}/R@{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)]
    return statistics.mean(values[n] for n in names) if names[0] in values else None


def _baselines(
    folder: Path, name: str, reference: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """Rows `chance` and `before training`, a random backbone of the same shape."""
    if not reference:
        return []
    workdir = folder / f"reference-{min(reference)}"
    results = json.loads((workdir / "results.json").read_text())
    start = {f"recall {order}": _mean_recall(results["start"], order) for order in ORDERS}
    found = {
        "chance": dict.fromkeys(start, _mean_recall(results["chance"], ""))
        | _task_numbers(workdir, "chance"),
        "before training": start | _task_numbers(workdir, "random"),
    }
    return [
        {
            "data": name,
            "recipe": row,
            "change": "",
            "seeds": 0,
            "metrics": {n: {"mean": v} for n, v in numbers.items() if v is not None},
        }
        for row, numbers in found.items()
    ]


def _summary(
    runs: Mapping[str, Mapping[str, float]], reference: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """Mean over seeds and standard deviation; difference from the reference, seed by seed."""
    metrics = {}
    for name in dict.fromkeys(name for run in runs.values() for name in run):
        values = [run[name] for run in runs.values() if name in run]
        metrics[name] = {
            "mean": statistics.mean(values),
            "deviation": statistics.stdev(values) if len(values) > 1 else None,
            "seeds": len(values),
        }
        pairs = [
            run[name] - reference[seed][name]
            for seed, run in runs.items()
            if name in run and name in reference.get(seed, {})
        ]
        if pairs:
            metrics[name]["difference"] = statistics.mean(pairs)
            metrics[name]["half_width"] = half_width(pairs)
    return {"seeds": len(runs), "metrics": metrics}


def half_width(values: Sequence[float]) -> float | None:
    """Of the 95 % interval of a mean, by Student's t; None for a single value."""
    if len(values) < 2:
        return None
    t = scipy.stats.t.ppf(0.975, len(values) - 1)
    return t * statistics.stdev(values) / math.sqrt(len(values))


def markdown(found: Mapping[str, Any]) -> str:
    """The table as it stands on a page; a column that no run has is left out."""
    rows = found["rows"]
    columns = [n for n in COLUMNS if any(n in row["metrics"] for row in rows)]
    timed = any(row.get("step_ratio") for row in rows)
    head = ["data", "recipe", "seeds", *(COLUMNS[name] for name in columns)]
    lines = [head + ["step time"] * timed]
    lines += [_cells(row, columns, timed) for row in rows]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Mapping[str, Any], columns: Sequence[str], timed: bool) -> list[str]:
    cells = [row["data"], row["recipe"], str(row["seeds"] or "")]
    cells += [_cell(row["metrics"].get(name)) for name in columns]
    ratio = row.get("step_ratio")
    return cells + [f"{ratio:.2f}" if ratio else ""] * timed


def _cell(number: Mapping[str, Any] | None) -> str:
    """Mean ± standard deviation over seeds, (difference ± half of its 95 % interval)."""
    if number is None:
        return ""
    text = f"{number['mean']:.2f}"
    if number.get("deviation") is not None:
        text += f" ± {number['deviation']:.2f}"
    if number.get("difference") is not None:
        width = number["half_width"]
        sure = "" if width is None else f" ± {width:.2f}"
        text += f" ({number['difference']:+.2f}{sure})"
    return text
