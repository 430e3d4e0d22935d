"""Text-image retrieval with frozen towers: as the checkpoint is, and with trained heads.

Protocol: arXiv 2407.08515, table 1; celeba_caption_retrieval.py and celeba_dialog_retrieval.py of
the official code. Departures and their reasons: docs/downstream.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flip_jax.config import Config, LossConfig, OptimConfig
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.features import FeatureCache
from flip_jax.downstream.retrieval import Retrieval
from flip_jax.downstream.retrieval_features import (
    FrozenGallery,
    FusedTower,
    Heads,
    TrainPairs,
    heads_of,
    with_captions,
)
from flip_jax.downstream.retrieval_heads import TrainedHeads, mean_recall, train_heads
from flip_jax.downstream.retrieval_report import Outcome, retrieval_report
from flip_jax.downstream.retrieval_saved import FILE, load_heads, save_heads
from flip_jax.downstream.task_report import TaskReport

__all__ = ["RECIPES", "Recipe", "Settings", "load_heads", "run"]


@dataclass(frozen=True)
class Recipe:
    """What the two official recipes differ in."""

    lr: float
    epochs: int
    warmup_steps: int
    rerank: int


RECIPES = {
    "celeba_caption": Recipe(lr=3e-5, epochs=50, warmup_steps=2000, rerank=256),
    "celeba_dialog": Recipe(lr=3e-3, epochs=20, warmup_steps=500, rerank=32),
}


@dataclass(frozen=True)
class Settings:
    """What `--field=value` sets. None = as the recipe has it."""

    recipe: Literal["celeba_caption", "celeba_dialog"] = "celeba_dialog"
    train_heads: bool = True  # besides zero-shot: projections, ITM head and temperature, trained
    lr: float | None = None
    epochs: int | None = None
    warmup_steps: int | None = None  # within the first epoch, as in the reference
    rerank: int | None = None  # candidates that ITM re-ranks (k), at most the gallery; 0 = off
    # At re-ranking: `enc` as in training, `cls` as the reference evaluated.
    first_token: Literal["enc", "cls"] = "enc"
    batch_size: int = 64
    weight_decay: float = 0.05
    queue_size: int = 61_440  # at most the pictures of an epoch
    momentum: float = 0.995  # of the twin projections
    alpha: float = 0.4  # weight of the momentum targets
    # What two pictures of one group are in ITC, see `LossConfig`; the reference: negative. The
    # queue holds every picture of an epoch, so here that would be each picture against itself.
    same_group: Literal["negative", "ignore", "positive"] = "ignore"
    train_captions: int = 5  # at most so many of a training picture; one is drawn per epoch
    captions: int = 1  # at most so many of a picture to be found, its first ones
    pictures: int | None = 5000  # gallery: the first ones of the test split; None = all
    val_pictures: int | None = 1000
    train_split: str = "train"
    val_split: str = "val"  # where there is none, a tenth of the training groups
    test_split: str = "test"
    random_backbone: bool = True  # also the same on a random-initialised backbone
    by: str = ""  # columns to break the results down by, see `columns.read_columns`
    resamples: int = 1000  # of the bootstrap
    seed: int = 0  # of order, captions, negatives, queue and bootstrap

    def resolved(self) -> Settings:
        """With the recipe's values in place of None.

        Raises:
          ValueError: a number is out of range.
        """
        given = {n: v for n, v in vars(self).items() if v is not None}
        full = dataclasses.replace(self, **vars(RECIPES[self.recipe]) | given)
        _check(full)
        return full


_LEAST = {
    "epochs": 1,
    "warmup_steps": 0,
    "rerank": 0,
    "batch_size": 2,
    "weight_decay": 0,
    "queue_size": 1,
    "train_captions": 1,
    "captions": 1,
    "pictures": 2,
    "val_pictures": 2,
    "resamples": 1,
    "seed": 0,
}


def _check(settings: Settings) -> None:
    for name, least in _LEAST.items():
        value = getattr(settings, name)
        if value is not None and value < least:
            raise ValueError(f"settings.{name}={value}: must be at least {least}")
    if settings.lr <= 0:
        raise ValueError(f"settings.lr={settings.lr}: must be above 0")
    for name in ("momentum", "alpha"):
        if not 0 <= getattr(settings, name) <= 1:
            raise ValueError(f"settings.{name}={getattr(settings, name)}: must be in [0, 1]")


@dataclass(frozen=True)
class _Splits:
    """Faces with captions; `train` and `val` are None where nothing is trained."""

    train: Faces | None
    val: Faces | None
    test: Faces


def run(settings: Settings, backbone: Backbone, data: FaceData, out: Path) -> TaskReport:
    """Ranks the test split, trains heads, ranks it again; saves the heads in `out/heads.npz`.

    Raises:
      ValueError: a setting is out of range.
      DataLacks: the data has no captions, or too few pictures.
      OSError: data cannot be read, or `out` not be written.
      FloatingPointError: a loss is not a number.
    """
    settings = settings.resolved()
    splits = _splits(settings, data)
    columns = read_columns(settings.by, splits.test)
    backbones = {"trained": backbone}
    if settings.random_backbone:
        backbones["random"] = backbone.random_twin(settings.seed)
    outcomes = {
        label: _outcome(settings, label, one, splits, data.features)
        for label, one in backbones.items()
    }
    if trained := outcomes["trained"].trained:
        about = {"settings": dataclasses.asdict(settings), "epoch": trained.epoch}
        save_heads(out / FILE, backbone, trained.heads, about)
    return retrieval_report(settings, splits.test, outcomes, columns)


def _splits(settings: Settings, data: FaceData) -> _Splits:
    test = with_captions(data.split(settings.test_split), settings.pictures)
    train = val = None
    if settings.train_heads:
        train, val, _ = data.three_splits(
            settings.train_split, settings.val_split, settings.test_split
        )
        train, val = with_captions(train), with_captions(val, settings.val_pictures)
        if len(np.unique(train.groups)) < 2:
            raise DataLacks(
                f"{data.path}, split {settings.train_split!r}: its {len(train)} pictures with "
                "captions are of one group; ITM needs negatives of another"
            )
    return _Splits(train, val, test)


def _outcome(
    settings: Settings, label: str, backbone: Backbone, splits: _Splits, cache: FeatureCache
) -> Outcome:
    """What one backbone reaches, as it is and with trained heads."""
    tower = FusedTower(backbone, settings.first_token)
    gallery = FrozenGallery(tower, splits.test, settings.captions, cache)
    rank_test = _ranker(gallery, settings.rerank)
    found = {"zero-shot": rank_test(heads_of(backbone))}
    print(f"{label}: zero-shot mean recall {mean_recall(found['zero-shot']):.2f} %", flush=True)
    trained = None
    if settings.train_heads:
        trained = _train(settings, label, tower, splits, cache, rank_test)
        found["heads"] = rank_test(trained.heads)
        print(
            f"{label}: trained heads of epoch {trained.epoch}, mean recall "
            f"{mean_recall(found['heads']):.2f} %",
            flush=True,
        )
    gallery.forget()
    return Outcome(found, trained, gallery, len(splits.val) if trained else 0)


def _ranker(gallery: FrozenGallery, rerank: int) -> Callable[[Heads], Retrieval]:
    k = min(rerank, len(gallery.faces), len(gallery.texts))
    return lambda heads: gallery.rank(heads, k)


def _train(
    settings: Settings,
    label: str,
    tower: FusedTower,
    splits: _Splits,
    cache: FeatureCache,
    rank_test: Callable[[Heads], Retrieval],
) -> TrainedHeads:
    backbone = tower.backbone
    pairs = TrainPairs(backbone, splits.train, settings.train_captions, cache)
    gallery = FrozenGallery(tower, splits.val, settings.captions, cache)
    return train_heads(
        training_config(settings, len(pairs), backbone.mesh.size),
        backbone,
        pairs,
        _ranker(gallery, settings.rerank),
        rank_test,
        log=lambda line: print(f"{label}: {line}", flush=True),
    )


def training_config(settings: Settings, pictures: int, devices: int) -> Config:
    """The settings of a training, cut to what so many pictures allow.

    Args:
      settings: resolved.

    Raises:
      DataLacks: fewer pictures than devices, or than two.
    """
    size = min(settings.batch_size, pictures) // devices * devices
    if size < 2:
        raise DataLacks(
            f"{pictures} training pictures with captions, batches of {settings.batch_size} and "
            f"{devices} devices: at least 2 pictures, and one per device, are needed in a batch"
        )
    steps = pictures // size
    cfg = Config()
    return dataclasses.replace(
        cfg,
        loss=LossConfig(
            momentum=settings.momentum,
            queue_size=max(min(settings.queue_size, steps * size), size),
            alpha=settings.alpha,
            same_group=settings.same_group,
        ),
        optim=OptimConfig(
            lr=settings.lr,
            min_lr=0.0,
            warmup_steps=min(settings.warmup_steps, steps),
            schedule="cosine",
            weight_decay=settings.weight_decay,
        ),
        data=dataclasses.replace(cfg.data, batch_size=size),
        epochs=settings.epochs,
        seed=settings.seed,
    )
