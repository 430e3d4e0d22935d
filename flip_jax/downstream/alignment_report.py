"""The report of face alignment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flip_jax.data.landmark_schemes import scheme_of
from flip_jax.downstream.alignment_figure import NAMES, OVERLAYS, error_figure
from flip_jax.downstream.alignment_metrics import lengths
from flip_jax.downstream.alignment_scoring import Frame, Truth, metrics_of
from flip_jax.downstream.alignment_settings import Settings
from flip_jax.downstream.dense_training import TrainedDense
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Breakdown, Interval
from flip_jax.downstream.task_report import Table, TaskReport


@dataclass
class Outcome:
    """What one backbone reaches with one share of the training pictures. N test faces.

    Attributes:
      trained: None of the mean shape.
      predicted: float64 [N, P, 2], pixels of the pictures.
      errors: float64 [N], by the normaliser of the settings, not in percent.
      numbers: see `metrics_of`.
      subsets: the same for parts that the data set names.
    """

    trained: TrainedDense | None
    predicted: np.ndarray
    errors: np.ndarray
    numbers: list[Interval]
    subsets: dict[str, list[Interval]] = field(default_factory=dict)
    breakdowns: list[Breakdown] = field(default_factory=list)


def alignment_report(
    settings: Settings,
    frame: Frame,
    faces: Mapping[str, Faces],
    left_out: Mapping[str, tuple[int, int]],
    truth: Truth,
    sizes: Mapping[float, int],
    rows: Mapping[str, Mapping[float, Outcome]],
    chance: Outcome,
) -> TaskReport:
    """Args:
    left_out: split -> faces that could not be used, and faces without a box of their own.
    sizes: percent -> training pictures; rows: backbone -> percent -> outcome.
    """
    most, metrics = max(sizes), metrics_of(frame.points)
    last = {label: found[most] for label, found in rows.items()}
    shown = last | {"chance": chance}
    each = {label: _of_points(settings.normalizer, truth, one) for label, one in shown.items()}
    return TaskReport(
        task="alignment",
        results={
            label: dict(zip(metrics, one.numbers, strict=True)) for label, one in shown.items()
        },
        units=f"Percent; NME and FR are better when lower, AUC when higher; {most:g} % of the "
        "training pictures. Chance is the mean shape of the training faces in every face's box.",
        tables=[
            _fraction_table(settings.normalizer, metrics, sizes, rows),
            *_subset_tables(metrics, truth, shown),
        ],
        breakdowns={label: one.breakdowns for label, one in last.items() if one.breakdowns},
        metrics=metrics,
        details=_details(metrics, sizes, rows, each),
        notes=_notes(settings, frame, faces, left_out, truth),
        figure=error_figure(
            settings.normalizer,
            {label: one.errors for label, one in shown.items()},
            each,
            {label: one.trained for label, one in last.items()},
        ),
    )


def _of_points(kind: str, truth: Truth, outcome: Outcome) -> np.ndarray:
    """Mean error of each point, float64 [P], not in percent; NaN where it is never known."""
    length = lengths(kind, truth.points, truth.known, truth.boxes)
    known = truth.known & np.isfinite(length)[:, None]
    distance = np.linalg.norm(outcome.predicted - truth.points, axis=-1) / length[:, None]
    count = known.sum(0)
    total = np.where(known, distance, 0.0).sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _notes(
    settings: Settings,
    frame: Frame,
    faces: Mapping[str, Faces],
    left_out: Mapping[str, tuple[int, int]],
    truth: Truth,
) -> list[str]:
    scheme = scheme_of(frame.points)
    tower = "fine-tuned" if settings.finetune else "frozen"
    counts = ", ".join(f"{len(part):,} {name}" for name, part in faces.items())
    unusable, boxless = (sum(pair[n] for pair in left_out.values()) for n in (0, 1))
    hidden = {"leave": "left out", "count": "counted"}[settings.hidden]
    unknown = int(np.isnan(truth.errors(settings.normalizer, truth.points)).sum())
    return [
        f"recipe `{settings.recipe}`: input {frame.size} px, heatmaps {frame.cells} x "
        f"{frame.cells}, box {frame.crop:g} of the input, head {settings.channels} wide, image "
        f"tower {tower}, {settings.epochs} epochs of batches of {settings.batch_size}, rates "
        f"{settings.rates}",
        f"{frame.points} points ({scheme.name if scheme else 'a scheme that is not known'}); "
        f"faces with landmarks: {counts}; hidden points are {hidden}",
        f"{unusable} faces without a box that is not empty or without a known point are left out; "
        f"{boxless} had no box of their own and have the smallest around their points, which no "
        f"detector gives; {unknown} test faces have no NME {settings.normalizer}",
        f"epoch chosen on validation by NME {settings.normalizer}; `best on test` is chosen on the "
        "test split, as published tables do, and is no result",
        f"overlays: {' and '.join(f'`{name}`' for name in OVERLAYS)}",
    ]


def _fraction_table(
    kind: str,
    metrics: list[str],
    sizes: Mapping[float, int],
    rows: Mapping[str, Mapping[float, Outcome]],
) -> Table:
    lines = []
    column = metrics.index(f"NME {kind}")
    for label, found in rows.items():
        for percent, one in found.items():
            run = one.trained
            start = [f"{percent:g} %", sizes[percent], label, one.numbers[column]]
            lines.append([*start, run.epoch, float(-run.test[-1]), -run.best_on_test])
    name = metrics[column]
    columns = ["points of", "pictures", "backbone", name, "epoch", f"{name}, last epoch"]
    note = "Every share is trained for as many steps: fewer pictures are shown more often."
    columns.append(f"{name}, best on test")
    return Table("By share of the training pictures", columns, lines, note)


def _subset_tables(metrics: list[str], truth: Truth, shown: Mapping[str, Outcome]) -> list[Table]:
    if not truth.subsets:
        return []
    lines = [
        [name, int(rows.sum()), NAMES.get(label, label), *one.subsets[name]]
        for name, rows in truth.subsets.items()
        for label, one in shown.items()
    ]
    columns = ["subset", "faces", "backbone", *metrics]
    return [Table("By subset of the test split", columns, lines, "A face may be in several.")]


def _details(
    metrics: list[str],
    sizes: Mapping[float, int],
    rows: Mapping[str, Mapping[float, Outcome]],
    each: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    def numbers(one: Outcome) -> dict[str, Any]:
        found = dict(zip(metrics, one.numbers, strict=True))
        parts = {n: dict(zip(metrics, part, strict=True)) for n, part in one.subsets.items()}
        return found | {"subsets": parts}

    found: dict[str, Any] = {
        label: {
            f"{percent:g} %": {
                "pictures": sizes[percent],
                "epoch": one.trained.epoch,
                "epochs": one.trained.epochs,
                "loss": one.trained.loss,
                "val_nme": -one.trained.val,
                "test_nme": -one.trained.test,
                "best_on_test": -one.trained.best_on_test,
                **numbers(one),
            }
            for percent, one in by_percent.items()
        }
        for label, by_percent in rows.items()
    }
    return found | {"error of each point": {n: 100 * one for n, one in each.items()}}
