"""Face alignment: where the landmarks are, by a heatmap head on an image tower.

Protocol: arXiv 2112.03109 (FaRL), section 4; departures and their reasons: docs/alignment.md.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from flip_jax.downstream.alignment_figure import OVERLAYS, write_overlays
from flip_jax.downstream.alignment_metrics import normalizers_of
from flip_jax.downstream.alignment_report import Outcome, alignment_report
from flip_jax.downstream.alignment_saved import FILE, load_aligner
from flip_jax.downstream.alignment_scoring import Frame, Truth, heatmaps, point_loss, usable
from flip_jax.downstream.alignment_settings import RECIPES, Recipe, Settings
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.dense_augment import flip_points
from flip_jax.downstream.dense_pictures import DenseBatches
from flip_jax.downstream.dense_saved import save_dense
from flip_jax.downstream.dense_training import DenseNet, Predict, TrainedDense, train_dense
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces, Splits
from flip_jax.downstream.intervals import Interval, bootstrap, break_down, intervals, mean_of
from flip_jax.downstream.task_report import TaskReport

__all__ = ["OVERLAYS", "RECIPES", "Recipe", "Settings", "load_aligner", "run"]


def run(settings: Settings, backbone: Backbone, data: FaceData, out: Path) -> TaskReport:
    """Trains and scores a head per backbone and fraction; leaves the last one in
    `out/aligner.npz`.

    Raises:
      ValueError: a setting is out of range, or does not fit the data's landmarks.
      DataLacks: the data has no landmarks, or those of several schemes.
      OSError: data cannot be read, or `out` not be written.
      FloatingPointError: a training diverged.
    """
    settings = settings.resolved(backbone.image_size, backbone.cfg.model.vision.patch_size)
    faces, frame, left_out = _faces(settings, data)
    settings = dataclasses.replace(settings, normalizer=_normalizer(settings, frame.points))
    percents = settings.percents()
    sizes = {p: max(round(len(faces.train) * p / 100), 1) for p in percents}
    columns = read_columns(settings.by, faces.test)
    truth = {name: Truth.of(frame, vars(faces)[name]) for name in ("val", "test")}
    _check_lengths(settings.normalizer, truth)
    shape = frame.mean_shape(faces.train)
    chance = _outcome(settings, None, _always(shape, frame, faces.test), truth["test"], faces, {})
    backbones = {"trained": backbone}
    if settings.random_backbone:
        backbones["random"] = backbone.random_twin()
    rows: dict[str, dict[float, Outcome]] = {}
    for label, one in backbones.items():
        sized = {"size": settings.size, "channels": settings.channels}
        output = heatmaps(frame.points, frame.cells)
        net = DenseNet(one, output, **sized, finetune=settings.finetune)
        rows[label] = {}
        for percent, size in sizes.items():
            print(f"{label} backbone, {percent:g} % of the training pictures", flush=True)
            part = dataclasses.replace(faces, train=faces.train.take(range(size)))
            trained, predicted = _train(settings, len(faces.train), net, frame, part, truth)
            by = columns if percent == percents[-1] else {}
            found = _outcome(settings, trained, predicted, truth["test"], faces, by)
            rows[label][percent] = found
            if label == "trained" and percent == percents[-1]:
                _save(out, net, frame, trained, data)
                write_overlays(out, frame, faces.test, predicted, truth["test"], found.errors)
    return alignment_report(
        settings, frame, vars(faces), left_out, truth["test"], sizes, rows, chance
    )


def _faces(settings: Settings, data: FaceData) -> tuple[Splits, Frame, dict[str, tuple[int, int]]]:
    """Faces that can be used; per split how many with landmarks cannot, and how many had to be
    given a box."""
    three = data.three_splits(settings.train_split, settings.val_split, settings.test_split)
    splits = dict(zip(("train", "val", "test"), three, strict=True))
    numbers = {int(n) for faces in splits.values() for n in faces.points[faces.points > 0]}
    if len(numbers) > 1:
        raise DataLacks(
            f"{data.path}: faces with {', '.join(map(str, sorted(numbers)))} landmarks; alignment "
            "needs one scheme for all"
        )
    found, counts = {}, {}
    for name, faces in splits.items():
        where = f"{data.path}, split {faces.source.split!r}"
        if not faces.points.any():
            raise DataLacks(f"{where}: no record has landmarks")
        faces = faces.take(faces.points > 0)
        sizes = settings.size, settings.heatmap, settings.crop, settings.hidden
        frame = Frame(*numbers, *sizes)
        good, given = usable(frame, faces)
        if not good.any():
            raise DataLacks(f"{where}: no face has both a box that is not empty and a known point")
        found[name], counts[name] = faces.take(good), (int((~good).sum()), given)
    if settings.augment.flip:
        flip_points(np.zeros(frame.points))  # before anything is trained: is the scheme known?
    order = np.random.default_rng(settings.seed).permutation(len(found["train"]))
    return Splits(**found | {"train": found["train"].take(order)}), frame, counts


def _normalizer(settings: Settings, points: int) -> str:
    kinds = normalizers_of(points)
    kind = settings.normalizer or kinds[0]
    if kind not in kinds:
        raise ValueError(
            f"settings.normalizer={kind!r}: {points} points have no such length; there are "
            f"{', '.join(kinds)}"
        )
    return kind


def _check_lengths(kind: str, truth: dict[str, Truth]) -> None:
    for name, part in truth.items():
        if not np.isfinite(part.errors(kind, part.points)).any():
            raise DataLacks(
                f"no face of the {name} split has the length {kind!r}: points that it is taken "
                "between are hidden; set normalizer=diagonal or hidden=count"
            )


def _train(
    settings: Settings,
    pictures: int,
    net: DenseNet,
    frame: Frame,
    faces: Splits,
    truth: dict[str, Truth],
) -> tuple[TrainedDense, np.ndarray]:
    """Trains on `faces.train`, as long as on `pictures`; what is found on the test split by the
    epoch best on validation, [N, P, 2]."""
    recipe = settings.dense_recipe(len(faces.train), pictures)
    example = functools.partial(frame.example, settings.augment)
    batches = DenseBatches(faces.train, example, recipe.batch_size, settings.seed)
    # What was found at each evaluation is small, and the best one is wanted in the end.
    best: dict[str, np.ndarray | float] = {"val": -np.inf}

    def score(predict: Predict) -> tuple[float, float]:
        """NME with the sign turned: higher is better."""
        found = {name: frame.predict(predict, getattr(faces, name)) for name in truth}
        val, test = (
            -100 * float(np.nanmean(part.errors(settings.normalizer, found[name])))
            for name, part in truth.items()
        )
        if val > best["val"]:
            best.update(val=val, points=found["test"])
        return val, test

    trained = train_dense(net, recipe, batches, point_loss(frame.size), score, settings.seed)
    return trained, best["points"]


def _outcome(
    settings: Settings,
    trained: TrainedDense | None,
    predicted: np.ndarray,
    truth: Truth,
    faces: Splits,
    by: dict[str, np.ndarray],
) -> Outcome:
    numbers = truth.numbers(predicted)
    statistic, groups = mean_of(numbers), faces.test.groups
    options = {"resamples": settings.resamples, "seed": settings.seed}

    def of(rows: np.ndarray | None) -> list[Interval]:
        return intervals(*bootstrap(statistic, groups, rows=rows, **options))

    return Outcome(
        trained=trained,
        predicted=predicted,
        errors=truth.errors(settings.normalizer, predicted),
        numbers=of(None),
        subsets={name: of(rows) for name, rows in truth.subsets.items()},
        breakdowns=break_down(statistic, groups, by, **options),
    )


def _always(shape: np.ndarray, frame: Frame, faces: Faces) -> np.ndarray:
    """The same shape [P, 2] in every face's crop, in pixels of the pictures: [N, P, 2]."""
    return frame.take_back(np.broadcast_to(shape, (len(faces), *shape.shape)), faces)


def _save(out: Path, net: DenseNet, frame: Frame, trained: TrainedDense, data: FaceData) -> None:
    described = data.describe()
    about = {
        "data": {name: described[name] for name in ("path", "manifest_sha256")},
        "frame": dataclasses.asdict(frame),
        "epoch": trained.epoch,
        "val_nme": float(-trained.val.max()),
    }
    save_dense(out / FILE, "alignment", net, trained.arrays, about)
