"""Attributes, parsing and landmarks in one pass: one dense head with three outputs.

What arXiv 2403.12960 (FaceXFormer) asks of one network, by the neck and decoder of FaRL's protocol
(arXiv 2112.03109, section 4) on an image tower that is frozen or fine-tuned with them.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np

from flip_jax.downstream.alignment_metrics import normalizers_of
from flip_jax.downstream.alignment_scoring import Truth, usable
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.dense_augment import flip_points, mirrored_classes
from flip_jax.downstream.dense_pictures import DenseBatches
from flip_jax.downstream.dense_saved import save_dense
from flip_jax.downstream.dense_training import DenseNet, Predict, TrainedDense, train_dense
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces, Splits
from flip_jax.downstream.intervals import Statistic, break_down, measure
from flip_jax.downstream.multitask_figure import OVERLAY, write_overlay
from flip_jax.downstream.multitask_report import Row, multitask_report
from flip_jax.downstream.multitask_saved import FILE, load_reader
from flip_jax.downstream.multitask_scoring import Frame, joint_loss, multitask
from flip_jax.downstream.multitask_settings import Settings
from flip_jax.downstream.parsing import class_names
from flip_jax.downstream.task_report import TaskReport

__all__ = ["OVERLAY", "Settings", "load_reader", "run"]

# Training pictures that the row `chance` is counted on, at most.
_USUAL_PICTURES = 2000


def run(settings: Settings, backbone: Backbone, data: FaceData, out: Path) -> TaskReport:
    """Trains and scores a head per backbone and fraction; leaves the last one in `out/reader.npz`.

    Raises:
      ValueError: a setting is out of range, or a mask cannot be used.
      DataLacks: no face has both a mask and landmarks, or there are landmarks of several schemes.
      OSError: data cannot be read, or `out` not be written.
      FloatingPointError: a training diverged.
    """
    settings = settings.resolved(backbone.image_size)
    faces, frame = _faces(settings, data)
    percents = settings.percents()
    sizes = {p: max(round(len(faces.train) * p / 100), 1) for p in percents}
    columns = read_columns(settings.by, faces.test)
    cells = 4 * (settings.size // backbone.cfg.model.vision.patch_size)
    output = multitask(frame.parts, cells)
    backbones = {"trained": backbone}
    if settings.random_backbone:
        backbones["random"] = backbone.random_twin()
    rows: dict[str, dict[float, Row]] = {}
    for label, one in backbones.items():
        sized = {"size": settings.size, "channels": settings.channels}
        net = DenseNet(one, output, **sized, finetune=settings.finetune)
        rows[label] = {}
        for percent, size in sizes.items():
            print(f"{label} backbone, {percent:g} % of the training pictures", flush=True)
            last = percent == percents[-1]
            part = dataclasses.replace(faces, train=faces.train.take(range(size)))
            trained, predict = _train(settings, len(faces.train), net, frame, part)
            statistic = frame.statistic(frame.read(predict, faces.test), *_test(frame, faces))
            rows[label][percent] = _row(
                settings, statistic, faces, columns if last else {}, trained
            )
            if label == "trained" and last:
                _save(out, net, frame, trained, data)
                write_overlay(out, frame, predict, faces.test)
    some = faces.train.take(range(min(len(faces.train), _USUAL_PICTURES)))
    usual = frame.read_blindly(some, faces.test)
    chance = _row(settings, frame.statistic(usual, *_test(frame, faces)), faces, {})
    return multitask_report(settings, frame, vars(faces), sizes, rows, chance.numbers)


def _faces(settings: Settings, data: FaceData) -> tuple[Splits, Frame]:
    three = data.three_splits(settings.train_split, settings.val_split, settings.test_split)
    found, numbers = {}, set()
    for name, faces in zip(("train", "val", "test"), three, strict=True):
        both = faces.take(faces.masked & (faces.points > 0))
        if not len(both):
            where = f"{data.path}, split {faces.source.split!r}"
            raise DataLacks(f"{where}: no record has both a mask and landmarks")
        numbers |= set(both.points.tolist())
        found[name] = both
    if len(numbers) > 1:
        raise DataLacks(
            f"{data.path}: faces with {', '.join(map(str, sorted(numbers)))} landmarks; one scheme "
            "for all is needed"
        )
    frame = Frame(class_names(data, found["train"]), *numbers, settings.size)
    found = {name: part.take(usable(frame.marks, part)[0]) for name, part in found.items()}
    for name, part in found.items():
        if not len(part):
            raise DataLacks(f"{data.path}: no face of the {name} split has a point that is known")
    if settings.augment.flip:
        # Before anything is trained: are mirror images known?
        flip_points(np.zeros(frame.points))
        mirrored_classes(data.manifest.mask_classes)
    order = np.random.default_rng(settings.seed).permutation(len(found["train"]))
    return Splits(**found | {"train": found["train"].take(order)}), frame


def _test(frame: Frame, faces: Splits) -> tuple[Faces, Truth]:
    return faces.test, Truth.of(frame.marks, faces.test)


def _train(
    settings: Settings, pictures: int, net: DenseNet, frame: Frame, faces: Splits
) -> tuple[TrainedDense, Predict]:
    """Trains on `faces.train`, as long as on `pictures`; what the epoch best on validation says."""
    recipe = settings.dense_recipe(len(faces.train), pictures)
    example = functools.partial(frame.example, settings.augment)
    batches = DenseBatches(faces.train, example, recipe.batch_size, settings.seed)
    parts = [(one, Truth.of(frame.marks, one)) for one in (faces.val, faces.test)]

    def score(predict: Predict) -> tuple[float, float]:
        return tuple(
            _score(frame, frame.statistic(frame.read(predict, one), one, truth), len(one))
            for one, truth in parts
        )

    loss = joint_loss(frame.parts, frame.size, settings.three_weights())
    trained = train_dense(net, recipe, batches, loss, score, settings.seed)
    return trained, functools.partial(net.predict, trained.arrays, batch_size=recipe.batch_size)


def _score(frame: Frame, statistic: Statistic, rows: int) -> float:
    """What the epoch is chosen by: the mean of F1, AP and 100 - NME, of those that are defined."""
    named = dict(zip(frame.metrics(), statistic(np.ones((1, rows), np.float32))[0], strict=True))
    error = named[f"NME {normalizers_of(frame.points)[0]}"]
    return float(np.nanmean([named["F1"], named["AP"], 100 - error]))


def _row(
    settings: Settings,
    statistic: Statistic,
    faces: Splits,
    by: dict[str, np.ndarray],
    trained: TrainedDense | None = None,
) -> Row:
    options = {"resamples": settings.resamples, "seed": settings.seed}
    numbers = measure(statistic, faces.test.groups, **options)
    return Row(trained, numbers, break_down(statistic, faces.test.groups, by, **options))


def _save(out: Path, net: DenseNet, frame: Frame, trained: TrainedDense, data: FaceData) -> None:
    described = data.describe()
    about = {
        "data": {name: described[name] for name in ("path", "manifest_sha256")},
        "frame": dataclasses.asdict(frame),
        "epoch": trained.epoch,
        "val_score": float(trained.val.max()),
    }
    save_dense(out / FILE, "multitask", net, trained.arrays, about)
