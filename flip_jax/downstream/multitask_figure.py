"""Pictures of the multi-task head: what it reads in faces, and its numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.downstream.dense_pictures import DensePicture
from flip_jax.downstream.dense_training import Predict
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Interval
from flip_jax.downstream.multitask_scoring import Frame, Reading
from flip_jax.downstream.parsing_figure import COLOURS, class_colours, overlay
from flip_jax.downstream.task_report import write_figure

OVERLAY = "overlays.png"
_SHOWN, _ACROSS = 8, 4  # faces, and in a row
_NAMED = 5  # attributes under each


def write_overlay(out: Path, frame: Frame, predict: Predict, faces: Faces) -> None:
    """Writes `OVERLAY`: pictures spread evenly over `faces`, with all that is found in them.

    Raises:
      OSError: the folder cannot be written.
    """
    count = min(_SHOWN, len(faces))
    rows = np.linspace(0, len(faces) - 1, count).round().astype(int)
    lines = -(-count // _ACROSS)
    figure = Figure(figsize=(3.2 * _ACROSS, 4.1 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, _ACROSS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, pair in zip(axes, frame.read(predict, faces.take(rows)), strict=False):
        _face(axis, *pair, class_colours(len(frame.classes)))
    figure.suptitle(f"{count} pictures, spread evenly over the test split; surest attributes first")
    out.mkdir(parents=True, exist_ok=True)
    write_figure(out / OVERLAY, figure)


def _face(axis: Axes, picture: DensePicture, found: Reading, colours: np.ndarray) -> None:
    """Classes in colour, points in white; an attribute that is not labelled so is in brackets."""
    height, width = picture.shape
    axis.imshow(overlay(picture.image, found.mask, colours))
    axis.plot(*found.points.T, ".", color="white", markersize=2)
    axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    sure = [k for k in np.argsort(-found.attributes)[:_NAMED] if found.attributes[k] > 0.5]
    labelled = picture.attributes == 1
    names = [ATTRIBUTES[k] if labelled[k] else f"({ATTRIBUTES[k]})" for k in sure]
    axis.set_title("\n".join(name.replace("_", " ") for name in names), fontsize=7)


def metric_figure(
    main: Sequence[str],
    results: Mapping[str, Mapping[str, Interval]],
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Figure:
    """One number of each output, and what the epoch is chosen by along the training.

    Args:
      main: metrics; results: row of the report -> metric -> number.
      curves: row -> epochs, score on validation, on test.
    """
    figure = Figure(figsize=(13, 4.5), layout="constrained")
    *bars, curve = figure.subplots(1, len(main) + 1)
    for axis, metric in zip(bars, main, strict=True):
        for place, (label, named) in enumerate(results.items()):
            one = named[metric]
            ends = [[one.value - one.low], [one.high - one.value]]
            axis.bar(place, one.value, 0.7, yerr=np.abs(ends), color=COLOURS[label])
        axis.set_xticks(range(len(results)), results)
        axis.set_title(f"{metric} (%)")
    for label, (epochs, val, test) in curves.items():
        curve.plot(epochs, val, "o--", color=COLOURS[label], label=f"{label}, validation")
        curve.plot(epochs, test, "o-", color=COLOURS[label], label=f"{label}, test")
    curve.set(title="mean of F1, AP and 100 - NME", xlabel="epoch")
    curve.legend(fontsize=8)
    for axis in (*bars, curve):
        axis.grid(alpha=0.3)
    return figure
