"""A trained parser: a class for every pixel of any picture.

parser = load_parser("runs/downstream/parsing/parser.npz", Backbone.load("runs/demo"))
masks = parser.parse([picture, "…".read_bytes()])     # uint8 [H, W] each
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
from flip_jax.downstream.parsing_scoring import Frame, segmentation

FILE = "parser.npz"


class Parser:
    """An image tower and a parsing head.

    Attributes:
      classes: names, in the order of the numbers in a mask.
      about: what is known of the training.
    """

    def __init__(self, backbone: Backbone, arrays: DenseArrays, about: dict[str, Any]):
        frame = about["frame"]
        self._frame = Frame(**frame | {"classes": tuple(frame["classes"])})
        self.about, self.classes = about, self._frame.classes
        net = net_of(about, backbone, segmentation(len(self.classes)))
        self._predict = functools.partial(net.predict, arrays)

    def parse(
        self,
        images: Sequence[np.ndarray | bytes],
        landmarks: Sequence[np.ndarray] | None = None,
        batch_size: int = 16,
    ) -> list[np.ndarray]:
        """The classes of pictures.

        Args:
          images: uint8 [H, W, 3] RGB of any size, or the bytes of picture files.
          landmarks: float [P, 2] of each, pixels; needed where the parser was trained with
            `align=points`.
          batch_size: pictures that run at once.

        Returns:
          uint8 [H, W] each, numbers in `classes`.

        Raises:
          BadImage: bytes that are no whole picture; names the index.
          ValueError: no or other landmarks than are needed.
        """
        if not len(images):
            return []
        points = [None] * len(images) if landmarks is None else landmarks
        pictures = [
            DensePicture(read_pixels(image, row), None, own, None)
            for row, (image, own) in enumerate(zip(images, points, strict=True))
        ]
        placed = [self._frame.place(one).place_image(one.image) for one in pictures]
        maps = np.concatenate(list(self._predict(np.stack(placed), batch_size=batch_size)))
        return [self._frame.labels(*pair) for pair in zip(maps, pictures, strict=True)]


def load_parser(path: Path | str, backbone: Backbone) -> Parser:
    """What `python -m flip_jax.downstream parsing` left in `OUT/parser.npz`.

    Args:
      backbone: what it was trained on.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, of another version, or trained on another backbone.
    """
    return Parser(backbone, *read_dense(path, "parsing", backbone))
