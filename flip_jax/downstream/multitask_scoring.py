"""Mask, landmarks and attributes of a face from one map of a net: losses, readings, metrics."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.downstream import alignment_scoring, attribute_scores, parsing_metrics
from flip_jax.downstream.alignment_scoring import Truth, point_of
from flip_jax.downstream.dense_augment import (
    Augment,
    change_pixels,
    flip_mask,
    flip_points,
    random_affine,
)
from flip_jax.downstream.dense_pictures import DensePicture, Squares, read_picture
from flip_jax.downstream.dense_training import Batch, Loss, Output, Predict
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Statistic, mean_of
from flip_jax.downstream.parsing_scoring import Frame as MaskFrame
from flip_jax.downstream.parsing_scoring import cross_entropy
from flip_jax.losses.heatmap import empty_logit, landmark_loss
from flip_jax.models.heads import MultitaskHead

Array = jax.Array
Parts = tuple[int, int, int]  # classes, points, attributes


@functools.cache
def multitask(parts: Parts, cells: int) -> Output:
    """Makes the output of a head; one object per arguments, as `DenseNet` asks for."""
    bias = empty_logit(cells)
    return lambda channels, rngs: MultitaskHead(channels, parts, rngs, bias=bias)


@functools.cache
def joint_loss(parts: Parts, size: int, weights: tuple[float, float, float]) -> Loss:
    """Cross-entropy of pixels, `landmark_loss` and binary cross-entropy of the known attributes.

    Args:
      size: pixels of the input; weights: of the three, in this order.
    """
    classes, points, _ = parts

    def loss(maps: Array, batch: Batch) -> Array:
        masks, heat, logits = jnp.split(maps, [classes, classes + points], axis=-1)
        logits, labels = logits.mean((1, 2)), batch["attributes"].astype(jnp.float32)
        known = labels >= 0
        entropy = jnp.where(known, jax.nn.softplus(logits) - logits * labels, 0.0)
        losses = (
            cross_entropy(masks, batch),
            landmark_loss(heat, batch["points"], batch["known"], size)[0],
            jnp.sum(entropy) / jnp.maximum(jnp.sum(known), 1),
        )
        return sum(weight * one for weight, one in zip(weights, losses, strict=True))

    return loss


@dataclass(frozen=True, eq=False)
class Reading:
    """What is found in one picture.

    Attributes:
      mask: uint8 [H, W], class numbers.
      points: float32 [P, 2], (x, y) in pixels of the picture.
      attributes: float32 [40], probabilities, in the order of `data.attributes.ATTRIBUTES`.
    """

    mask: np.ndarray
    points: np.ndarray
    attributes: np.ndarray


@dataclass(frozen=True)
class Frame:
    """How whole pictures get into the network, and what is read off its maps.

    Attributes:
      classes: names, background first; points: P; size: S, pixels of the input.
    """

    classes: tuple[str, ...]
    points: int
    size: int

    @property
    def parts(self) -> Parts:
        return len(self.classes), self.points, len(ATTRIBUTES)

    @property
    def masks(self) -> MaskFrame:
        """Places pictures, and knows their masks."""
        return MaskFrame(self.classes, self.size, align="none", warp=0.0)

    @property
    def marks(self) -> alignment_scoring.Frame:
        """Knows which points count and the box of a face; it places nothing here."""
        return alignment_scoring.Frame(self.points, self.size, 0, crop=1.0, hidden="leave")

    def example(
        self, augment: Augment, picture: DensePicture, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`image` uint8 [S, S, 3], `mask` uint8 [S, S], `points` float32 [P, 2], `known` bool [P],
        `attributes` int8 [40] for training."""
        square, mirrored = random_affine(augment, self.size, rng)
        geometry = self.masks.place(picture).then(square)
        mask = geometry.place_mask(self.masks.mask_of(picture))
        points, known = geometry.forward(picture.landmarks), self.marks.known(picture)
        if mirrored:
            mask = flip_mask(mask, self.classes)
            points, known = flip_points(points), flip_points(known)
        return {
            "image": change_pixels(augment, geometry.place_image(picture.image), rng),
            "mask": mask,
            "points": points.astype(np.float32),
            "known": known,
            "attributes": picture.attributes,
        }

    def readings(self, maps: np.ndarray, pictures: Sequence[DensePicture]) -> Iterator[Reading]:
        """Args: maps: logits float32 [n, h, w, K + P + 40] of so many pictures."""
        classes, points, _ = self.parts
        masks, heat, logits = np.split(maps, [classes, classes + points], axis=-1)
        shares = 1 / (1 + np.exp(-logits.mean((1, 2), dtype=np.float64)))
        each = zip(masks, point_of(heat, self.size), shares, pictures, strict=True)
        return (self.reading(*one) for one in each)

    def reading(
        self, masks: np.ndarray, points: np.ndarray, shares: np.ndarray, picture: DensePicture
    ) -> Reading:
        """Args: masks: [h, w, K]; points: [P, 2] of the input; shares: [40]."""
        found = self.masks.place(picture).inverse(np.float64(points))
        return Reading(
            self.masks.labels(masks, picture), found.astype(np.float32), np.float32(shares)
        )

    def read(self, predict: Predict, faces: Faces) -> Iterator[tuple[DensePicture, Reading]]:
        """Every face with what a net finds in it, in order."""
        row = 0
        with ThreadPoolExecutor(faces.threads) as pool:
            for maps in predict(Squares(faces, self.masks.place)):
                rows = range(row, row + len(maps))
                pictures = list(pool.map(functools.partial(read_picture, faces), rows))
                yield from zip(pictures, self.readings(maps, pictures), strict=True)
                row += len(maps)

    def read_blindly(self, some: Faces, faces: Faces) -> Iterator[tuple[DensePicture, Reading]]:
        """Every face of `faces` with what is most usual among `some`, whatever the picture: class
        of each place, mean of each point, share of each attribute."""
        placed = np.zeros((self.points, 2))
        count = np.zeros((self.points, 1))
        for row in range(len(some)):
            picture = read_picture(some, row)
            known = self.marks.known(picture)[:, None]
            own = self.masks.place(picture).forward(picture.landmarks)
            placed += np.where(known, own, 0.0)
            count += known
        points = np.where(count > 0, placed / np.maximum(count, 1), (self.size - 1) / 2)
        known = some.attributes >= 0
        shares = ((some.attributes == 1).sum(0) + 0.5) / (known.sum(0) + 1)
        usual = self.masks.prior(some), points, shares
        for row in range(len(faces)):
            picture = read_picture(faces, row)
            yield picture, self.reading(*usual, picture)

    def metrics(self) -> list[str]:
        """Names of the numbers of `statistic`."""
        names = alignment_scoring.metrics_of(self.points)
        return [*parsing_metrics.METRICS, *names, *attribute_scores.METRICS]

    def statistic(
        self, found: Iterable[tuple[DensePicture, Reading]], faces: Faces, truth: Truth
    ) -> Statistic:
        """The metrics of parsing, alignment and attributes as a function of row weights.

        Args:
          found: a reading of each of `faces`; truth: of their landmarks.
        """
        confusions, points, shares = [], [], []
        for picture, one in found:
            mask = self.masks.mask_of(picture)
            confusions.append(parsing_metrics.confusion(one.mask, mask, len(self.classes)))
            points.append(one.points)
            shares.append(one.attributes)
        shares = np.stack(shares)
        labelled = shares > 0.5, shares, faces.attributes
        statistics = (
            (parsing_metrics.parsing_statistic(np.stack(confusions)), parsing_metrics.METRICS),
            (mean_of(truth.numbers(np.stack(points))), alignment_scoring.metrics_of(self.points)),
            (attribute_scores.attribute_statistic(*labelled), attribute_scores.METRICS),
        )

        def statistic(weights: np.ndarray) -> np.ndarray:
            return np.concatenate([one(weights)[:, : len(n)] for one, n in statistics], axis=1)

        return statistic
