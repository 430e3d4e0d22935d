"""The report of a retrieval: numbers with intervals, how the heads were trained, what is found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Breakdown, Interval, Statistic, break_down, measure
from flip_jax.downstream.retrieval import CUTOFFS, DIRECTIONS, SHOWN, Retrieval
from flip_jax.downstream.retrieval_features import FrozenGallery
from flip_jax.downstream.retrieval_heads import TrainedHeads
from flip_jax.downstream.retrieval_numbers import (
    chance_numbers,
    metric_names,
    retrieval_statistic,
)
from flip_jax.downstream.task_report import Table, TaskReport
from flip_jax.report import plot_queries

if TYPE_CHECKING:
    from flip_jax.downstream.retrieval_task import Settings

_COLOURS = {"trained": "tab:blue", "random": "tab:orange", "chance": "0.6"}
_ARROWS = {"t2i": "text → image", "i2t": "image → text"}


@dataclass(frozen=True)
class Outcome:
    """What one backbone reaches.

    Attributes:
      found: `zero-shot`, and `heads` if they were trained.
      trained: how.
      gallery: what was searched.
      val_pictures: what was searched to choose the epoch; 0 = nothing was trained.
    """

    found: dict[str, Retrieval]
    trained: TrainedHeads | None
    gallery: FrozenGallery
    val_pictures: int

    def statistic(self) -> Statistic:
        """The numbers of all that was found, in the order of `names`."""
        parts = [retrieval_statistic(one) for one in self.found.values()]
        return lambda weights: np.concatenate([part(weights) for part in parts], axis=1)

    def names(self) -> list[str]:
        found = self.found.items()
        return [name for label, one in found for name in metric_names(label, one)]


def retrieval_report(
    settings: Settings, test: Faces, outcomes: dict[str, Outcome], columns: dict[str, np.ndarray]
) -> TaskReport:
    """Args: settings: resolved; outcomes: by backbone; columns: see `columns.read_columns`."""
    options = {"resamples": settings.resamples, "seed": settings.seed}
    results: dict[str, dict[str, Interval | float]] = {}
    breakdowns: dict[str, list[Breakdown]] = {}
    for label, one in outcomes.items():
        numbers = measure(one.statistic(), test.groups, **options)
        results[label] = dict(zip(one.names(), numbers, strict=True))
        if columns:
            breakdowns[label] = break_down(one.statistic(), test.groups, columns, **options)
    trained = outcomes["trained"]
    names, shown = trained.names(), trained.found["zero-shot"]
    results["chance"] = _chance(names, shown)
    return TaskReport(
        task="retrieval",
        results=results,
        units="Recalls in percent, median rank from 1. The gallery is fixed: intervals and parts "
        "are of the queries.",
        tables=[_training_table(outcomes)] if trained.trained else [],
        breakdowns=breakdowns,
        metrics=names,
        details=_details(outcomes, shown),
        notes=_notes(settings, outcomes),
        figure=_figure(results, outcomes),
    )


def _chance(names: list[str], shown: Retrieval) -> dict[str, float]:
    chance = chance_numbers(shown)
    return {name: chance[name.split(" ", 2)[2]] for name in names}


def _notes(settings: Settings, outcomes: dict[str, Outcome]) -> list[str]:
    one = outcomes["trained"]
    shown = one.found["zero-shot"]
    first = {"enc": "[ENC], as in training", "cls": "[CLS], as the reference evaluated"}
    k = f"the best k = {shown.k} are re-ranked by ITM logit + cosine" if shown.k else "cosine only"
    found = [
        f"gallery of {shown.images:,} pictures and {len(shown.image_of):,} captions (at most "
        f"{shown.captions} per picture); {k}; first token {first[settings.first_token]}",
        "a tie counts against the model; a random order is `chance`",
    ]
    if one.trained:
        found.append(
            f"`heads`: projections, ITM head and temperature trained with the recipe "
            f"`{settings.recipe}` (rate {settings.lr:g}, {settings.epochs} epochs), towers frozen "
            "and without dropout; the epoch is chosen on validation"
        )
    return found


def _training_table(outcomes: dict[str, Outcome]) -> Table:
    rows = []
    for label, one in outcomes.items():
        val, test = one.trained.val_recall, one.trained.test_recall
        chosen = one.trained.epoch - 1
        best = f"{test.max():.2f} (epoch {test.argmax() + 1})"
        rows.append([label, one.trained.epoch, val[chosen], test[chosen], test[-1], best])
    columns = ["backbone", "epoch", "validation", "test", "test, last epoch", "best on test"]
    sizes = outcomes["trained"].val_pictures, outcomes["trained"].found["heads"].images
    note = (
        f"Mean recall in percent, among {sizes[0]:,} pictures of validation and {sizes[1]:,} of "
        "the test split. The epoch is chosen on validation; `best on test` is chosen on the test "
        "split, as published tables do, and is no result."
    )
    return Table("Training of the heads", columns, rows, note)


def _details(outcomes: dict[str, Outcome], shown: Retrieval) -> dict[str, Any]:
    found: dict[str, Any] = {
        "gallery": {
            "images": shown.images,
            "texts": len(shown.image_of),
            "captions_per_image": shown.captions,
            "k": shown.k,
        }
    }
    for label, one in outcomes.items():
        if one.trained:
            found[label] = {
                "epoch": one.trained.epoch,
                "val_mean_recall": one.trained.val_recall,
                "test_mean_recall": one.trained.test_recall,
                "best_on_test": float(one.trained.test_recall.max()),
                "loss_itc": one.trained.losses[:, 0],
                "loss_itm": one.trained.losses[:, 1],
                "temperature": float(one.trained.heads["temperature"]),
            }
    return found


def _figure(
    results: dict[str, dict[str, Interval | float]],
    outcomes: dict[str, Outcome],
) -> Figure:
    """Recalls against the random backbone and chance, training curves, and what is found."""
    figure = Figure(figsize=(13, 17), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 2.4])
    one = outcomes["trained"]
    protocol = list(one.found)[-1]
    shown = one.found[protocol]
    panels = top.subplots(1, 3 if one.trained else 2)
    for axis, direction in zip(panels, DIRECTIONS, strict=False):
        _plot_recalls(axis, direction, f"{protocol} {list(shown.ranks)[-1]}", results)
    if one.trained:
        for label, other in outcomes.items():
            epochs = np.arange(len(other.trained.val_recall)) + 1
            colour = _COLOURS[label]
            panels[2].plot(epochs, other.trained.val_recall, color=colour, label=f"{label}, val")
            panels[2].plot(
                epochs, other.trained.test_recall, "--", color=colour, label=f"{label}, test"
            )
        panels[2].set(title="mean recall (%) of the trained heads", xlabel="epoch")
        panels[2].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[2].set_ylim(bottom=0)
        panels[2].grid(alpha=0.3)
        panels[2].legend(fontsize=8)
    plot_queries(bottom, shown, one.gallery)
    bottom.suptitle(
        f"text → image, {protocol}, top {SHOWN} of {shown.images} pictures; the right one is "
        "framed, and shown at the end"
    )
    return figure


def _plot_recalls(
    axis: Axes, direction: str, prefix: str, results: dict[str, dict[str, Interval | float]]
) -> None:
    width = 0.8 / len(results)
    for number, (label, row) in enumerate(results.items()):
        found = [row[f"{prefix} {direction} R@{k}"] for k in CUTOFFS]
        numbers = [n if isinstance(n, Interval) else Interval(n, n, n) for n in found]
        places = np.arange(len(CUTOFFS)) + width * (number + 0.5) - 0.4
        # A skewed interval may leave out its own number.
        low = [max(n.value - n.low, 0.0) for n in numbers]
        high = [max(n.high - n.value, 0.0) for n in numbers]
        values = [n.value for n in numbers]
        axis.bar(places, values, width, yerr=[low, high], label=label, color=_COLOURS[label])
    axis.set_xticks(range(len(CUTOFFS)), [f"R@{k}" for k in CUTOFFS])
    axis.set_title(f"{_ARROWS[direction]} (%), {prefix}")
    axis.grid(alpha=0.3, axis="y")
    axis.legend(fontsize=8)
