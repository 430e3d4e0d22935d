"""From a net's maps to confusion matrices: pictures in, predictions taken back to the pictures."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax.downstream.dense_augment import Augment, change_pixels, flip_mask, random_affine
from flip_jax.downstream.dense_geometry import Geometry, five_point_matrix, squash_matrix
from flip_jax.downstream.dense_pictures import DensePicture, Squares, read_picture
from flip_jax.downstream.dense_training import Output, Predict
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.parsing_metrics import confusion
from flip_jax.models.heads import SegmentationHead, resize_map

Array = jax.Array


@functools.cache
def segmentation(classes: int) -> Output:
    """Makes the output of a head; one object per number, as `DenseNet` asks for."""
    return lambda channels, rngs: SegmentationHead(channels, classes, rngs)


def cross_entropy(logits: Array, batch: dict[str, Array]) -> Array:
    """Mean over all pixels of the input, to whose size the logits [B, h, w, K] are brought."""
    labels = batch["mask"]
    logits = resize_map(logits, *labels.shape[1:])
    own = labels[..., None] == jnp.arange(logits.shape[-1])
    # A masked sum: the gradient of an indexed read is a scatter, slow to compile and to run.
    right = jnp.sum(jnp.where(own, logits, 0.0), axis=-1)
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - right)


@dataclass(frozen=True)
class Frame:
    """How pictures of known classes get into the network.

    Attributes:
      classes: names, background first.
      size: S, pixels of the network's input.
      align: `points`, by five landmarks; `none`, the whole picture.
      warp: factor of the tanh warp.
    """

    classes: tuple[str, ...]
    size: int
    align: str
    warp: float

    def place(self, picture: DensePicture) -> Geometry:
        """Raises: ValueError: alignment without landmarks that are known; names the picture."""
        if self.align == "none":
            return Geometry(squash_matrix(*picture.shape, self.size), self.size, self.warp)
        points = np.zeros((0, 2)) if picture.landmarks is None else picture.landmarks
        try:
            return Geometry(five_point_matrix(points, self.size), self.size, self.warp)
        except ValueError as error:
            raise ValueError(f"{picture.name}: {error}; leave it out or set align=none") from error

    def mask_of(self, picture: DensePicture) -> np.ndarray:
        """Its mask, uint8 [H, W].

        Raises:
          ValueError: a class without a name.
        """
        if picture.mask.max() >= len(self.classes):
            raise ValueError(
                f"{picture.name}: class {picture.mask.max()} in the mask, but there are "
                f"{len(self.classes)}; build the data set again with all names of its classes"
            )
        return picture.mask

    def example(
        self, augment: Augment, picture: DensePicture, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        """`image` uint8 [S, S, 3] and `mask` uint8 [S, S] for training."""
        square, mirrored = random_affine(augment, self.size, rng)
        geometry = self.place(picture).then(square)
        mask = geometry.place_mask(self.mask_of(picture))
        return {
            "image": change_pixels(augment, geometry.place_image(picture.image), rng),
            "mask": flip_mask(mask, self.classes) if mirrored else mask,
        }

    def labels(self, maps: np.ndarray, picture: DensePicture) -> np.ndarray:
        """Logits or shares float32 [h, w, K] of the input -> uint8 [H, W] of the picture.

        What the input does not show is background.
        """
        found, shown = self.place(picture).take_back(maps, *picture.shape)
        return np.where(shown, found.argmax(-1), 0).astype(np.uint8)

    def squares(self, faces: Faces) -> Squares:
        """Pictures as the network sees them."""
        return Squares(faces, self.place)

    def parse(self, predict: Predict, faces: Faces) -> Iterator[tuple[DensePicture, np.ndarray]]:
        """(picture, uint8 [H, W] what is found) of every face, in order."""
        row = 0
        with ThreadPoolExecutor(faces.threads) as pool:

            def one(item: tuple[int, np.ndarray]) -> tuple[DensePicture, np.ndarray]:
                picture = read_picture(faces, item[0])
                return picture, self.labels(item[1], picture)

            for maps in predict(self.squares(faces)):
                yield from pool.map(one, enumerate(maps, row))
                row += len(maps)

    def confusions(self, predict: Predict, faces: Faces) -> np.ndarray:
        """int64 [N, K, K], see `parsing_metrics.confusion`."""
        return np.stack(
            [
                confusion(found, self.mask_of(picture), len(self.classes))
                for picture, found in self.parse(predict, faces)
            ]
        )

    def prior(self, faces: Faces) -> np.ndarray:
        """float32 [S, S, K]: how often each pixel of the input has each class."""
        counts = np.zeros((self.size**2, len(self.classes)), np.float32)
        each = np.arange(len(counts))
        with ThreadPoolExecutor(faces.threads) as pool:

            def one(row: int) -> np.ndarray:
                picture = read_picture(faces, row)
                return self.place(picture).place_mask(self.mask_of(picture)).ravel()

            for mask in pool.map(one, range(len(faces))):
                counts[each, mask] += 1
        return counts.reshape(self.size, self.size, -1) / len(faces)
