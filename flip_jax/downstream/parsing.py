"""Face parsing: a class for every pixel, by a UPerNet head on an image tower.

Protocol: arXiv 2112.03109 (FaRL), section 4; departures and their reasons: docs/dense.md.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from flip_jax.downstream.backbone import Backbone, Rows
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.dense_augment import mirrored_classes
from flip_jax.downstream.dense_geometry import FIVE_POINTS
from flip_jax.downstream.dense_pictures import DenseBatches, read_picture
from flip_jax.downstream.dense_saved import save_dense
from flip_jax.downstream.dense_training import DenseNet, Predict, TrainedDense, train_dense
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces, Splits
from flip_jax.downstream.intervals import Interval, break_down, measure
from flip_jax.downstream.parsing_figure import OVERLAYS, write_overlays
from flip_jax.downstream.parsing_metrics import METRICS, parsing_statistic, picture_f1
from flip_jax.downstream.parsing_report import Row, parsing_report
from flip_jax.downstream.parsing_saved import FILE, load_parser
from flip_jax.downstream.parsing_scoring import Frame, cross_entropy, segmentation
from flip_jax.downstream.parsing_settings import RECIPES, Recipe, Settings
from flip_jax.downstream.task_report import TaskReport

__all__ = ["OVERLAYS", "RECIPES", "Recipe", "Settings", "load_parser", "run"]

# Training pictures that the row `chance` is counted on, at most.
_PRIOR_PICTURES = 2000


def run(settings: Settings, backbone: Backbone, data: FaceData, out: Path) -> TaskReport:
    """Trains and scores a head per backbone and fraction; leaves the last one in `out/parser.npz`.

    Raises:
      ValueError: a setting is out of range, or a mask cannot be used.
      DataLacks: the data has no masks, or no landmarks where they are asked for.
      OSError: data cannot be read, or `out` not be written.
      FloatingPointError: a training diverged.
    """
    settings = settings.resolved(backbone.image_size)
    faces = _faces(settings, data)
    percents = settings.percents()
    sizes = {p: max(round(len(faces.train) * p / 100), 1) for p in percents}
    some = faces.train.take(range(min(len(faces.train), _PRIOR_PICTURES)))
    frame = Frame(class_names(data, some), settings.size, settings.align, settings.warp)
    columns = read_columns(settings.by, faces.test)
    backbones = {"trained": backbone}
    if settings.random_backbone:
        backbones["random"] = backbone.random_twin()
    rows: dict[str, dict[float, Row]] = {}
    for label, one in backbones.items():
        output = segmentation(len(frame.classes))
        sized = {"size": settings.size, "channels": settings.channels}
        net = DenseNet(one, output, **sized, finetune=settings.finetune)
        rows[label] = {}
        for percent, size in sizes.items():
            print(f"{label} backbone, {percent:g} % of the training pictures", flush=True)
            by = columns if percent == percents[-1] else {}
            part = dataclasses.replace(faces, train=faces.train.take(range(size)))
            row, predict = _train(settings, len(faces.train), net, frame, part, by)
            rows[label][percent] = row
            if label == "trained" and percent == percents[-1]:
                _save(out, net, frame, row.trained, data)
                write_overlays(out, frame, predict, faces.test, picture_f1(row.confusions))
    chance = frame.confusions(_always(frame.prior(some)), faces.test)
    return parsing_report(
        settings, frame, vars(faces), sizes, rows, _measure(settings, chance, faces)
    )


def _faces(settings: Settings, data: FaceData) -> Splits:
    found = []
    for faces in data.three_splits(settings.train_split, settings.val_split, settings.test_split):
        where = f"{data.path}, split {faces.source.split!r}"
        if not faces.masked.any():
            raise DataLacks(f"{where}: no record has a mask")
        faces = faces.take(faces.masked)
        if settings.align == "points":
            known = np.isin(faces.points, list(FIVE_POINTS))
            if not known.any():
                raise DataLacks(
                    f"{where}: align=points needs {', '.join(map(str, FIVE_POINTS))} landmarks; "
                    "set align=none"
                )
            faces = faces.take(known)
        found.append(faces)
    train, val, test = found
    if settings.augment.flip:
        mirrored_classes(data.manifest.mask_classes)  # before anything is trained: are they known?
    order = np.random.default_rng(settings.seed).permutation(len(train))
    return Splits(train.take(order), val, test)


def class_names(data: FaceData, faces: Faces) -> tuple[str, ...]:
    """Names from the manifest; where it has none, numbers, as `faces` have them."""
    if data.manifest.mask_classes:
        return tuple(data.manifest.mask_classes)
    most = max(int(read_picture(faces, row).mask.max()) for row in range(len(faces)))
    return ("background", *(f"class {number}" for number in range(1, most + 1)))


def _train(
    settings: Settings,
    pictures: int,
    net: DenseNet,
    frame: Frame,
    faces: Splits,
    by: dict[str, np.ndarray],
) -> tuple[Row, Predict]:
    """Trains on `faces.train`, as long as on `pictures`; scores on the test split by the epoch best
    on validation."""
    recipe = settings.dense_recipe(len(faces.train), pictures)
    example = functools.partial(frame.example, settings.augment)
    batches = DenseBatches(faces.train, example, recipe.batch_size, settings.seed)

    def score(predict: Predict) -> tuple[float, float]:
        return tuple(
            float(parsing_statistic(frame.confusions(predict, part))(np.ones((1, len(part))))[0, 0])
            for part in (faces.val, faces.test)
        )

    trained = train_dense(net, recipe, batches, cross_entropy, score, settings.seed)
    predict = functools.partial(net.predict, trained.arrays, batch_size=recipe.batch_size)
    confusions = frame.confusions(predict, faces.test)
    row = Row(trained, confusions, _measure(settings, confusions, faces))
    statistic = parsing_statistic(confusions)
    row.breakdowns = break_down(
        lambda weights: statistic(weights)[:, : len(METRICS)],
        faces.test.groups,
        by,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    return row, predict


def _measure(settings: Settings, confusions: np.ndarray, faces: Splits) -> list[Interval]:
    options = {"resamples": settings.resamples, "seed": settings.seed}
    return measure(parsing_statistic(confusions), faces.test.groups, **options)


def _always(maps: np.ndarray) -> Predict:
    """Says the same of every picture."""

    def predict(squares: Rows):
        for _ in range(len(squares)):
            yield maps[None]

    return predict


def _save(out: Path, net: DenseNet, frame: Frame, trained: TrainedDense, data: FaceData) -> None:
    described = data.describe()
    about = {
        "data": {name: described[name] for name in ("path", "manifest_sha256")},
        "frame": dataclasses.asdict(frame),
        "epoch": trained.epoch,
        "val_f1": float(trained.val.max()),
    }
    save_dense(out / FILE, "parsing", net, trained.arrays, about)
