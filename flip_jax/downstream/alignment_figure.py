"""Pictures of alignment: points on faces, curves of cumulated errors, errors of each point."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flip_jax.downstream.alignment_metrics import error_curve
from flip_jax.downstream.alignment_scoring import Frame, Truth
from flip_jax.downstream.dense_pictures import read_picture
from flip_jax.downstream.dense_training import TrainedDense
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.parsing_figure import COLOURS
from flip_jax.downstream.task_report import write_figure

OVERLAYS = ("overlays.png", "worst.png")
_SHOWN, _ACROSS = 12, 6  # faces on each, and in a row
_SIDE = 256  # pixels of a face that is shown
_TRUE, _FOUND = "lime", "red"
NAMES = {"chance": "mean shape"}


def write_overlays(
    out: Path, frame: Frame, faces: Faces, predicted: np.ndarray, truth: Truth, errors: np.ndarray
) -> None:
    """Writes `OVERLAYS`: faces spread evenly over `faces`, and those of the greatest errors.

    Args:
      predicted: [N, P, 2], pixels of the pictures.
      errors: float [N], not in percent.

    Raises:
      OSError: the folder cannot be written.
    """
    known = np.flatnonzero(np.isfinite(errors))
    count = min(_SHOWN, len(known))
    spread = known[np.linspace(0, len(known) - 1, count).round().astype(int)]
    worst = known[np.argsort(-errors[known])[:count]]
    out.mkdir(parents=True, exist_ok=True)
    for name, rows, title in zip(
        OVERLAYS,
        (spread, worst),
        ("spread evenly over the test split", "the greatest errors of the test split"),
        strict=True,
    ):
        figure = _overlay(frame, faces, predicted, truth, errors, rows)
        figure.suptitle(f"{len(rows)} faces, {title}; the number is the NME in percent")
        write_figure(out / name, figure)


def _overlay(
    frame: Frame,
    faces: Faces,
    predicted: np.ndarray,
    truth: Truth,
    errors: np.ndarray,
    rows: np.ndarray,
) -> Figure:
    lines = -(-len(rows) // _ACROSS)
    figure = Figure(figsize=(2.3 * _ACROSS, 2.5 * lines + 0.8), layout="constrained")
    axes = figure.subplots(lines, _ACROSS, squeeze=False).ravel()
    large = dataclasses.replace(frame, size=_SIDE)
    for axis in axes:
        axis.set_axis_off()
    for axis, row in zip(axes, rows, strict=False):
        picture = read_picture(faces, row)
        place = large.place(picture)
        axis.imshow(place.place_image(picture.image))
        known = truth.known[row]
        true, found = (place.forward(points[row]) for points in (truth.points, predicted))
        ends = np.stack([true[known], found[known]])
        axis.plot(*ends.transpose(2, 0, 1), color="yellow", linewidth=0.6)
        axis.plot(*true[known].T, ".", color=_TRUE, markersize=2.5)
        axis.plot(*found.T, ".", color=_FOUND, markersize=2.5)
        axis.set(xlim=(-0.5, _SIDE - 0.5), ylim=(_SIDE - 0.5, -0.5))
        axis.set_title(f"{100 * errors[row]:.1f}", fontsize=9)
    handles = [
        Line2D([], [], color=colour, marker=".", linestyle="", label=name)
        for colour, name in ((_TRUE, "truth"), (_FOUND, "found"))
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=2)
    return figure


def error_figure(
    kind: str,
    errors: Mapping[str, np.ndarray],
    each: Mapping[str, np.ndarray],
    trained: Mapping[str, TrainedDense],
) -> Figure:
    """Args:
    kind: what errors are divided by.
    errors: row of the report -> error of each test face, not in percent.
    each: row -> mean error of each point, the same.
    trained: row -> how the training went.
    """
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplot_mosaic(
        [["curve", "epochs"], ["points", "points"]], height_ratios=[1.3, 1]
    )
    curve, epochs, bottom = axes["curve"], axes["epochs"], axes["points"]
    widest = max(float(np.nanpercentile(found, 95)) for found in errors.values())
    for label, found in errors.items():
        x, share = error_curve(found, widest)
        style = {"color": COLOURS[label], "label": NAMES.get(label, label)}
        curve.step(100 * x, 100 * share, where="post", **style)
        bottom.plot(100 * each[label], marker=".", linewidth=0.8, **style)
    curve.set(title="faces with at most this error (%)", xlabel=f"NME {kind} (%)", ylim=(0, 100))
    for label, run in trained.items():
        for line, scores, name in (("--", run.val, "validation"), ("-", run.test, "test")):
            style = {"color": COLOURS[label], "label": f"{label}, {name}"}
            epochs.plot(run.epochs, -scores, line, marker=".", **style)
    epochs.set(title=f"NME {kind} (%)", xlabel="epoch")
    epochs.set_ylim(bottom=0)
    bottom.set(title=f"mean error of each point, NME {kind} (%)", xlabel="point")
    bottom.set_ylim(bottom=0)
    for axis in (curve, epochs, bottom):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
