"""Faces with landmarks on their way into the network, and points on their way back."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import jax
import numpy as np

from flip_jax.downstream.alignment_metrics import (
    area_shares,
    face_errors,
    failures,
    lengths,
    normalizers_of,
)
from flip_jax.downstream.dense_augment import (
    Augment,
    change_pixels,
    flip_points,
    random_affine,
)
from flip_jax.downstream.dense_geometry import Geometry
from flip_jax.downstream.dense_pictures import DensePicture, Squares
from flip_jax.downstream.dense_training import Batch, Loss, Output, Predict
from flip_jax.downstream.faces import Faces
from flip_jax.losses.heatmap import empty_logit, landmark_loss, soft_argmax
from flip_jax.models.heads import HeatmapHead

Array = jax.Array

AUC_BOX, AUC_MAIN = 0.07, 0.10  # thresholds that AFLW-19 and WFLW are reported with


class Marked(Protocol):
    """What records and pictures have in common."""

    landmarks: np.ndarray | None
    visible: np.ndarray | None
    box: np.ndarray | None


@functools.cache
def heatmaps(points: int, cells: int) -> Output:
    """Makes the output of a head; one object per pair, as `DenseNet` asks for."""
    options = {"side": cells, "bias": empty_logit(cells)}
    return lambda channels, rngs: HeatmapHead(channels, points, rngs, **options)


@functools.cache
def point_loss(size: int) -> Loss:
    """The loss for inputs of `size` pixels, one object per size."""

    def loss(logits: Array, batch: Batch) -> Array:
        return landmark_loss(logits, batch["points"], batch["known"], size)[0]

    return loss


@dataclass(frozen=True)
class Frame:
    """How faces get into the network.

    Attributes:
      points: P.
      size: S, pixels of the network's input; cells: of a side of the heatmaps.
      crop: of the input's side, what the longer side of the face's box takes.
      hidden: whether points that were not seen are known: `count` or `leave`.
    """

    points: int
    size: int
    cells: int
    crop: float
    hidden: str

    def known(self, face: Marked) -> np.ndarray:
        """bool [P]"""
        if face.visible is None or self.hidden == "count":
            return np.ones(self.points, bool)
        return face.visible == 1

    def box(self, face: Marked) -> np.ndarray | None:
        """float64 [4], the smallest around the known points where the face has none; None where
        it would be empty."""
        box = face.box
        if box is None:
            points = face.landmarks[self.known(face)]
            if not len(points):
                return None
            box = np.concatenate([points.min(0), points.max(0)])
        return np.float64(box) if (box[2:] > box[:2]).all() else None

    def place(self, face: Marked) -> Geometry:
        """Of a face that has a box."""
        return Geometry(crop_matrix(self.box(face), self.crop, self.size), self.size)

    def example(
        self, augment: Augment, picture: DensePicture, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`image` uint8 [S, S, 3], `points` float32 [P, 2] and `known` bool [P] for training."""
        square, mirrored = random_affine(augment, self.size, rng)
        geometry = self.place(picture).then(square)
        points, known = geometry.forward(picture.landmarks), self.known(picture)
        if mirrored:
            points, known = flip_points(points), flip_points(known)
        return {
            "image": change_pixels(augment, geometry.place_image(picture.image), rng),
            "points": points.astype(np.float32),
            "known": known,
        }

    def predict(self, predict: Predict, faces: Faces) -> np.ndarray:
        """float64 [N, P, 2], what a net finds, in pixels of the pictures."""
        found = [point_of(maps, self.size) for maps in predict(Squares(faces, self.place))]
        return self.take_back(np.concatenate(found), faces)

    def take_back(self, points: np.ndarray, faces: Faces) -> np.ndarray:
        """Points of the input [N, P, 2] -> of the pictures, float64."""
        places = (self.place(faces.record(row)) for row in range(len(faces)))
        pairs = zip(places, np.float64(points), strict=True)
        return np.stack([place.inverse(own) for place, own in pairs])

    def mean_shape(self, faces: Faces) -> np.ndarray:
        """float64 [P, 2]: the mean of each point in the input; the middle if it is never known."""
        total, count = np.zeros((self.points, 2)), np.zeros((self.points, 1))
        for row in range(len(faces)):
            record = faces.record(row)
            known = self.known(record)[:, None]
            total += np.where(known, self.place(record).forward(record.landmarks), 0.0)
            count += known
        return np.where(count > 0, total / np.maximum(count, 1), (self.size - 1) / 2)


def crop_matrix(box: np.ndarray, crop: float, size: int) -> np.ndarray:
    """[2, 3]: the square around a box onto the square of `size` pixels.

    The middles fall on each other, and the longer side of the box takes `crop` of the square.
    """
    scale = crop * size / (box[2:] - box[:2]).max()
    shift = (size - 1) / 2 - scale * (box[:2] + box[2:]) / 2
    return np.column_stack([scale * np.eye(2), shift])


def point_of(maps: np.ndarray, size: int) -> np.ndarray:
    """Logits of heatmaps [n, G, G, P] -> float32 [n, P, 2] in pixels of the input."""
    return np.asarray(_soft_argmax(maps, size))


_soft_argmax = jax.jit(soft_argmax, static_argnums=1)


@dataclass(frozen=True, eq=False)
class Truth:
    """What is known of the faces of a split. N faces.

    Attributes:
      points: float64 [N, P, 2], pixels of the pictures; known: bool [N, P]; boxes: [N, 4].
      subsets: name -> bool [N].
    """

    points: np.ndarray
    known: np.ndarray
    boxes: np.ndarray
    subsets: dict[str, np.ndarray]

    @classmethod
    def of(cls, frame: Frame, faces: Faces) -> Truth:
        records = [faces.record(row) for row in range(len(faces))]
        names = sorted({name for record in records for name in record.subsets})
        return cls(
            np.stack([record.landmarks for record in records]).astype(np.float64),
            np.stack([frame.known(record) for record in records]),
            np.stack([frame.box(record) for record in records]),
            {name: np.array([name in record.subsets for record in records]) for name in names},
        )

    def errors(self, kind: str, predicted: np.ndarray) -> np.ndarray:
        """NME of each face, float64 [N], not in percent; see `alignment_metrics`."""
        length = lengths(kind, self.points, self.known, self.boxes)
        return face_errors(predicted, self.points, self.known, length)

    def numbers(self, predicted: np.ndarray) -> np.ndarray:
        """float64 [N, M] in percent, whose means are the `metrics_of`; NaN where not defined."""
        kinds = normalizers_of(self.points.shape[1])
        errors = {kind: self.errors(kind, predicted) for kind in kinds}
        main = errors[kinds[0]]
        shares = area_shares(errors["box"], AUC_BOX), area_shares(main, AUC_MAIN)
        return 100 * np.stack([*errors.values(), *shares, failures(main, AUC_MAIN)], axis=1)


def metrics_of(points: int) -> list[str]:
    """Names of the columns of `Truth.numbers`."""
    kinds = normalizers_of(points)
    thresholds = [
        f"AUC {AUC_BOX:.0%} box",
        *(f"{name} {AUC_MAIN:.0%} {kinds[0]}" for name in ("AUC", "FR")),
    ]
    return [*(f"NME {kind}" for kind in kinds), *thresholds]


def usable(frame: Frame, faces: Faces) -> tuple[np.ndarray, int]:
    """(bool [N], whether a face has a box and a known point; how many of them had no box of their
    own)."""
    records: Sequence[Marked] = [faces.record(row) for row in range(len(faces))]
    good = np.array([frame.box(one) is not None and frame.known(one).any() for one in records])
    return good, sum(own and one.box is None for own, one in zip(good, records, strict=True))
