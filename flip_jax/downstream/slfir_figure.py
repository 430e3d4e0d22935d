"""The picture of SLFIR: how early photos are found, and what a few sketches find as they grow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from flip_jax.report import RIGHT, WRONG

SHOWN = 5  # photos per stage of a sketch
SHARES = (0.1, 0.25, 0.5, 0.75, 1.0)  # stages of a sketch
_COLOURS = {"sketch": "tab:blue", "caption": "tab:orange", "both": "tab:green"}
_NAMES = {"sketch": "sketch", "caption": "caption", "both": "sketch + caption"}
_STYLES = {"trained": "-", "frozen": ":", "random": "--"}
_STYLE_NAMES = {
    "trained": "trained heads",
    "frozen": "frozen embeddings",
    "random": "random encoders, trained heads",
}


@dataclass(frozen=True)
class Panel:
    """Curves of one kind of pairs.

    Attributes:
      title: whose sketch finds the photo.
      curves: (style, query) -> see `slfir_metrics.curves`; styles are `trained`, `frozen` and
        `random`.
      chance: expected percentile and 1 / rank of a random order.
    """

    title: str
    curves: Mapping[tuple[str, str], Mapping[str, np.ndarray]]
    chance: tuple[float, float]


@dataclass(frozen=True)
class Strip:
    """A sketch at the stages `SHARES` and what it finds.

    Attributes:
      stages: uint8 [stages, S, S, 3].
      top: uint8 [stages, shown, S, S, 3], best photos.
      right: bool [stages, shown], which of them is the right one.
      ranks: of the right photo at each stage, 1 = first.
      photo: uint8 [S, S, 3], the right one.
    """

    stages: np.ndarray
    top: np.ndarray
    right: np.ndarray
    ranks: Sequence[int]
    photo: np.ndarray


def stage_steps(steps: int) -> list[int]:
    """The steps, from 1, that show the `SHARES` of a sketch of `steps` steps."""
    return [max(1, round(share * steps)) for share in SHARES]


def draw_figure(panels: Sequence[Panel], strips: Sequence[Strip], gallery: int) -> Figure:
    """Args: panels: one or two; strips: of the first panel; gallery: its photos."""
    figure = Figure(figsize=(13.5, 9.4), layout="constrained")
    figure.get_layout_engine().set(h_pad=0.04, w_pad=0.02, hspace=0, wspace=0)
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.3])
    for part, panel in zip(np.atleast_1d(top.subfigures(1, len(panels))), panels, strict=True):
        _draw_panel(part, panel)
    styles = list(dict.fromkeys(style for panel in panels for style, _ in panel.curves))
    handles = [Line2D([], [], color=c, label=_NAMES[name]) for name, c in _COLOURS.items()]
    handles += [
        Line2D([], [], color="0.3", linestyle=_STYLES[style], label=_STYLE_NAMES[style])
        for style in styles
    ]
    handles.append(Line2D([], [], color="0.7", linewidth=3, label="chance"))
    top.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8)
    bottom.suptitle(
        f"{panels[0].title.capitalize()} at {len(SHARES)} stages and the best {SHOWN} of {gallery} "
        "photos, by the trained heads; # is the rank of the photo sought, which is framed",
        fontsize=10,
    )
    for part, strip in zip(np.atleast_1d(bottom.subfigures(1, len(strips))), strips, strict=True):
        _draw_strip(part, strip)
    return figure


def _draw_panel(part: SubFigure, panel: Panel) -> None:
    part.suptitle(panel.title, fontsize=10)
    axes: Sequence[Axes] = part.subplots(1, 2)
    what = (("percentile", "rank percentile (%)"), ("reciprocal", "1 / rank"))
    for axis, (name, label), chance in zip(axes, what, panel.chance, strict=True):
        axis.axhline(chance, color="0.7", linewidth=3)
        for (style, query), curve in panel.curves.items():
            axis.plot(
                100 * curve["share"], curve[name], _STYLES[style], color=_COLOURS[query], lw=1.6
            )
        axis.set_xlabel("share of the sketch that is drawn (%)")
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
    axes[0].set_ylim(top=101)
    axes[1].set_ylim(bottom=0)


def _draw_strip(part: SubFigure, strip: Strip) -> None:
    shown = strip.top.shape[1]
    axes = part.subplots(len(SHARES) + 1, shown + 1, squeeze=False)
    for axis in axes.ravel():
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set(color=WRONG, linewidth=0.6)
    for axis in axes[0, 1:]:
        axis.set_axis_off()
    axes[0, 0].imshow(strip.photo)
    _frame(axes[0, 0])
    axes[0, 0].set_ylabel("sought", fontsize=8, rotation=0, ha="right", va="center")
    for row, share, sketch, photos, right, rank in zip(
        axes[1:], SHARES, strip.stages, strip.top, strip.right, strip.ranks, strict=True
    ):
        row[0].imshow(sketch)
        row[0].set_ylabel(f"{share:.0%}\n#{rank}", fontsize=8, rotation=0, ha="right", va="center")
        for axis, photo, is_right in zip(row[1:], photos, right, strict=True):
            axis.imshow(photo)
            if is_right:
                _frame(axis)


def _frame(axis: Axes) -> None:
    for spine in axis.spines.values():
        spine.set(color=RIGHT, linewidth=3)
