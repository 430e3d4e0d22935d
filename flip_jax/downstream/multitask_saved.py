"""A trained reader of faces: mask, landmarks and attributes of any picture in one pass.

reader = load_reader("runs/downstream/multitask/reader.npz", Backbone.load("runs/demo"))
for one in reader.read([picture, "…".read_bytes()]): ...     # one.mask, one.points, one.attributes
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_pictures import DensePicture, read_pixels
from flip_jax.downstream.dense_saved import net_of, read_dense
from flip_jax.downstream.dense_training import DenseArrays
from flip_jax.downstream.multitask_scoring import Frame, Reading, multitask

FILE = "reader.npz"


class FaceReader:
    """An image tower and a multi-task head.

    Attributes:
      classes: names, in the order of the numbers in a mask.
      points: P, see `flip_jax.data.landmark_schemes`.
      about: what is known of the training.
    """

    def __init__(self, backbone: Backbone, arrays: DenseArrays, about: dict[str, Any]):
        frame = about["frame"]
        self._frame = Frame(**frame | {"classes": tuple(frame["classes"])})
        self.about, self.classes, self.points = about, self._frame.classes, self._frame.points
        cells = 4 * (self._frame.size // backbone.cfg.model.vision.patch_size)
        net = net_of(about, backbone, multitask(self._frame.parts, cells))
        self._predict = functools.partial(net.predict, arrays)

    def read(self, images: Sequence[np.ndarray | bytes], batch_size: int = 16) -> list[Reading]:
        """What is found in pictures, which are taken whole, as in training.

        Args:
          images: uint8 [H, W, 3] RGB of any size, or the bytes of picture files.
          batch_size: pictures that run at once.

        Raises:
          BadImage: bytes that are no whole picture; names the index.
          ValueError: an array of another dtype or shape.
        """
        if not len(images):
            return []
        pixels = [read_pixels(image, row) for row, image in enumerate(images)]
        pictures = [DensePicture(image, None, None, None) for image in pixels]
        place = self._frame.masks.place
        squares = np.stack([place(one).place_image(one.image) for one in pictures])
        maps = np.concatenate(list(self._predict(squares, batch_size=batch_size)))
        return list(self._frame.readings(maps, pictures))


def load_reader(path: Path | str, backbone: Backbone) -> FaceReader:
    """What `python -m flip_jax.downstream multitask` left in `OUT/reader.npz`.

    Args:
      backbone: what it was trained on.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, of another version, or trained on another backbone.
    """
    return FaceReader(backbone, *read_dense(path, "multitask", backbone))
