"""The report of face parsing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flip_jax.downstream.dense_training import TrainedDense
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Breakdown, Interval
from flip_jax.downstream.parsing_figure import OVERLAYS, class_figure
from flip_jax.downstream.parsing_metrics import METRICS
from flip_jax.downstream.parsing_scoring import Frame
from flip_jax.downstream.parsing_settings import Settings
from flip_jax.downstream.task_report import Table, TaskReport


@dataclass
class Row:
    """What one backbone reaches with one share of the training pictures.

    Attributes:
      confusions: int64 [N, K, K] of the test pictures.
      numbers: see `parsing_statistic`.
    """

    trained: TrainedDense
    confusions: np.ndarray
    numbers: list[Interval]
    breakdowns: list[Breakdown] = field(default_factory=list)


def parsing_report(
    settings: Settings,
    frame: Frame,
    faces: Mapping[str, Faces],
    sizes: Mapping[float, int],
    rows: Mapping[str, Mapping[float, Row]],
    chance: list[Interval],
) -> TaskReport:
    """Args: sizes: percent -> training pictures; rows: backbone -> percent -> row."""
    most, names = max(sizes), frame.classes[1:]
    last = {label: found[most] for label, found in rows.items()}
    shown = {label: row.numbers for label, row in last.items()} | {"chance": chance}
    each = {label: found[len(METRICS) :] for label, found in shown.items()}
    return TaskReport(
        task="parsing",
        results={label: _named(found) for label, found in shown.items()},
        units=f"Percent; F1 is the mean over {len(names)} classes without the background, of "
        f"confusions summed over the test split; {most:g} % of the training pictures. Chance is "
        "the most frequent class of each place in the training masks.",
        tables=[_fraction_table(sizes, rows), _class_table(names, each)],
        breakdowns={label: row.breakdowns for label, row in last.items() if row.breakdowns},
        metrics=METRICS,
        details=_details(names, sizes, rows, chance),
        notes=_notes(settings, frame, faces),
        figure=class_figure(
            names,
            each,
            {
                label: (row.trained.epochs, row.trained.val, row.trained.test)
                for label, row in last.items()
            },
        ),
    )


def _named(found: list[Interval]) -> dict[str, Interval]:
    return dict(zip(METRICS, found, strict=False))


def _notes(settings: Settings, frame: Frame, faces: Mapping[str, Faces]) -> list[str]:
    tower = "fine-tuned" if settings.finetune else "frozen"
    counts = ", ".join(f"{len(part):,} {name}" for name, part in faces.items())
    return [
        f"recipe `{settings.recipe}`: input {frame.size} px, align `{frame.align}`, warp "
        f"{frame.warp:g}, head {settings.channels} wide, image tower {tower}, {settings.epochs} "
        f"epochs of batches of {settings.batch_size}, rates {settings.rates}",
        f"pictures with masks: {counts}",
        "epoch chosen on validation; `best on test` is chosen on the test split, as published "
        "tables do, and is no result",
        f"overlays: {' and '.join(f'`{name}`' for name in OVERLAYS)}",
    ]


def _fraction_table(sizes: Mapping[float, int], rows: Mapping[str, Mapping[float, Row]]) -> Table:
    lines = []
    for label, found in rows.items():
        for percent, row in found.items():
            start = [f"{percent:g} %", sizes[percent], label, *row.numbers[: len(METRICS)]]
            last = float(row.trained.test[-1])
            lines.append([*start, row.trained.epoch, last, row.trained.best_on_test])
    columns = ["labels", "pictures", "backbone", *METRICS, "epoch", "F1, last epoch"]
    columns.append("F1, best on test")
    note = "Every share is trained for as many steps: fewer pictures are shown more often."
    return Table("By share of the training pictures", columns, lines, note)


def _class_table(names: tuple[str, ...], each: Mapping[str, list[Interval]]) -> Table:
    lines = [[name, *(found[k] for found in each.values())] for k, name in enumerate(names)]
    return Table("F1 of each class", ["class", *each], lines)


def _details(
    names: tuple[str, ...],
    sizes: Mapping[float, int],
    rows: Mapping[str, Mapping[float, Row]],
    chance: list[Interval],
) -> dict[str, Any]:
    def numbers(found: list[Interval]) -> dict[str, Any]:
        each = dict(zip(names, found[len(METRICS) :], strict=True))
        return _named(found) | {"F1 of each": each}

    found = {
        label: {
            f"{percent:g} %": {
                "pictures": sizes[percent],
                "epoch": row.trained.epoch,
                "epochs": row.trained.epochs,
                "loss": row.trained.loss,
                "val_f1": row.trained.val,
                "test_f1": row.trained.test,
                "best_on_test": row.trained.best_on_test,
                "confusion": row.confusions.sum(0),
                **numbers(row.numbers),
            }
            for percent, row in by_percent.items()
        }
        for label, by_percent in rows.items()
    }
    return found | {"chance": numbers(chance)}
