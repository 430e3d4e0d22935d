"""Sheets of faces: pictures of the data set itself, for the eyes of who made it."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from flip_jax.curate.quality.sample import Sampled
from flip_jax.data.records import RecordSource
from flip_jax.data.transforms import contain, decode_image

_COLUMNS = 8
_SIDE = 150  # pixels of a picture on a sheet
# Rows of the sheet by quality: percentiles of BRISQUE.
_QUANTILES = {"lowest": 0.0, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "highest": 1.0}


def of_sample(sources: dict[str, RecordSource], sampled: Sampled, count: int) -> Figure:
    """The first pictures of the sample, each with a caption."""
    places = sampled.places[:count]
    rows = -(-len(places) // _COLUMNS)
    height = 2.2 * rows + 0.4
    figure = Figure(figsize=(13, height))
    # By hand: a layout engine would make the pictures as narrow as the texts are wide.
    figure.subplots_adjust(0.005, 0, 0.995, 1 - 0.35 / height, wspace=0.06, hspace=0.02)
    title = f"{len(places)} pictures of the sample"
    figure.text(0.005, 1 - 0.1 / height, title, va="top", fontsize=11)
    axes = figure.subplots(rows, _COLUMNS, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (split, number) in zip(axes, places, strict=False):
        record = sources[split][number]
        _show(axis, record.image)
        axis.set_anchor("N")
        text = record.captions[0] if record.captions else "(no caption)"
        said = textwrap.fill(text, 32, max_lines=4, placeholder=" ...")
        axis.text(
            0.5, -0.03, said, transform=axis.transAxes, ha="center", va="top", fontsize=6,
            parse_math=False,
        )  # fmt: skip
    return figure


def by_brisque(sources: dict[str, RecordSource], sampled: Sampled) -> Figure | None:
    """Pictures from the lowest to the highest score; None where they do not fill two rows."""
    defined = np.flatnonzero(np.isfinite(sampled.brisque))
    if len(defined) < 2 * _COLUMNS:
        return None
    order = defined[np.argsort(sampled.brisque[defined], kind="stable")]
    quantiles = list(_QUANTILES.items())
    if len(order) < len(quantiles) * _COLUMNS:
        quantiles = [quantiles[0], quantiles[-1]]
    figure = Figure(figsize=(13, 1.85 * len(quantiles) + 0.4), layout="constrained")
    figure.suptitle(
        f"{len(order):,} sampled pictures by BRISQUE (lower is better)",
        x=0.01,
        ha="left",
        fontsize=11,
    )
    rows = figure.subplots(len(quantiles), _COLUMNS, squeeze=False)
    for axes, (name, quantile) in zip(rows, quantiles, strict=True):
        start = round(quantile * (len(order) - _COLUMNS))
        _row(axes, name, order[start : start + _COLUMNS], sources, sampled)
    return figure


def _row(
    axes: Sequence[Axes],
    name: str,
    chosen: np.ndarray,
    sources: dict[str, RecordSource],
    sampled: Sampled,
) -> None:
    for axis, index in zip(axes, chosen.tolist(), strict=True):
        split, number = sampled.places[index]
        _show(axis, sources[split][number].image)
        axis.set_title(f"{sampled.brisque[index]:.1f}", fontsize=8, pad=2)
    axes[0].set_axis_on()
    axes[0].set(xticks=[], yticks=[])
    axes[0].spines[:].set_visible(False)
    axes[0].set_ylabel(name, fontsize=10)


def _show(axis: Axes, data: bytes) -> None:
    """A picture in a square, smaller ones enlarged without smoothing."""
    picture = Image.fromarray(decode_image(data))
    way = Image.Resampling.NEAREST if max(picture.size) < _SIDE else Image.Resampling.LANCZOS
    picture = contain(picture, _SIDE, way)
    axis.imshow(np.asarray(ImageOps.pad(picture, (_SIDE, _SIDE), color="white")))
    axis.set_axis_off()
