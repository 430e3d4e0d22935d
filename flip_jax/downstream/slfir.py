"""Sketch-less face image retrieval: a sketch finds its photo before it is finished.

Heads are trained on frozen encoders, on sketches at all stages; every stage of a test sketch then
ranks a gallery, by itself and together with a caption. Protocol and metrics: `slfir_metrics`;
departures from the published one and their reasons: docs/slfir.md.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.columns import read_columns
from flip_jax.downstream.face_data import DataLacks, FaceData
from flip_jax.downstream.features import FeatureCache
from flip_jax.downstream.retrieval import rerank, search
from flip_jax.downstream.retrieval_features import FrozenGallery, FusedTower
from flip_jax.downstream.slfir_features import (
    Matches,
    PairFeatures,
    encode_faces,
    frozen_heads,
    fused_features,
    hard_matches,
)
from flip_jax.downstream.slfir_figure import SHOWN
from flip_jax.downstream.slfir_heads import (
    Heads,
    Recipe,
    TrainedHeads,
    embed,
    together,
    train_heads,
)
from flip_jax.downstream.slfir_report import QUERIES, TITLES, Outcome, Tested, slfir_report
from flip_jax.downstream.slfir_saved import load_model, save_heads
from flip_jax.downstream.slfir_sketches import SUBJECTS, SketchFaces, pair_rows
from flip_jax.downstream.task_report import TaskReport

__all__ = ["Settings", "load_model", "run"]


@dataclass(frozen=True)
class Settings:
    """What `--field=value` sets."""

    steps: int = 50  # of every sketch: 50 in FLIP's evaluation, 70 in SLFIR's
    # Whose sketch is to find a photo: `photo`, that of the photo itself, as published, and `other`,
    # that of another picture of the person. Both are done, each with heads of its own; the second
    # only where people have two pictures.
    subjects: str = "photo other"
    # How far off the hand is that copies lines of drawn faces, which are those of the picture, see
    # `sketch_strokes.by_hand`; 0 = exact. Drawings of artists stay as they are.
    hand: float = 1.0
    # What the linear layers look at: `class`, the class token; `layers`, several blocks as well;
    # `grid`, also where on the sheet things are.
    features: Literal["class", "layers", "grid"] = "grid"
    train_steps: int = 10  # of each training and validation sketch, one from each tenth
    captions: int = 4  # of each training photo, at most
    negatives: int = 4  # draws of hard negatives for ITM
    epochs: int = 100
    batch_size: int = 128  # at most; a smaller training split is one batch
    rates: str = "0.001 0.0003"  # trained side by side, the best on validation counts
    weight_decay: float = 0.05
    rerank: int = 16  # best photos of a query with a caption that ITM orders anew; 0 = off
    train_split: str = "train"
    val_split: str = "val"  # where there is none, a tenth of the training groups
    test_split: str = "test"
    random_backbone: bool = True  # also the same on a random-initialised backbone
    by: str = ""  # columns to break the results down by, see `columns.read_columns`
    resamples: int = 1000  # of the bootstrap
    seed: int = 0


@dataclass(frozen=True)
class _Splits:
    train: SketchFaces
    val: SketchFaces
    test: SketchFaces


@dataclass(frozen=True)
class _Encoded:
    """What one backbone makes of the three splits."""

    tower: FusedTower
    gallery: FrozenGallery  # the test photos, a caption each
    features: dict[str, PairFeatures]
    matches: Matches  # of the training split
    frozen: Heads  # the heads of the backbone


def run(settings: Settings, backbone: Backbone, data: FaceData, out: Path) -> TaskReport:
    """Trains and scores heads; saves them in `out/heads-photo.npz` and `out/heads-other.npz`.

    Raises:
      ValueError: a setting is out of range, or a sketch cannot be read.
      DataLacks: the data has no sketches, no captions, or too few people.
      OSError: data cannot be read, or `out` not be written.
      FloatingPointError: a training failed.
    """
    rates, subjects = _check(settings)
    splits = _split(settings, data, subjects)
    pairs = {s: _pairs(splits, s) for s in subjects}
    pairs = {s: rows for s, rows in pairs.items() if rows is not None}
    if not pairs:
        raise DataLacks(
            f"{data.path}: subjects={settings.subjects!r} needs people with two pictures in every "
            "split; set subjects=photo"
        )
    read_columns(settings.by, splits.test.faces)  # a misspelt one is told before the training
    backbones = {"trained": backbone}
    if settings.random_backbone:
        backbones["random"] = backbone.random_twin()
    outcomes: dict[str, dict[str, Outcome]] = {subject: {} for subject in pairs}
    for label, one in backbones.items():
        encoded = _encode(settings, one, splits, data)
        for subject, rows in pairs.items():
            fitted = _train(settings, rates, encoded, rows)
            k = settings.rerank if label == "trained" else 0
            outcomes[subject][label] = _rank(encoded, rows["test"], fitted, k)
            print(f"{label}, {TITLES[subject]}: {_line(outcomes[subject][label])}", flush=True)
            if label == "trained":
                about = {"data": str(data.path), "subject": subject}
                about |= {"rate": fitted.rate, "epoch": fitted.epoch}
                path = out / f"heads-{subject}.npz"
                save_heads(path, one, fitted.heads, settings.features, about)
    tested = {subject: Tested(splits.test, *rows["test"]) for subject, rows in pairs.items()}
    return slfir_report(settings, tested, outcomes)


def _check(settings: Settings) -> tuple[tuple[float, ...], list[str]]:
    """Learning rates, and subjects in the order of `SUBJECTS`."""
    try:
        rates = tuple(float(word) for word in settings.rates.replace(",", " ").split())
    except ValueError:
        rates = ()
    if not rates or not all(0 < rate < np.inf for rate in rates):
        raise ValueError(f"settings.rates={settings.rates!r}: must be numbers above 0")
    subjects = settings.subjects.replace(",", " ").split()
    if not subjects or set(subjects) - set(SUBJECTS):
        raise ValueError(
            f"settings.subjects={settings.subjects!r}: must be {' or '.join(SUBJECTS)}, or both"
        )
    least = dict.fromkeys(
        ("steps", "train_steps", "captions", "negatives", "epochs", "batch_size", "resamples"), 1
    )
    for name, low in (least | {"rerank": 0, "weight_decay": 0, "hand": 0, "seed": 0}).items():
        if getattr(settings, name) < low:
            value = getattr(settings, name)
            raise ValueError(f"settings.{name}={value}: must be at least {low}")
    return rates, [name for name in SUBJECTS if name in subjects]


def _split(settings: Settings, data: FaceData, subjects: list[str]) -> _Splits:
    train, val, test = data.three_splits(
        settings.train_split, settings.val_split, settings.test_split
    )
    each = 2 if "other" in subjects else 1
    given = {"steps": settings.steps, "hand": settings.hand}
    splits = _Splits(
        train=SketchFaces(train, **given),
        val=SketchFaces(val, **given, per_person=each),
        test=SketchFaces(test, **given, per_person=each),
    )
    people = {name: set(one.faces.group_ids) for name, one in vars(splits).items()}
    for name, found in people.items():
        if len(found) < 2:
            raise DataLacks(
                f"{data.path}: one person with a sketch and a caption for {name}; retrieval needs "
                "2 or more"
            )
    for one, other in itertools.combinations(people, 2):
        if both := people[one] & people[other]:
            raise DataLacks(
                f"{data.path}: {len(both)} people, such as {min(both)!r}, are there for {one} and "
                f"for {other}; the splits must not share people"
            )
    return splits


_Rows = dict[str, tuple[np.ndarray, np.ndarray]]  # split -> (photos, sketches)


def _pairs(splits: _Splits, subject: str) -> _Rows | None:
    """Which sketch is to find which photo; None where a split has fewer than two such pairs."""
    rows = {
        name: pair_rows(sketches.faces.groups, subject, one_each=name != "train")
        for name, sketches in vars(splits).items()
    }
    return None if min(len(photos) for photos, _ in rows.values()) < 2 else rows


def _encode(settings: Settings, backbone: Backbone, splits: _Splits, data: FaceData) -> _Encoded:
    tower, cache = FusedTower(backbone, "enc"), data.features
    galleries, features = {}, {}
    for number, (name, drawn) in enumerate(vars(splits).items()):
        captions = 1 if name == "test" else settings.captions
        gallery = FrozenGallery(tower, drawn.faces, captions, cache)
        chosen = drawn.some_steps(settings.train_steps, settings.seed + number)
        if name == "test":
            chosen = drawn.all_steps()
        galleries[name] = gallery
        features[name] = encode_faces(backbone, drawn, chosen, gallery, settings.features, cache)
    train = features["train"]
    frozen = frozen_heads(backbone.params, train.photo.shape[1])
    options = cache, settings.negatives, settings.seed
    matches = hard_matches(tower, galleries["train"], embed(frozen, train), train.group, *options)
    return _Encoded(tower, galleries["test"], features, matches, frozen)


def _train(
    settings: Settings, rates: tuple[float, ...], encoded: _Encoded, rows: _Rows
) -> TrainedHeads:
    """Heads for one kind of pairs."""
    loss = encoded.tower.backbone.cfg.loss
    recipe = Recipe(
        settings.epochs,
        settings.batch_size,
        settings.weight_decay,
        loss.temperature_min,
        loss.temperature_max,
    )
    train, val = (encoded.features[name].take(*rows[name]) for name in ("train", "val"))
    matches = encoded.matches.take(rows["train"][0])
    return train_heads(recipe, rates, encoded.frozen, train, matches, val, settings.seed)


def _rank(
    encoded: _Encoded, rows: tuple[np.ndarray, np.ndarray], fitted: TrainedHeads, k: int
) -> Outcome:
    """Ranks the test photos, by trained heads and by those of the backbone.

    Args:
      k: best photos of a query with a caption to re-rank; 0 = none.
    """
    outcome, features = Outcome(fitted), encoded.features["test"].take(*rows)
    for row, heads in (("trained", fitted.heads), ("frozen", encoded.frozen)):
        embeds = embed(heads, features)
        photos, count, steps = embeds["photo"], *embeds["sketch"].shape[:2]
        kept = min(max(k, SHOWN), count)
        tops = {name: _search(query, photos, kept) for name, query in _queries(embeds).items()}
        outcome.ranks[row] = {
            name: _per_step(top["rank"], count, steps) for name, top in tops.items()
        }
        if row == "frozen":
            continue
        outcome.top = tops["sketch"]["top"][:, :SHOWN].reshape(count, steps, -1)
        if k:
            outcome.ranks["re-ranked"] = {
                name: _per_step(_rerank(tops[name], k, encoded, rows[0], heads), count, steps)
                for name in ("caption", "both")
            }
    return outcome


def _queries(embeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The `QUERIES` float32: [P, T, E], [P, 1, E], [P, T, E]."""
    text = embeds["text"][:, :1]
    both = np.asarray(together(embeds["sketch"], text))
    return dict(zip(QUERIES, (embeds["sketch"], text, both), strict=True))


def _search(queries: np.ndarray, photos: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """See `retrieval.search`; queries [P, T, E] become P * T rows."""
    own = np.arange(len(photos))
    flat = queries.reshape(-1, queries.shape[-1])
    return search(flat, photos, np.repeat(own, queries.shape[1]), own, k)


def _per_step(ranks: np.ndarray, count: int, steps: int) -> np.ndarray:
    """Ranks from 0, [P * T] or [P] of a query without steps -> ranks from 1, [P, T]."""
    return np.broadcast_to(1 + ranks.reshape(count, -1), (count, steps))


def _rerank(
    top: dict[str, np.ndarray], k: int, encoded: _Encoded, photos: np.ndarray, heads: Heads
) -> np.ndarray:
    """Ranks from 0 when ITM logit + cosine order the best k of a search.

    Args:
      photos: int [P], numbers of the photos in the test gallery, which has a caption for each.
    """
    top = {name: array if array.ndim == 1 else array[:, :k] for name, array in top.items()}
    images = photos[top["top"]]
    texts = np.repeat(photos, len(images) // len(photos))[:, None]
    texts = np.broadcast_to(texts, images.shape)
    # Other heads ask for other pairs: nothing to keep.
    pairs = images.ravel(), texts.ravel(), FeatureCache(None)
    fused = fused_features(encoded.tower, encoded.gallery, *pairs)
    logits = fused @ heads["match"]["kernel"][:, 1] + heads["match"]["bias"][1]
    return rerank(top, logits.reshape(images.shape))[0]


def _line(outcome: Outcome) -> str:
    numbers = [
        f"{query} m@B {np.mean(100.0 / ranks):.2f}, A@10 {100 * np.mean(ranks[:, -1] <= 10):.2f}"
        for query, ranks in outcome.ranks["trained"].items()
    ]
    return f"{'; '.join(numbers)}; rate {outcome.trained.rate:g}, epoch {outcome.trained.epoch}"
