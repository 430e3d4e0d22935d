"""Pictures of parsing: overlays of masks, and F1 of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flip_jax.downstream.dense_training import Predict
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Interval
from flip_jax.downstream.parsing_scoring import Frame
from flip_jax.downstream.task_report import write_figure

OVERLAYS = ("overlays.png", "worst.png")
_SHOWN = 8  # pictures on each
_ACROSS = 2  # of them beside each other
_STRENGTH = 0.6  # of a class's colour over the picture
COLOURS = {"trained": "tab:blue", "random": "tab:orange", "chance": "0.6"}


def class_colours(count: int) -> np.ndarray:
    """float [K, 3] RGB in [0, 1], the same for a class number whatever the count; 0 is black."""
    wheel = np.concatenate([colormaps[name].colors for name in ("tab20", "tab20b", "tab20c")])
    order = np.concatenate([np.arange(0, len(wheel), 2), np.arange(1, len(wheel), 2)])
    return np.concatenate([np.zeros((1, 3)), wheel[order][np.arange(count - 1) % len(wheel)]])


def overlay(image: np.ndarray, mask: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """uint8 [H, W, 3] with the classes of uint8 [H, W] in colour; the background stays."""
    mixed = (1 - _STRENGTH) * image + _STRENGTH * 255 * colours[mask]
    return np.where(mask[..., None] > 0, mixed, image).astype(np.uint8)


def write_overlays(
    out: Path, frame: Frame, predict: Predict, faces: Faces, scores: np.ndarray
) -> None:
    """Writes `OVERLAYS`: pictures spread evenly over `faces`, and those of the lowest scores.

    Args:
      predict: what the net says.
      scores: float [N], of each picture in percent.

    Raises:
      OSError: the folder cannot be written.
    """
    count = min(_SHOWN, len(faces))
    spread = np.linspace(0, len(faces) - 1, count).round().astype(int)
    titles = "spread evenly over the test split", "the lowest F1 of the test split"
    out.mkdir(parents=True, exist_ok=True)
    for name, rows, title in zip(
        OVERLAYS, (spread, np.argsort(scores)[:count]), titles, strict=True
    ):
        figure = _figure(frame, predict, faces.take(rows), scores[rows], title)
        write_figure(out / name, figure)


def _figure(frame: Frame, predict: Predict, faces: Faces, scores: np.ndarray, title: str) -> Figure:
    lines = -(-len(faces) // _ACROSS)
    figure = Figure(figsize=(13, 2.3 * lines + 0.9), layout="constrained")
    axes = figure.subplots(lines, 3 * _ACROSS, squeeze=False)
    for axis in axes.ravel():
        axis.set_axis_off()
    colours, seen = class_colours(len(frame.classes)), set()
    cells = axes.reshape(lines * _ACROSS, 3)
    for cell, score, (picture, found) in zip(
        cells, scores, frame.parse(predict, faces), strict=False
    ):
        seen |= {*np.unique(picture.mask).tolist(), *np.unique(found).tolist()}
        cell[0].imshow(picture.image)
        for axis, mask, name in zip(
            cell[1:], (picture.mask, found), ("truth", f"found, F1 {score:.0f}"), strict=True
        ):
            axis.imshow(overlay(picture.image, mask, colours))
            axis.set_title(name, fontsize=8)
    handles = [Patch(color=colours[k], label=frame.classes[k]) for k in sorted(seen - {0})]
    figure.legend(handles=handles, loc="outside lower center", ncols=9, fontsize=8)
    figure.suptitle(f"{len(faces)} pictures, {title}", fontsize=10)
    return figure


def class_figure(
    classes: Sequence[str],
    each: Mapping[str, Sequence[Interval]],
    curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
) -> Figure:
    """F1 of each class, and of validation and test along the epochs.

    Args:
      classes: names without the background.
      each: row of the report -> number of each class.
      curves: row -> epochs, mean F1 on validation, on test.
    """
    figure = Figure(figsize=(13, 7.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1.5, 1])
    places, width = np.arange(len(classes)), 0.8 / len(each)
    for n, (label, found) in enumerate(each.items()):
        values = np.array([one.value for one in found])
        ends = np.array([(one.low, one.high) for one in found]).T
        top.bar(
            places + (n - (len(each) - 1) / 2) * width,
            values,
            width,
            yerr=np.abs(ends - values),
            color=COLOURS[label],
            error_kw={"lw": 0.8},
            label=label,
        )
    top.set_xticks(places, classes, rotation=60, ha="right", fontsize=8)
    top.set(title="F1 of each class (%)", ylim=(0, 100))
    for label, (epochs, val, test) in curves.items():
        bottom.plot(epochs, val, "o--", color=COLOURS[label], label=f"{label}, validation")
        bottom.plot(epochs, test, "o-", color=COLOURS[label], label=f"{label}, test")
    bottom.set(title="mean F1 (%)", xlabel="epoch")
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure
