"""The picture at the end of a run: loss curves and what the model finds for a few captions."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from flip_jax import distributed
from flip_jax.downstream.retrieval import SHOWN, Retrieval

QUERIES = 6
# What the plot of the losses shows, the first that there is on a scale of its own.
LOSSES = (
    ("loss_itc", "ITC"),
    ("loss_sigmoid", "sigmoid"),
    ("loss_itm", "ITM"),
    ("loss_mim", "MIM"),
    ("loss_caption", "caption"),
)
RIGHT, WRONG = "#1a9850", "#d0d0d0"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()]


def _curve(rows: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def _two_scales(
    axis: Axes, rows: list[dict], left: tuple[str, str], *right: tuple[str, str]
) -> None:
    """Curves, (metric, label) each, all but the first against an axis of their own."""
    other = axis.twinx()
    axis.plot(*_curve(rows, left[0]), color="tab:blue", label=left[1])
    for (metric, label), colour in zip(right, ("orange", "green", "red"), strict=False):
        other.plot(*_curve(rows, metric), color=f"tab:{colour}", label=label)
    axis.legend(handles=[*axis.lines, *other.lines], fontsize=7)


def _plot_curves(figure: SubFigure, rows: list[dict[str, float]]) -> None:
    losses, recalls, rates = figure.subplots(1, 3)
    parts = [(metric, label) for metric, label in LOSSES if any(metric in row for row in rows)]
    _two_scales(losses, rows, *(parts if len(parts) > 1 else [*parts, ("loss", "sum")]))
    losses.set_title("loss")
    for order in ("cosine", "reranked"):
        for direction, arrow in (("t2i", "text→image"), ("i2t", "image→text")):
            steps, values = _curve(rows, f"eval/{order}/{direction}/R@10")
            if steps:
                recalls.plot(steps, values, marker="o", label=f"{arrow}, {order}")
    recalls.set_title("R@10, evaluation split (%)")
    recalls.set_ylim(bottom=0)
    if recalls.lines:
        recalls.legend(fontsize=7)
    _two_scales(rates, rows, ("temperature", "temperature"), ("learning_rate", "learning rate"))
    rates.set_title("temperature and learning rate")
    for axis in (losses, recalls, rates):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)


def plot_queries(figure: SubFigure, retrieval: Retrieval, gallery: Any) -> None:
    """One row per caption: the text, its best images with the right one framed, the right one."""
    texts = len(retrieval.image_of)
    ranks = retrieval.ranks["reranked" if retrieval.k else "cosine"]["t2i"]
    queries = np.unique(np.linspace(0, texts - 1, QUERIES).astype(int))
    widths = [2.2] + [1] * (SHOWN + 1)
    axes = figure.subplots(
        len(queries), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths}
    )
    for row, text in zip(axes, queries, strict=True):
        for axis in row:
            axis.set_axis_off()
        caption = textwrap.fill(gallery.caption(text), 42, max_lines=8)
        row[0].text(
            0.0, 0.5, caption, va="center", fontsize=8, transform=row[0].transAxes, parse_math=False
        )
        right = int(retrieval.image_of[text])
        shown = [(f"#{n + 1}", int(i)) for n, i in enumerate(retrieval.top_images[text])]
        shown.append((f"right: #{ranks[text] + 1}", right))
        for axis, (title, image) in zip(row[1:], shown, strict=False):
            axis.imshow(gallery.thumbnail(image))
            axis.set_title(title, fontsize=8)
            axis.set_axis_on()
            axis.set(xticks=[], yticks=[])
            framed = image == right and axis is not row[-1]
            for spine in axis.spines.values():
                spine.set(color=RIGHT if framed else WRONG, linewidth=4 if framed else 1)


def _start(rows: list[dict[str, float]], retrieval: Retrieval) -> dict[str, float]:
    """The evaluation at step 0, if there is one of the same gallery."""
    wanted = {"images": retrieval.images, "texts": len(retrieval.image_of)}
    for row in rows:
        if row["step"] == 0 and all(row.get(f"eval/{n}") == v for n, v in wanted.items()):
            return {n.removeprefix("eval/"): v for n, v in row.items() if n != "step"}
    return {}


def write_results(workdir: Path, step: int, retrieval: Retrieval, gallery: Any) -> None:
    """Print the retrieval table; write `results.json` and `report.png` into the workdir.

    Only process 0 does.

    Args:
      workdir: of the run; its metrics.jsonl gives the curves and the numbers at step 0.
      step: of the model that was evaluated.
      retrieval: the final evaluation.
      gallery: what it was made on, see `flip_jax.data.gallery.Gallery`.
    """
    if not distributed.is_main():
        return
    path = workdir / "metrics.jsonl"
    rows = read_metrics(path) if path.exists() else []
    start = _start(rows, retrieval)
    print(retrieval.table(start))
    results = {
        "images": retrieval.images,
        "texts": len(retrieval.image_of),
        "captions_per_image": retrieval.captions,
        "rerank_k": retrieval.k,
        "chance": retrieval.chance(),
        "step": step,
        "start": start,
        "trained": retrieval.metrics(),
    }
    partial = workdir / "results.partial"
    partial.write_text(json.dumps(results, indent=1) + "\n")
    partial.rename(workdir / "results.json")
    write_picture(workdir / "report.png", rows, retrieval, gallery)
    print(f"wrote {workdir}/results.json, {workdir}/report.png")


def write_picture(
    path: Path, rows: list[dict[str, float]], retrieval: Retrieval, gallery: Any
) -> None:
    """Write the PNG; it appears whole or not at all.

    Args:
      path: file to write.
      rows: lines of metrics.jsonl.
      retrieval: the final evaluation.
      gallery: the pictures and captions it was made on, see `flip_jax.data.gallery.Gallery`.
    """
    figure = Figure(figsize=(13, 15), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 3.2])
    _plot_curves(top, rows)
    plot_queries(bottom, retrieval, gallery)
    bottom.suptitle(
        f"text → image, top {SHOWN} of {retrieval.images} pictures of the evaluation split; "
        "the right one is framed, and shown at the end"
    )
    partial = path.with_suffix(".partial")
    figure.savefig(partial, dpi=110, format="png")
    partial.rename(path)
