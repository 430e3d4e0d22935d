"""Attribute probe: what a linear head reads off frozen states, with all labels and with few.

Protocol: arXiv 2407.08515, table 2; models/fflip_celeba_recognition.py and
eval/celeba_recognition.py of the official code. Departures and their reasons: docs/downstream.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from matplotlib.figure import Figure

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.downstream.attribute_head import head_logits, normalize_states
from flip_jax.downstream.attribute_scores import METRICS, attribute_statistic, by_attribute
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces, Splits
from flip_jax.downstream.intervals import Breakdown, Interval, break_down, measure
from flip_jax.downstream.probe import load_probe, save_probe
from flip_jax.downstream.probe_training import Recipe, TrainedHead, train_head
from flip_jax.downstream.task_report import Table, TaskReport

__all__ = ["Settings", "load_probe", "run"]


@dataclass(frozen=True)
class Settings:
    """What `--field=value` sets."""

    # `flip`: the official probe; `facer`: FaRL's, see `attribute_head`.
    head: Literal["flip", "facer"] = "flip"
    fractions: str = "0.2 0.5 1 2 10 100"  # percent of the training pictures
    seed: int = 0  # of subsets (each holds the smaller ones), start values and order
    epochs: int = 100
    batch_size: int = 64  # at most; a smaller subset is one batch
    # Trained side by side, the best on validation counts. Official: 0.3 on CelebA, 0.003 on LFWA.
    rates: str = "0.3 0.03 0.003"
    weight_decay: float = 0.05
    train_split: str = "train"
    val_split: str = "val"  # where there is none, a tenth of the training groups
    test_split: str = "test"
    random_backbone: bool = True  # also the same on a random-initialised backbone
    by: str = ""  # columns to break the results down by, see `columns.read_columns`
    resamples: int = 1000  # of the bootstrap


@dataclass
class _Row:
    """What one backbone reaches with one share of the labels."""

    trained: TrainedHead
    numbers: list[Interval]  # see `attribute_statistic`
    breakdowns: list[Breakdown] = field(default_factory=list)


def run(settings: Settings, backbone: Backbone, data: FaceData, out: Path) -> TaskReport:
    """Trains and scores a probe per backbone and fraction; saves the last one in `out/probe`.

    Raises:
      ValueError: a setting is out of range.
      DataLacks: the data has no labels.
      OSError: data cannot be read, or `out` not be written.
    """
    percents, rates = _check(settings)
    faces = _faces(settings, data)
    sizes = {p: max(round(len(faces.train) * p / 100), 1) for p in percents}
    columns = read_columns(settings.by, faces.test)
    backbones = {"trained": backbone}
    if settings.random_backbone:
        backbones["random"] = backbone.random_twin()
    rows: dict[str, dict[float, _Row]] = {}
    for label, one in backbones.items():
        states = [_states(settings.head, one, part, data) for part in vars(faces).values()]
        rows[label] = {}
        for percent, size in sizes.items():
            by = columns if percent == percents[-1] else {}
            rows[label][percent] = _probe(settings, rates, states, faces, size, by)
            print(f"{label} {percent:g} %: {_line(rows[label][percent])}", flush=True)
    last = rows["trained"][percents[-1]].trained
    _save(out / "probe", settings, backbone, last, faces, data)
    return _report(settings, faces, sizes, rows)


def _check(settings: Settings) -> tuple[list[float], tuple[float, ...]]:
    """The fractions in percent, ascending, and the learning rates."""
    found = []
    for name, most in (("fractions", 100.0), ("rates", np.inf)):
        text = getattr(settings, name)
        try:
            numbers = [float(word) for word in text.replace(",", " ").split()]
        except ValueError:
            numbers = []
        if not numbers or not all(0 < n <= most and n < np.inf for n in numbers):
            below = f" and at most {most:g}" if most < np.inf else ""
            raise ValueError(f"settings.{name}={text!r}: must be numbers above 0{below}")
        found.append(numbers)
    for name, least in (
        ("epochs", 1),
        ("batch_size", 1),
        ("resamples", 1),
        ("weight_decay", 0),
        ("seed", 0),
    ):
        if getattr(settings, name) < least:
            value = getattr(settings, name)
            raise ValueError(f"settings.{name}={value}: must be at least {least}")
    return sorted(set(found[0])), tuple(found[1])


def _faces(settings: Settings, data: FaceData) -> Splits:
    train, val, test = data.three_splits(
        settings.train_split, settings.val_split, settings.test_split
    )
    for faces in (train, val, test):
        if not (faces.attributes >= 0).any():
            raise DataLacks(
                f"{data.path}, split {faces.source.split!r}: no picture has a known attribute; "
                "`python -m flip_jax.data build` takes labels from columns named like CelebA's"
            )
    order = np.random.default_rng(settings.seed).permutation(len(train))
    return Splits(train.take(order), val, test)


def _states(head: str, backbone: Backbone, faces: Faces, data: FaceData) -> np.ndarray:
    """Normalised states float16 [N, V, D] of a split, from the cache if they are there.

    After normalisation no value exceeds sqrt(D), so that half precision keeps three digits of all.
    """

    def finish(states: np.ndarray) -> np.ndarray:
        return np.asarray(_normalize(states), np.float16)

    function = backbone.state_function(last_normed=head == "flip")
    # Pictures are encoded in their stored order, whatever order they are wanted in.
    order = np.argsort(faces.numbers, kind="stable")
    output = f"states, last {'normed' if head == 'flip' else 'raw'}, normalised, float16"
    stored = data.features.of_images(backbone, faces.take(order), output, function, finish)
    return stored[np.argsort(order)]


_normalize = jax.jit(normalize_states)


def _probe(
    settings: Settings,
    rates: tuple[float, ...],
    states: list[np.ndarray],
    faces: Splits,
    size: int,
    by: dict[str, np.ndarray],
) -> _Row:
    """Trains on the first `size` pictures, scores on the test split."""
    recipe = Recipe(settings.head, settings.epochs, settings.batch_size, settings.weight_decay)
    labels = [part.attributes for part in vars(faces).values()]
    train, val, test = zip(states, labels, strict=True)
    small = tuple(array[:size] for array in train)
    trained = train_head(recipe, rates, small, val, test, settings.seed)
    scores = predict(settings.head, trained.head, states[2])
    statistic = attribute_statistic(scores > 0, scores, labels[2])
    options = {"resamples": settings.resamples, "seed": settings.seed}
    row = _Row(trained, measure(statistic, faces.test.groups, **options))
    row.breakdowns = break_down(
        lambda weights: statistic(weights)[:, : len(METRICS)], faces.test.groups, by, **options
    )
    return row


def predict(kind: str, head: Any, states: np.ndarray, rows: int = 4096) -> np.ndarray:
    """Logits float32 [N, 40] of normalised states [N, V, D]."""
    call = jax.jit(head_logits, static_argnums=0)
    starts = range(0, len(states), rows)
    return np.concatenate([call(kind, head, states[start : start + rows]) for start in starts])


def majority(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What says the same of everybody: (predictions bool, scores float) [N, K].

    Args:
      train: labels int8 of the training pictures; the more frequent one is said; test: those to
        be guessed.
    """
    share = (train == 1).sum(0) / np.maximum((train >= 0).sum(0), 1)
    scores = np.broadcast_to(share, test.shape)
    return scores > 0.5, scores


def _save(
    folder: Path,
    settings: Settings,
    backbone: Backbone,
    trained: TrainedHead,
    faces: Splits,
    data: FaceData,
) -> None:
    described = data.describe()
    about = {
        "data": {name: described[name] for name in ("path", "manifest_sha256")},
        "train_pictures": len(faces.train),
        "rate": trained.rate,
        "epoch": trained.epoch,
        "val_accuracy": float(trained.val_accuracy.max()),
    }
    save_probe(folder, backbone, settings.head, trained.head, about)


def _line(row: _Row) -> str:
    numbers = ", ".join(f"{n} {v}" for n, v in zip(METRICS, row.numbers, strict=False))
    return f"{numbers}; rate {row.trained.rate:g}, epoch {row.trained.epoch}"


def _report(
    settings: Settings,
    faces: Splits,
    sizes: dict[float, int],
    rows: dict[str, dict[float, _Row]],
) -> TaskReport:
    most = max(sizes)
    test = faces.test.attributes
    chance = measure(
        attribute_statistic(*majority(faces.train.attributes, test), test),
        faces.test.groups,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    results = {label: _named(found[most].numbers) for label, found in rows.items()}
    results["chance"] = _named(chance)
    return TaskReport(
        task="attributes",
        results=results,
        units=f"Percent, mean over attributes, {most:g} % of the training pictures. Chance is the "
        "majority class of the training pictures; its AP is the share of positives.",
        tables=[_fraction_table(sizes, rows), _attribute_table(rows, most, chance)],
        breakdowns={
            label: found[most].breakdowns for label, found in rows.items() if found[most].breakdowns
        },
        metrics=METRICS,
        details=_details(rows, sizes, chance),
        notes=[
            f"head `{settings.head}`, {len(faces.train):,} training, {len(faces.val):,} validation "
            f"and {len(faces.test):,} test pictures",
            "epoch and learning rate chosen on validation; `best on test` is chosen on the test "
            "split, as published tables do, and is no result",
        ],
        figure=_figure(sizes, rows, chance),
    )


def _named(numbers: list[Interval]) -> dict[str, Interval]:
    return dict(zip(METRICS, numbers, strict=False))


def _fraction_table(sizes: dict[float, int], rows: dict[str, dict[float, _Row]]) -> Table:
    lines = []
    for label, found in rows.items():
        for percent, row in found.items():
            last = float(row.trained.test_accuracy[-1])
            chosen = f"{row.trained.rate:g}, {row.trained.epoch}"
            numbers = row.numbers[: len(METRICS)]
            start = [f"{percent:g} %", sizes[percent], label]
            lines.append([*start, *numbers, chosen, last, row.trained.best_on_test])
    columns = ["labels", "pictures", "backbone", *METRICS, "rate, epoch", "accuracy, last epoch"]
    note = "The last epoch is that of the chosen rate."
    return Table("By share of the labels", [*columns, "accuracy, best on test"], lines, note)


def _attribute_table(
    rows: dict[str, dict[float, _Row]], most: float, chance: list[Interval]
) -> Table:
    parts = {label: by_attribute(found[most].numbers) for label, found in rows.items()}
    parts["chance"] = by_attribute(chance)
    columns = ["attribute"]
    for metric in METRICS:
        columns += [f"{metric}, {label}" for label in parts]
    lines = []
    for k, name in enumerate(ATTRIBUTES):
        numbers = [parts[label][m][k] for m in range(len(METRICS)) for label in parts]
        lines.append([name, *(f"{one.value:.1f}" for one in numbers)])
    return Table("Each attribute", columns, lines)


def _details(
    rows: dict[str, dict[float, _Row]], sizes: dict[float, int], chance: list[Interval]
) -> dict[str, Any]:
    def numbers(found: list[Interval]) -> dict[str, Any]:
        each = zip(METRICS, by_attribute(found), strict=True)
        return _named(found) | {
            f"{metric} of each": dict(zip(ATTRIBUTES, values, strict=True))
            for metric, values in each
        }

    found = {
        label: {
            f"{percent:g} %": {
                "pictures": sizes[percent],
                "rate": row.trained.rate,
                "epoch": row.trained.epoch,
                "val_accuracy": row.trained.val_accuracy,
                "test_accuracy": row.trained.test_accuracy,
                "best_on_test": row.trained.best_on_test,
                **numbers(row.numbers),
            }
            for percent, row in by_percent.items()
        }
        for label, by_percent in rows.items()
    }
    return found | {"chance": numbers(chance)}


_COLOURS = {"trained": "tab:blue", "random": "tab:orange", "chance": "0.6"}


def _figure(
    sizes: dict[float, int], rows: dict[str, dict[float, _Row]], chance: list[Interval]
) -> Figure:
    """Metrics against the number of labelled pictures; AP of each attribute."""
    figure = Figure(figsize=(13, 11), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1, 1.4])
    for m, axis in enumerate(top.subplots(1, len(METRICS))):
        # Before anything is plotted: numbers that are not defined give an axis no limits.
        axis.set(xscale="log", xlim=(0.9 * min(sizes.values()), 1.1 * max(sizes.values())))
        for label, found in rows.items():
            numbers = [row.numbers[m] for row in found.values()]
            counts = [sizes[percent] for percent in found]
            low, high = [n.low for n in numbers], [n.high for n in numbers]
            axis.fill_between(counts, low, high, color=_COLOURS[label], alpha=0.2)
            values = [n.value for n in numbers]
            axis.plot(counts, values, marker="o", color=_COLOURS[label], label=label)
        axis.axhline(chance[m].value, color=_COLOURS["chance"], linestyle="--", label="chance")
        axis.set(title=f"{METRICS[m]} (%)", xlabel="labelled pictures")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    axis = bottom.subplots()
    most = max(sizes)
    for label, numbers in [*((n, f[most].numbers) for n, f in rows.items()), ("chance", chance)]:
        values = [one.value for one in by_attribute(numbers)[2]]
        axis.plot(range(len(values)), values, "o", color=_COLOURS[label], label=label)
    axis.set_xticks(range(len(ATTRIBUTES)), ATTRIBUTES, rotation=90, fontsize=8)
    axis.set(title=f"AP of each attribute (%), {most:g} % of the labels", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure
