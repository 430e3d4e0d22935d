"""The report of SLFIR: numbers with intervals, curves, and what a few sketches find."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.intervals import Breakdown, Interval, break_down, mean_of, measure
from flip_jax.downstream.slfir_figure import Panel, Strip, draw_figure, stage_steps
from flip_jax.downstream.slfir_heads import TrainedHeads
from flip_jax.downstream.slfir_metrics import METRICS, chance, curves, per_sketch
from flip_jax.downstream.slfir_sketches import SketchFaces
from flip_jax.downstream.task_report import Table, TaskReport

if TYPE_CHECKING:
    from flip_jax.downstream.slfir import Settings

QUERIES = ("sketch", "caption", "both")
TITLES = {
    "photo": "a sketch of the photo itself",
    "other": "a sketch of another picture of the person",
}
_PREFIX = {"photo": "", "other": "other: "}  # of a metric
_HEADLINE = ("m@A", "m@B")
_STRIPS = 3  # sketches shown
_ORIGINS = {
    "strokes": "strokes in the order of drawing, cut by the length drawn",
    "steps": "published step by step",
    "raster": "finished raster drawings, revealed line by line in a made-up order (longest lines "
    "first), since nobody recorded the real one",
}


@dataclass
class Outcome:
    """How one backbone did on one kind of pairs. P test pairs, T steps.

    Attributes:
      trained: the heads.
      ranks: `trained`, `re-ranked` (the best photos ordered anew by ITM) or `frozen` (the heads of
        the checkpoint) -> query -> int [P, T], 1 = first.
      top: int [P, T, shown], best photos of the sketches alone by the trained heads, numbers of
        pairs.
    """

    trained: TrainedHeads
    ranks: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    top: np.ndarray | None = None


@dataclass(frozen=True)
class Tested:
    """The test pairs of one kind.

    Attributes:
      sketches: the faces.
      photo, drawn: int [P], photo and sketch of each pair, rows of `sketches`.
    """

    sketches: SketchFaces
    photo: np.ndarray
    drawn: np.ndarray

    def __len__(self) -> int:
        return len(self.photo)


_Outcomes = Mapping[str, Mapping[str, Outcome]]  # subject -> backbone -> outcome


def slfir_report(
    settings: Settings, tested: Mapping[str, Tested], outcomes: _Outcomes
) -> TaskReport:
    """Args: tested, outcomes: by subject; the latter then by backbone."""
    labels = list(next(iter(outcomes.values())))
    results: dict[str, dict[str, Interval | float]] = {label: {} for label in labels}
    results["chance"] = {}
    tables, details = [], {}
    for subject, found in outcomes.items():
        numbers = _numbers(settings, tested[subject], found)
        expected = chance(len(tested[subject]), settings.steps)
        tables.append(_table(subject, numbers, expected, len(tested[subject])))
        for query in QUERIES:
            for metric in _HEADLINE:
                name = f"{_PREFIX[subject]}{query} {metric}"
                for label in labels:
                    results[label][name] = numbers[label, "trained"][query][metric]
                results["chance"][name] = expected[metric]
        details[subject] = _details(numbers, found, expected, len(tested[subject]))
    first = next(iter(outcomes))
    return TaskReport(
        task="slfir",
        results=results,
        units="Percent, higher is better. Early retrieval over all steps of a sketch: rank "
        "percentile (m@A) and 1 / rank (m@B), by trained heads.",
        tables=tables,
        breakdowns=_breakdowns(settings, tested[first], outcomes[first]),
        metrics=[f"{query} {metric}" for query in QUERIES for metric in _HEADLINE],
        details=details,
        notes=_notes(settings, tested, outcomes),
        figure=_figure(settings, tested, outcomes),
    )


_Numbers = dict[tuple[str, str], dict[str, dict[str, Interval]]]


def _numbers(settings: Settings, tested: Tested, found: Mapping[str, Outcome]) -> _Numbers:
    """(backbone, row) -> query -> metric -> number."""
    groups = np.arange(len(tested))  # one pair per person
    options = {"resamples": settings.resamples, "seed": settings.seed}
    numbers: _Numbers = {}
    for label, outcome in found.items():
        for row, queries in outcome.ranks.items():
            numbers[label, row] = {
                query: dict(
                    zip(METRICS, measure(mean_of(_values(ranks)), groups, **options), strict=True)
                )
                for query, ranks in queries.items()
            }
    return numbers


def _values(ranks: np.ndarray, names: tuple[str, ...] = METRICS) -> np.ndarray:
    """Float [P, M] of int [P, T]; the gallery has a photo for each pair."""
    each = per_sketch(ranks, len(ranks))
    return np.stack([each[name] for name in names], axis=1)


_ROWS = {
    ("trained", "trained"): "trained heads",
    ("trained", "re-ranked"): "trained heads, ITM re-ranked",
    ("trained", "frozen"): "frozen embeddings",
    ("random", "trained"): "random encoders, trained heads",
}


def _table(subject: str, numbers: _Numbers, expected: dict[str, float], pairs: int) -> Table:
    rows: list[list[Any]] = []
    for query in QUERIES:
        for key, label in _ROWS.items():
            if query in numbers.get(key, {}):
                values = numbers[key][query]
                rows.append([query, label, *(values[name] for name in METRICS)])
    rows.append(["any", "chance", *(expected[name] for name in METRICS)])
    title = f"Query: {TITLES[subject]}; its caption; both"
    note = (
        f"{pairs:,} queries, a gallery of {pairs:,} photos, each of another person. A@q: share of "
        "finished sketches whose photo is among the first q."
    )
    return Table(title, ["query", "", *METRICS], rows, note)


def _details(
    numbers: _Numbers, found: Mapping[str, Outcome], expected: dict[str, float], pairs: int
) -> dict[str, Any]:
    details: dict[str, Any] = {"pairs": pairs, "gallery": pairs, "chance": expected}
    for label, outcome in found.items():
        fitted = outcome.trained
        details[label] = {
            "metrics": {row: numbers[label, row] for row in outcome.ranks},
            "curves": {
                row: {query: curves(ranks, pairs) for query, ranks in queries.items()}
                for row, queries in outcome.ranks.items()
            },
            "training": {
                "rate": fitted.rate,
                "epoch": fitted.epoch,
                "val_score": fitted.val_score,
                "losses": fitted.losses,
            },
        }
    return details


def _breakdowns(
    settings: Settings, tested: Tested, found: Mapping[str, Outcome]
) -> dict[str, list[Breakdown]]:
    columns = read_columns(settings.by, tested.sketches.faces.take(tested.photo))
    if not columns:
        return {}
    options = {"resamples": settings.resamples, "seed": settings.seed}
    parts = {}
    for label, outcome in found.items():
        ranks = outcome.ranks["trained"]
        values = np.concatenate([_values(ranks[query], _HEADLINE) for query in QUERIES], axis=1)
        groups = np.arange(len(tested))
        parts[label] = break_down(mean_of(values), groups, columns, **options)
    return parts


def _notes(settings: Settings, tested: Mapping[str, Tested], outcomes: _Outcomes) -> list[str]:
    sketches = next(iter(tested.values())).sketches
    kinds = [f"{count:,} {_ORIGINS[name]}" for name, count in sketches.origins.items()]
    notes = [
        f"test sketches: {'; '.join(kinds)}; {settings.steps} steps each",
        "ranks count the photos at least as similar as the right one, so a tie counts against the "
        "model; captions describe the photo that is sought",
        "a sketch of the photo itself shares its pose and place on the sheet, which random "
        "encoders see, too; a sketch of another picture does not",
    ]
    if "strokes" in sketches.origins:
        how = f"copied by a hand that is off, hand={sketches.hand:g}" if sketches.hand else "exact"
        notes.append(f"lines of drawn faces, which are those of the picture, are {how}")
    if sketches.left_out:
        notes.append(f"{sketches.left_out:,} test pictures without sketch or caption are left out")
    for subject, found in outcomes.items():
        fitted = found["trained"].trained
        notes.append(
            f"heads for {TITLES[subject]}: {settings.features} features, rate {fitted.rate:g}, "
            f"epoch {fitted.epoch} of {settings.epochs}, chosen on validation"
        )
    if "other" in settings.subjects and "other" not in outcomes:
        notes.append("no sketch of another picture: too few people have two pictures")
    return notes


def _figure(settings: Settings, tested: Mapping[str, Tested], outcomes: _Outcomes) -> Figure:
    panels = []
    for subject, found in outcomes.items():
        pairs = len(tested[subject])
        expected = chance(pairs, settings.steps)
        shown = [("trained", "trained", "trained"), ("trained", "frozen", "frozen")]
        if "random" in found:
            shown.append(("random", "trained", "random"))
        lines = {
            (style, query): curves(found[label].ranks[row][query], pairs)
            for label, row, style in shown
            for query in QUERIES
        }
        panels.append(Panel(TITLES[subject], lines, (expected["m@A"], expected["m@B"] / 100)))
    first = next(iter(outcomes))
    one, outcome = tested[first], outcomes[first]["trained"]
    # Spread evenly over the test pairs, not chosen by how well they do.
    numbers = np.unique(np.linspace(0, len(one) - 1, _STRIPS + 2).astype(int)[1:-1])
    strips = [_strip(one, outcome, int(number), settings.steps) for number in numbers]
    return draw_figure(panels, strips, len(one))


def _strip(tested: Tested, outcome: Outcome, number: int, steps: int) -> Strip:
    faces, at = tested.sketches.faces, np.array(stage_steps(steps)) - 1
    top = outcome.top[number, at]
    photos = [faces.image(int(row)) for row in tested.photo[top.ravel()]]
    return Strip(
        stages=tested.sketches.grown(int(tested.drawn[number]))[at],
        top=np.stack(photos).reshape(*top.shape, *photos[0].shape),
        right=top == number,
        ranks=outcome.ranks["trained"]["sketch"][number, at].tolist(),
        photo=faces.image(int(tested.photo[number])),
    )
