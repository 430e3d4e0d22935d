"""A trained aligner: the landmarks of any face whose box is known.

aligner = load_aligner("runs/downstream/alignment/aligner.npz", Backbone.load("runs/demo"))
points = aligner.align([picture, "…".read_bytes()], boxes)     # float32 [N, P, 2]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.downstream.alignment_scoring import Frame, crop_matrix, heatmaps, point_of
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.dense_geometry import Geometry
from flip_jax.downstream.dense_pictures import read_pixels
from flip_jax.downstream.dense_saved import net_of, read_dense
from flip_jax.downstream.dense_training import DenseArrays

FILE = "aligner.npz"


class Aligner:
    """An image tower and a heatmap head.

    Attributes:
      points: P, see `flip_jax.data.landmark_schemes`.
      about: what is known of the training.
    """

    def __init__(self, backbone: Backbone, arrays: DenseArrays, about: dict[str, Any]):
        self._frame = Frame(**about["frame"])
        self.about, self.points = about, self._frame.points
        net = net_of(about, backbone, heatmaps(self.points, self._frame.cells))
        self._predict = functools.partial(net.predict, arrays)

    def align(
        self,
        images: Sequence[np.ndarray | bytes],
        boxes: Sequence[Sequence[float]] | np.ndarray,
        batch_size: int = 16,
    ) -> np.ndarray:
        """The landmarks of faces.

        Args:
          images: N pictures, uint8 [H, W, 3] RGB of any size, or the bytes of picture files.
          boxes: [N, 4], x0, y0, x1, y1 of a face in each, pixels, drawn as those of the training
            data were.
          batch_size: pictures that run at once.

        Returns:
          float32 [N, P, 2], (x, y) in pixels of the pictures.

        Raises:
          BadImage: bytes that are no whole picture; names the index.
          ValueError: another number of boxes, or an empty one.
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        bad = np.flatnonzero(~(boxes[:, 2:] > boxes[:, :2]).all(1))
        if len(boxes) != len(images) or len(bad):
            wrong = f"box {bad[0]} is {boxes[bad[0]].tolist()}" if len(bad) else "one for each"
            raise ValueError(
                f"{len(boxes)} boxes for {len(images)} pictures, {wrong}: must be x0 < x1, y0 < y1"
            )
        if not len(images):
            return np.zeros((0, self.points, 2), np.float32)
        frame = self._frame
        places = [Geometry(crop_matrix(box, frame.crop, frame.size), frame.size) for box in boxes]
        squares = np.stack(
            [
                place.place_image(read_pixels(image, row))
                for row, (place, image) in enumerate(zip(places, images, strict=True))
            ]
        )
        maps = self._predict(squares, batch_size=batch_size)
        found = np.concatenate([point_of(one, frame.size) for one in maps])
        pairs = zip(places, np.float64(found), strict=True)
        return np.stack([place.inverse(points) for place, points in pairs]).astype(np.float32)


def load_aligner(path: Path | str, backbone: Backbone) -> Aligner:
    """What `python -m flip_jax.downstream alignment` left in `OUT/aligner.npz`.

    Args:
      backbone: what it was trained on.

    Raises:
      FileNotFoundError: no such file.
      ValueError: damaged, of another version, or trained on another backbone.
    """
    return Aligner(backbone, *read_dense(path, "alignment", backbone))
