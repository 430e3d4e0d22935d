"""The figures of a report, drawn from its numbers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from flip_jax.curate.quality import paper
from flip_jax.curate.quality.facts import KINDS, Facts
from flip_jax.curate.quality.numbers import PERCENTILES

_BLUE, _ORANGE, _GREEN, _GREY, _DARK = "#3b6ea5", "#d9822b", "#4c956c", "#cfd4da", "#444444"
_DPI = 110
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_LOG_FROM = 10  # x-axes are logarithmic where the range is wider than this


def save(figure: Figure, path: Path) -> None:
    """Writes a PNG; the same figure gives the same bytes with the same matplotlib."""
    figure.savefig(path, dpi=_DPI, format="png", metadata={"Software": None})


def draw_all(facts: Facts, folder: Path) -> list[str]:
    """Draws what there are numbers for; returns the names of the files, in order."""
    drawers: list[tuple[str, bool, Callable[[Facts], Figure]]] = [
        ("resolution", True, _resolution),
        ("quality", facts["quality"]["brisque"] is not None, _quality),
        ("captions", facts["captions"]["count"] > 0, _captions),
        ("attributes", True, _attributes),
        ("balance", True, _balance),
        ("groups", True, _groups),
        ("stages", facts["stages"] is not None, _stages),
    ]
    names = []
    for name, wanted, draw in drawers:
        if wanted:
            save(draw(facts), folder / f"{name}.png")
            names.append(f"{name}.png")
    return names


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _plain(axis: Axes, title: str, xlabel: str = "", ylabel: str = "") -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", alpha=0.25)
    axis.set_axisbelow(True)


def _percent(share: float, _: int = 0) -> str:
    return f"{100 * share:.3g} %" if share <= 1 else ""


def _legend(axis: Axes, place: str = "best", columns: int = 1) -> None:
    axis.legend(fontsize=8, loc=place, ncols=columns, edgecolor="none", framealpha=0.85)


def _marker(axis: Axes, x: float, label: str, color: str = _DARK, style: str = "--") -> None:
    axis.axvline(x, color=color, linestyle=style, linewidth=1.2, label=label)


def _histogram(axis: Axes, edges: np.ndarray, counts: np.ndarray) -> None:
    """Shares of the whole, as bars between the edges."""
    edges, counts = np.asarray(edges, float), np.asarray(counts, float)
    shares = counts / max(counts.sum(), 1)
    axis.bar(
        edges[:-1], shares, np.diff(edges), align="edge", color=_BLUE, edgecolor="white", lw=0.4
    )
    axis.set_ylim(0, 1.35 * shares.max())  # room for a legend
    axis.yaxis.set_major_formatter(_percent)


def _resolution(facts: Facts) -> Figure:
    pictures = facts["pictures"]
    figure = _figure(10, 3.8)
    axis, other = figure.subplots(1, 2)
    edges = np.array(pictures["shorter_side_histogram"]["edges"])
    counts = np.array(pictures["shorter_side_histogram"]["counts"])
    # Sides below the least edge are in no bar: of tiny pictures there is none.
    some = np.flatnonzero(counts) if counts.any() else np.array([0])
    first, last = max(some[0] - 2, 0), min(some[-1] + 3, len(counts))
    _histogram(axis, edges[first : last + 1], counts[first:last])
    spread = pictures["shorter_side"]
    _plain(axis, "Shorter side of the pictures", "pixels", "pictures")
    _marker(axis, spread["p50"], f"median {spread['p50']} px", _ORANGE, "-")
    _marker(axis, paper.MIN_SIDE, f"FaceCaption-15M keeps > {paper.MIN_SIDE} px")
    _marker(axis, paper.MEAN_SIDE, f"FaceCaption-15M, mean {paper.MEAN_SIDE} px", style=":")
    _legend(axis)
    if edges[last] > _LOG_FROM * max(edges[first], 1):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(ScalarFormatter())
    for name, color, style in (("width", _BLUE, "-o"), ("height", _ORANGE, "--s")):
        values = [pictures[name][f"p{percent}"] for percent in PERCENTILES]
        label = f"{name}, mean {pictures[name]['mean']:.0f} px"
        other.plot(PERCENTILES, values, style, color=color, markersize=4, label=label)
    _plain(other, "Width and height", "percentile of the pictures", "pixels")
    other.set_ylim(0, 1.2 * max(pictures[name]["p99"] for name in ("width", "height")))
    _legend(other)
    return figure


def _quality(facts: Facts) -> Figure:
    quality = facts["quality"]
    measured = [
        ("brisque", "BRISQUE (lower is better)", "BRISQUE", paper.BRISQUE_MODE),
        ("clip_iqa", "CLIP-IQA type (higher is better)", "score", paper.CLIP_IQA_MODE),
    ]
    measured = [row for row in measured if quality[row[0]] is not None]
    figure = _figure(5.2 * len(measured), 3.8)
    for axis, (name, title, label, mode) in zip(
        figure.subplots(1, len(measured), squeeze=False)[0], measured, strict=True
    ):
        found = quality[name]
        edges, counts = (np.array(found["histogram"][each]) for each in ("edges", "counts"))
        some = np.flatnonzero(counts)
        # All there is, and what it is compared with.
        first, last = min(edges[some[0]], mode), max(edges[some[-1] + 1], mode)
        shown = slice(*np.searchsorted(edges, (first, last), "left"))
        _histogram(axis, edges[shown.start : shown.stop + 1], counts[shown])
        _plain(axis, title, label, f"of {quality['sampled']:,} sampled pictures")
        _marker(axis, found["p50"], f"median {found['p50']:.3g}", _ORANGE, "-")
        _marker(axis, mode, f"FaceCaption-15M, mode ~{mode:g}")
        _legend(axis)
    return figure


def _captions(facts: Facts) -> Figure:
    captions = facts["captions"]
    figure = _figure(13, 3.8)
    lengths, grams, each = figure.subplots(1, 3, width_ratios=[1.2, 1.2, 0.9])
    counts = captions["words_histogram"]
    _histogram(lengths, np.arange(len(counts) + 1) - 0.5, counts)
    _plain(lengths, "Words per caption", "words", "captions")
    mean = captions["words_per_caption"]["mean"]
    _marker(lengths, mean, f"mean {mean:.1f}", _ORANGE, "-")
    _marker(lengths, paper.MEAN_WORDS, f"FaceCaption-15M, mean {paper.MEAN_WORDS}")
    _legend(lengths)
    curve = captions["distinct_4grams"]
    grams.plot([0, *curve["by_share_of_data"]], [0, *curve["count"]], marker="o", color=_BLUE)
    grams.xaxis.set_major_formatter(_percent)
    grams.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    grams.set_ylim(0, 1.15 * curve["count"][-1] + 1)
    _plain(grams, "Distinct 4-grams", "share of the pictures")
    last = curve["count"][-1]
    grams.text(1, 1.03 * last, f"{last:,}", ha="right", va="bottom", fontsize=9, color=_BLUE)
    counts = captions["per_picture_histogram"]
    _histogram(each, np.arange(len(counts) + 1) - 0.5, counts)
    _plain(each, "Captions per picture", "captions", "pictures")
    each.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _attributes(facts: Facts) -> Figure:
    attributes = facts["labels"]["attributes"]
    names = [name for kind in KINDS.values() for name in kind]
    figure = _figure(10, 9.5)
    axis = figure.subplots()
    total = max(facts["pictures"]["count"], 1)
    gaps = np.cumsum([0.8 * (n > 0) for n in range(len(KINDS))])
    rows = np.array([n + gaps[kind] for n, kind in enumerate(_kind_of_each())])
    left = np.zeros(len(names))
    for what, color in (("present", _BLUE), ("absent", _GREY), ("unknown", "white")):
        shares = np.array([attributes[name][what] for name in names]) / total
        axis.barh(rows, shares, left=left, color=color, edgecolor="#9aa0a6", lw=0.5, label=what)
        left += shares
    for row, name in zip(rows, names, strict=True):
        said = f"{100 * attributes[name]['present'] / total:.1f} %"
        axis.text(1.01, row, said, va="center", fontsize=8)
    axis.set_yticks(rows, [name.replace("_", " ") for name in names], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.margins(y=0.01)
    axis.xaxis.set_major_formatter(_percent)
    _plain(axis, "Labels", "pictures; at the right: present, and each kind's share of all present")
    axis.grid(False)
    axis.legend(ncols=3, fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1))
    _name_kinds(axis, rows, facts["labels"]["kinds"])
    return figure


def _kind_of_each() -> list[int]:
    return [place for place, names in enumerate(KINDS.values()) for _ in names]


def _name_kinds(axis: Axes, rows: np.ndarray, shares: dict[str, float]) -> None:
    kinds = np.array(_kind_of_each())
    for place, kind in enumerate(KINDS):
        middle = rows[kinds == place].mean()
        said = f"{kind} {_percent(round(shares[kind], 2))}"
        axis.text(1.09, middle, said, rotation=270, va="center", fontsize=8, color=_DARK)


def _balance(facts: Facts) -> Figure:
    cells = facts["balance"]
    least = facts["settings"]["min_share"]
    figure = _figure(8.5, 0.36 * len(cells) + 1.4)
    axis = figure.subplots()
    rows = np.array([row + 0.5 * _table(cells, row) for row in range(len(cells))])
    shares = np.array([cell["share"] or 0 for cell in cells])
    few = np.array([cell["share"] is not None and cell["share"] < least for cell in cells])
    axis.barh(rows, shares, color=np.where(few, _ORANGE, _BLUE))
    for row, cell in zip(rows, cells, strict=True):
        text, end = "not known", cell["share"] or 0
        if cell["share"] is not None:
            text = f"{100 * end:.1f} %  ({cell['pictures']:,})"
        axis.text(end + 0.01, row, text, va="center", fontsize=8, bbox=_ON_WHITE)
    axis.set_yticks(rows, [cell["who"] for cell in cells], fontsize=9)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.16)
    axis.xaxis.set_major_formatter(_percent)
    axis.set_xticks(np.arange(0, 1.01, 0.2))
    _plain(axis, "Who is in the pictures, by their labels", "of the pictures with the labels known")
    axis.grid(False)
    _marker(axis, least, f"{_percent(least)}: fewer is a warning")
    _legend(axis, "lower right")
    return figure


def _table(cells: list[Facts], row: int) -> int:
    """The number of its block of cells, which share labels; blocks are drawn apart."""
    names = [tuple(cell["labels"]) for cell in cells[: row + 1]]
    return sum(a != b for a, b in pairwise(names))


def _groups(facts: Facts) -> Figure:
    sizes = facts["groups"]["sizes"]
    figure = _figure(8.5, 3.6)
    axis = figure.subplots()
    places = np.arange(len(sizes))
    for offset, what, color in ((-0.2, "groups", _BLUE), (0.2, "pictures", _ORANGE)):
        counts = np.array([row[what] for row in sizes], float)
        shares = counts / max(counts.sum(), 1)
        bars = axis.bar(places + offset, shares, 0.38, color=color, label=what)
        axis.bar_label(bars, [f"{int(count):,}" for count in counts], fontsize=7, padding=1)
    labels = [
        f"{row['least']}"
        if row["least"] == row["greatest"]
        else f"{row['least']}-{row['greatest']}"
        for row in sizes
    ]
    axis.set_xticks(places, labels)
    axis.yaxis.set_major_formatter(_percent)
    _plain(axis, "Groups (persons) by their pictures", "pictures in the group", "share")
    axis.margins(y=0.12)
    _legend(axis)
    return figure


def _stages(facts: Facts) -> Figure:
    stages = [stage for stage in facts["stages"] if stage["went_in"]]
    figure = _figure(10, 0.5 * len(stages) + 1.3)
    axis = figure.subplots()
    rows = np.arange(len(stages))
    out = np.array([stage["went_out"] for stage in stages])
    lost = np.array([sum(stage["dropped"].values()) for stage in stages])
    axis.barh(rows, out, color=_BLUE, label="went on")
    axis.barh(rows, lost, left=out, color=_ORANGE, label="dropped")
    for row, stage in zip(rows, stages, strict=True):
        reasons = sorted(stage["dropped"].items(), key=lambda item: (-item[1], item[0]))
        said = ", ".join(f"{count:,} {reason}" for reason, count in reasons[:3] if count)
        text = f"{stage['went_out']:,}" + (f"; dropped: {said}" if said else "")
        end = out[row] + lost[row] + 0.01 * (out + lost).max()
        axis.text(end, row, text, va="center", fontsize=8)
    axis.set_xlim(0, 1.65 * (out + lost).max())
    axis.set_yticks(rows, [stage["name"] for stage in stages])
    axis.invert_yaxis()
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    _plain(axis, "What became of the input, stage by stage")
    axis.grid(False)
    _legend(axis, "lower right", 2)
    return figure
