"""The report of the multi-task head."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flip_jax.downstream.alignment_metrics import normalizers_of
from flip_jax.downstream.dense_training import TrainedDense
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Breakdown, Interval
from flip_jax.downstream.multitask_figure import OVERLAY, metric_figure
from flip_jax.downstream.multitask_scoring import Frame
from flip_jax.downstream.multitask_settings import Settings
from flip_jax.downstream.task_report import Table, TaskReport


@dataclass
class Row:
    """What one backbone reaches with one share of the training pictures.

    Attributes:
      trained: None of the row `chance`.
      numbers: see `Frame.metrics`.
    """

    trained: TrainedDense | None
    numbers: list[Interval]
    breakdowns: list[Breakdown] = field(default_factory=list)


def multitask_report(
    settings: Settings,
    frame: Frame,
    faces: Mapping[str, Faces],
    sizes: Mapping[float, int],
    rows: Mapping[str, Mapping[float, Row]],
    chance: list[Interval],
) -> TaskReport:
    """Args: sizes: percent -> training pictures; rows: backbone -> percent -> row."""
    most, metrics = max(sizes), frame.metrics()
    last = {label: found[most] for label, found in rows.items()}
    shown = {label: row.numbers for label, row in last.items()} | {"chance": chance}
    results = {label: dict(zip(metrics, found, strict=True)) for label, found in shown.items()}
    main = ("F1", f"NME {normalizers_of(frame.points)[0]}", "AP")
    return TaskReport(
        task="multitask",
        results=results,
        units="Percent; F1 and pixel accuracy are of parsing, NME, AUC and FR of landmarks, the "
        "rest of 40 attributes; NME and FR are better when lower; "
        f"{most:g} % of the training pictures. Chance is what is most usual in training: the class "
        "of each place, the mean of each point, the share of each attribute.",
        tables=[_fraction_table(main, metrics, sizes, rows)],
        breakdowns={label: row.breakdowns for label, row in last.items() if row.breakdowns},
        metrics=metrics,
        details=_details(metrics, sizes, rows),
        notes=_notes(settings, frame, faces),
        figure=metric_figure(
            main,
            results,
            {
                label: (row.trained.epochs, row.trained.val, row.trained.test)
                for label, row in last.items()
            },
        ),
    )


def _notes(settings: Settings, frame: Frame, faces: Mapping[str, Faces]) -> list[str]:
    tower = "fine-tuned" if settings.finetune else "frozen"
    counts = ", ".join(f"{len(part):,} {name}" for name, part in faces.items())
    return [
        f"one head for {len(frame.classes)} classes, {frame.points} points and 40 attributes: "
        f"whole pictures at {frame.size} px, head {settings.channels} wide, image tower {tower}, "
        f"{settings.epochs} epochs of batches of {settings.batch_size}, rates {settings.rates}, "
        f"weights of the losses {settings.weights}",
        f"pictures with mask and landmarks: {counts}",
        "epoch chosen on validation by the mean of F1, AP and 100 - NME",
        f"overlay: `{OVERLAY}`",
    ]


def _fraction_table(
    main: tuple[str, ...],
    metrics: list[str],
    sizes: Mapping[float, int],
    rows: Mapping[str, Mapping[float, Row]],
) -> Table:
    columns = [metrics.index(name) for name in main]
    lines = []
    for label, found in rows.items():
        for percent, row in found.items():
            numbers = [row.numbers[column] for column in columns]
            lines.append([f"{percent:g} %", sizes[percent], label, *numbers, row.trained.epoch])
    head = ["labels", "pictures", "backbone", *main, "epoch"]
    note = "Every share is trained for as many steps: fewer pictures are shown more often."
    return Table("By share of the training pictures", head, lines, note)


def _details(
    metrics: list[str], sizes: Mapping[float, int], rows: Mapping[str, Mapping[float, Row]]
) -> dict[str, Any]:
    return {
        label: {
            f"{percent:g} %": {
                "pictures": sizes[percent],
                "epoch": row.trained.epoch,
                "epochs": row.trained.epochs,
                "loss": row.trained.loss,
                "val_score": row.trained.val,
                "test_score": row.trained.test,
                **dict(zip(metrics, row.numbers, strict=True)),
            }
            for percent, row in found.items()
        }
        for label, found in rows.items()
    }
