"""Zero-shot: attributes and free labels by the cosine between a picture and prompts.

    scores = attribute_scores(backbone, backbone.embed_images(images))      # [N, 40]
    shares = classify(backbone, backbone.embed_images(images), ["a bald man", "a woman"])

The embedding of a class is the mean of its prompts' embeddings, normed (prompt ensembling of
arXiv 2103.00020, section 3.1.4). An attribute is there if its presence is nearer than its absence.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure, SubFigure

from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES
from flip_jax.downstream.attribute_scores import METRICS, attribute_statistic, by_attribute
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import (
    Interval,
    Statistic,
    break_down,
    mean_of_defined,
    measure,
)
from flip_jax.downstream.task_report import Table, TaskReport, write_text
from flip_jax.downstream.zero_shot_prompts import LABEL_SETS, attribute_prompts, label_prompts

_SHOWN = 8  # pictures per free label


@dataclass(frozen=True)
class Settings:
    """What `--field=value` sets."""

    test_split: str = "test"
    # Labels of one's own with semicolons between, "a bald man; a woman with a hat": every picture
    # of the split gets the shares of all, in `labels.csv`; the surest ones are shown.
    labels: str = ""
    random_backbone: bool = True  # also the same on a random-initialised backbone
    by: str = ""  # columns to break the results down by, see `columns.read_columns`
    resamples: int = 1000  # of the bootstrap
    seed: int = 0


def class_embeds(backbone: Backbone, prompts: Sequence[Sequence[str]]) -> np.ndarray:
    """One embedding per class of several prompts, float32 [K, E], unit norm."""
    embeds = backbone.embed_texts([text for texts in prompts for text in texts])
    ends = np.cumsum([len(texts) for texts in prompts])[:-1]
    means = np.stack([part.mean(axis=0) for part in np.split(embeds, ends)])
    return means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-12)


def attribute_scores(backbone: Backbone, image_embeds: np.ndarray) -> np.ndarray:
    """Cosine with the presence less that with the absence of each attribute, float32 [N, 40].

    Args:
      image_embeds: [N, E] of the same backbone; above 0 an attribute is said to be there.
    """
    pairs = [attribute_prompts(name) for name in ATTRIBUTES]
    present, absent = (class_embeds(backbone, [pair[side] for pair in pairs]) for side in (0, 1))
    return image_embeds @ (present - absent).T


def classify(backbone: Backbone, image_embeds: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Shares of free labels: softmax of cosine / temperature of training, float32 [N, K].

    Args:
      labels: noun phrases ("a bald man"), parts of one ("black hair") or participles ("wearing a
        hat").

    Raises:
      ValueError: fewer than two labels, an empty one, or one twice.
    """
    labels = checked_labels(labels)
    embeds = class_embeds(backbone, [label_prompts(label) for label in labels])
    logits = image_embeds @ embeds.T / float(backbone.params["temperature"])
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def checked_labels(labels: Sequence[str]) -> list[str]:
    """The labels without blanks around them.

    Raises:
      ValueError: fewer than two labels, an empty one, or one twice.
    """
    found = [label.strip() for label in labels]
    if len(set(found)) < max(2, len(found)) or "" in found:
        raise ValueError(f"labels={found}: must be two or more, all different, none empty")
    return found


def run(settings: Settings, backbone: Backbone, data: FaceData, out: Path) -> TaskReport:
    """Scores attributes and label sets; writes `out/labels.csv` if there are free labels.

    Raises:
      ValueError: a setting is out of range.
      DataLacks: the data has no labels.
      OSError: data cannot be read, or `out` not be written.
    """
    for name, least in (("resamples", 1), ("seed", 0)):
        if getattr(settings, name) < least:
            value = getattr(settings, name)
            raise ValueError(f"settings.{name}={value}: must be at least {least}")
    faces = data.split(settings.test_split)
    if not (faces.attributes >= 0).any():
        raise DataLacks(
            f"{data.path}, split {settings.test_split!r}: no picture has a known attribute"
        )
    columns = read_columns(settings.by, faces)
    labels = checked_labels(settings.labels.split(";")) if settings.labels else []
    backbones = {"trained": backbone}
    if settings.random_backbone:
        backbones["random"] = backbone.random_twin()
    embeds = {label: data.image_embeds(one, faces) for label, one in backbones.items()}
    shares = {
        label: {name: classify(one, embeds[label], list(LABEL_SETS[name])) for name in LABEL_SETS}
        for label, one in backbones.items()
    }
    statistics = {
        label: _statistic(faces, attribute_scores(one, embeds[label]), shares[label])
        for label, one in backbones.items()
    }
    statistics["chance"] = _statistic(faces, np.zeros(faces.attributes.shape, np.float32), None)
    free = None
    if labels:
        free = labels, classify(backbone, embeds["trained"], labels)
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "labels.csv", _csv(faces, *free))
    options = {"resamples": settings.resamples, "seed": settings.seed}
    return _report(faces, statistics, shares, columns, free, options)


def _report(
    faces: Faces,
    statistics: dict[str, Statistic],
    shares: dict[str, dict[str, np.ndarray]],
    columns: dict[str, np.ndarray],
    free: tuple[list[str], np.ndarray] | None,
    options: dict[str, int],
) -> TaskReport:
    """Args: shares: backbone -> label set -> [N, K]; free: labels of one's own and their shares;
    options: of the bootstrap."""
    numbers = {n: measure(s, faces.groups, **options) for n, s in statistics.items()}
    names = _metric_names()
    breakdowns = {
        label: break_down(
            lambda weights, s=statistics[label]: s(weights)[:, : len(names)],
            faces.groups,
            columns,
            **options,
        )
        for label in (shares if columns else ())
    }
    return TaskReport(
        task="zero_shot",
        results={n: dict(zip(names, found, strict=False)) for n, found in numbers.items()},
        units="Percent. AP and balanced accuracy are means over attributes; R@1 is the share of "
        "pictures whose nearest label is the right one, mean over the labels of a set. Chance "
        "says the same of everybody.",
        tables=[_attribute_table(numbers), _label_table(faces, shares)],
        breakdowns=breakdowns,
        metrics=names,
        details={n: _details(found) for n, found in numbers.items()},
        notes=[f"{len(faces):,} pictures; prompts in `flip_jax/downstream/zero_shot_prompts.py`"],
        figure=_figure(numbers, faces, free),
    )


def _metric_names() -> list[str]:
    return ["AP", "balanced accuracy", *(f"R@1 {name}" for name in LABEL_SETS)]


def right_labels(faces: Faces, name: str) -> np.ndarray:
    """The label of a set that is right for each face, int64 [N]; -1 where none or several are."""
    right = np.stack(
        [
            np.all(
                [faces.attributes[:, ATTRIBUTE_INDEX[a]] == value for a, value in wanted.items()],
                axis=0,
            )
            for wanted in LABEL_SETS[name].values()
        ],
        axis=1,
    )
    return np.where(right.sum(axis=1) == 1, right.argmax(axis=1), -1)


def _statistic(faces: Faces, scores: np.ndarray, shares: dict[str, np.ndarray] | None) -> Statistic:
    """[AP, balanced accuracy, R@1 of each set, then metrics of each attribute]; `shares` None =
    chance."""
    of_attributes = attribute_statistic(scores > 0, scores, faces.attributes)
    sets = []
    for name, labels in LABEL_SETS.items():
        right = right_labels(faces, name)
        own = right[:, None] == np.arange(len(labels))
        most = own.sum(axis=0).argmax()
        guess = np.full(len(faces), most) if shares is None else shares[name].argmax(axis=1)
        sets.append((own.astype(np.float32), (own & (guess == right)[:, None]).astype(np.float32)))

    def statistic(weights: np.ndarray) -> np.ndarray:
        found = of_attributes(weights)
        means, each = found[:, : len(METRICS)], found[:, len(METRICS) :]
        columns = [means[:, METRICS.index("AP")], means[:, METRICS.index("balanced accuracy")]]
        for own, hit in sets:
            with np.errstate(invalid="ignore"):
                recall = (weights @ hit) / (weights @ own)
            columns.append(100.0 * mean_of_defined(recall))
        return np.concatenate([np.stack(columns, axis=1), each], axis=1)

    return statistic


def _attribute_table(numbers: dict[str, list[Interval]]) -> Table:
    """Balanced accuracy and AP of each attribute."""
    skipped = len(_metric_names()) - len(METRICS)
    parts = {label: by_attribute(found[skipped:]) for label, found in numbers.items()}
    shown = [METRICS.index("AP"), METRICS.index("balanced accuracy")]
    columns = [f"{METRICS[m]}, {label}" for m in shown for label in parts]
    lines = [
        [name, *(f"{parts[label][m][k].value:.1f}" for m in shown for label in parts)]
        for k, name in enumerate(ATTRIBUTES)
    ]
    return Table("Each attribute", ["attribute", *columns], lines)


def _label_table(faces: Faces, shares: dict[str, dict[str, np.ndarray]]) -> Table:
    """R@1 and R@2 of each label."""
    lines = []
    for name, labels in LABEL_SETS.items():
        right = right_labels(faces, name)
        for k, label in enumerate(labels):
            own = right == k
            line = [name, label, int(own.sum())]
            for found in shares.values():
                order = np.argsort(-found[name], axis=1)
                for top in (1, 2):
                    hit = (order[own, :top] == k).any(axis=1)
                    line.append(100.0 * float(hit.mean()) if own.any() else np.nan)
            lines.append(line)
    columns = [f"R@{top}, {label}" for label in shares for top in (1, 2)]
    return Table("Label sets", ["set", "label", "pictures", *columns], lines)


def _details(found: list[Interval]) -> dict[str, dict[str, Interval]]:
    each = by_attribute(found[len(_metric_names()) - len(METRICS) :])
    return {
        f"{metric} of each": dict(zip(ATTRIBUTES, values, strict=True))
        for metric, values in zip(METRICS, each, strict=True)
    }


def _csv(faces: Faces, labels: list[str], shares: np.ndarray) -> str:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["id", "label", *labels])
    for record, row in zip(faces.ids, shares, strict=True):
        table.writerow([record, labels[row.argmax()], *(f"{share:.4f}" for share in row)])
    return text.getvalue()


_COLOURS = {"trained": "tab:blue", "random": "tab:orange", "chance": "0.6"}


def _figure(
    numbers: dict[str, list[Interval]],
    faces: Faces,
    free: tuple[list[str], np.ndarray] | None,
) -> Figure:
    """AP of each attribute, best first; below, the surest pictures of each free label."""
    rows = len(free[0]) if free else 0
    figure = Figure(figsize=(13, 6 + 1.5 * rows), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[6, 1.5 * rows]) if rows else [figure]
    axis = parts[0].subplots()
    skipped = len(_metric_names()) - len(METRICS)
    each = {n: by_attribute(f[skipped:])[METRICS.index("AP")] for n, f in numbers.items()}
    order = np.argsort([-one.value for one in each["trained"]], kind="stable")
    for label, found in each.items():
        values = [found[k].value for k in order]
        axis.plot(range(len(order)), values, "o", color=_COLOURS[label], label=label)
    axis.set_xticks(range(len(order)), np.array(ATTRIBUTES)[order], rotation=90, fontsize=8)
    axis.set(title="zero-shot AP of each attribute (%)", ylim=(0, 100))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    if free:
        _show_labels(parts[1], faces, *free)
    return figure


def _show_labels(figure: SubFigure, faces: Faces, labels: list[str], shares: np.ndarray) -> None:
    axes = figure.subplots(len(labels), _SHOWN, squeeze=False)
    for k, row in enumerate(axes):
        best = np.argsort(-shares[:, k], kind="stable")[:_SHOWN]
        for axis in row:
            axis.set_axis_off()
        for axis, number in zip(row, best, strict=False):
            axis.imshow(faces.image(int(number)))
            axis.set_title(f"{shares[number, k]:.2f}", fontsize=7)
        row[0].text(
            *(-0.1, 0.5, labels[k]),
            ha="right",
            va="center",
            fontsize=8,
            transform=row[0].transAxes,
            parse_math=False,
        )
