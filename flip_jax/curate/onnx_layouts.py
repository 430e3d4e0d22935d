"""What the outputs of face detectors mean: one class per family of model files.

Outputs are told apart by their last dimension, not by name or order, which exports differ in:
1 or 2 numbers are scores, 4 a box, 10 the five points. They may have a batch axis of 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cache
from typing import NamedTuple

import numpy as np

Outputs = dict[str, np.ndarray]
Size = tuple[int, int]  # height, width in pixels


class Candidates(NamedTuple):
    """All that a model proposes for one picture.

    Attributes:
      scores: float [N], 0 to 1.
      boxes: float [N, 4], x0, y0, x1, y1 in pixels of the model's input.
      landmarks: float [N, 5, 2] in pixels of the model's input, or None.
    """

    scores: np.ndarray
    boxes: np.ndarray
    landmarks: np.ndarray | None


class Layout(ABC):
    name: str

    @abstractmethod
    def fits(self, outputs: Outputs, size: Size) -> bool:
        """Whether outputs for a picture of this size are of this family."""

    @abstractmethod
    def prepare(self, image: np.ndarray) -> np.ndarray:
        """Makes uint8 [H, W, 3] RGB what the model was trained on, float32 [3, H, W]."""

    @abstractmethod
    def decode(self, outputs: Outputs, size: Size) -> Candidates:
        """Reads the outputs for one picture of this size."""


class InsightFace(Layout):
    """SCRFD and RetinaFace as InsightFace exports them.

    Three levels of strides 8, 16 and 32 with two proposals per cell, or five to 128 with one.
    Boxes and points are distances from the cell's top left corner in strides.

    Source: deepinsight/insightface:python-package/insightface/model_zoo/retinaface.py.
    """

    name = "SCRFD or RetinaFace of InsightFace (scores, boxes and perhaps points per stride)"

    def fits(self, outputs: Outputs, size: Size) -> bool:
        levels = _by_width(outputs)
        strides = self._strides(levels)
        if set(levels) - {1, 4, 10} or not strides:
            return False
        per_cell = 2 if len(strides) == 3 else 1
        rows = [per_cell * len(_cells(size, stride)) for stride in strides]
        return all(_rows(levels[width]) == rows for width in levels)

    def prepare(self, image: np.ndarray) -> np.ndarray:
        return ((image.astype(np.float32) - 127.5) / 128).transpose(2, 0, 1)

    def decode(self, outputs: Outputs, size: Size) -> Candidates:
        levels = _by_width(outputs)
        strides = self._strides(levels)
        per_cell = 2 if len(strides) == 3 else 1
        corners, steps = _grid(size, strides, per_cell)
        distances = np.concatenate(levels[4]) * steps
        boxes = np.concatenate([corners - distances[:, :2], corners + distances[:, 2:]], axis=1)
        landmarks = None
        if 10 in levels:
            points = np.concatenate(levels[10]) * steps
            landmarks = corners[:, None] + points.reshape(-1, 5, 2)
        return Candidates(np.concatenate(levels[1])[:, 0], boxes, landmarks)

    def _strides(self, levels: dict[int, list[np.ndarray]]) -> tuple[int, ...]:
        counts = {len(found) for found in levels.values()}
        if not {1, 4} <= set(levels) or len(counts) != 1:
            return ()
        return {3: (8, 16, 32), 5: (8, 16, 32, 64, 128)}.get(counts.pop(), ())


class YuNet(Layout):
    """YuNet as OpenCV's model zoo has it since 2022: strides 8, 16 and 32, one proposal per cell.

    The score is the geometric mean of two. A box is a shift of the cell's top left corner and the
    logarithms of its sides, in strides; points are shifts.

    Source: opencv/opencv:modules/objdetect/src/face_detect.cpp.
    """

    name = "YuNet (two scores, box and points per stride)"
    strides = (8, 16, 32)

    def fits(self, outputs: Outputs, size: Size) -> bool:
        levels = _by_width(outputs)
        rows = [len(_cells(size, stride)) for stride in self.strides]
        twice = [count for count in rows for _ in range(2)]
        return (
            set(levels) == {1, 4, 10}
            and _rows(levels[1]) == twice
            and _rows(levels[4]) == _rows(levels[10]) == rows
        )

    def prepare(self, image: np.ndarray) -> np.ndarray:
        return image[..., ::-1].astype(np.float32).transpose(2, 0, 1)

    def decode(self, outputs: Outputs, size: Size) -> Candidates:
        levels = _by_width(outputs)
        # Of face and of object; their product is all that counts, so their order does not.
        first, second = (np.concatenate(levels[1][i::2])[:, 0] for i in (0, 1))
        scores = np.sqrt(np.clip(first, 0, 1) * np.clip(second, 0, 1))
        corners, steps = _grid(size, self.strides, 1)
        shape = np.concatenate(levels[4])
        middles = corners + shape[:, :2] * steps
        halves = np.exp(shape[:, 2:]) * steps / 2
        points = (np.concatenate(levels[10]) * steps).reshape(-1, 5, 2)
        boxes = np.concatenate([middles - halves, middles + halves], axis=1)
        return Candidates(scores, boxes, corners[:, None] + points)


class PriorBox(Layout):
    """RetinaFace with prior boxes, as biubug6/Pytorch_Retinaface exports it.

    Two square priors per cell of strides 8, 16 and 32, in the cell's middle. A box is a shift of
    the prior's middle and the logarithms of its growth, points are shifts; all in sides of the
    prior, times 0.1 and 0.2.

    Source: biubug6/Pytorch_Retinaface:{data/config.py, layers/functions/prior_box.py,
    utils/box_utils.py}.
    """

    name = "RetinaFace of Pytorch_Retinaface (one output each of boxes, two scores and points)"
    strides = (8, 16, 32)
    sides = ((16, 32), (64, 128), (256, 512))  # pixels
    shift, growth = 0.1, 0.2

    def fits(self, outputs: Outputs, size: Size) -> bool:
        rows = 2 * sum(len(_cells(size, stride)) for stride in self.strides)
        levels = _by_width(outputs)
        return set(levels) == {2, 4, 10} and all(
            _rows(found) == [rows] for found in levels.values()
        )

    def prepare(self, image: np.ndarray) -> np.ndarray:
        mean = np.array([104, 117, 123], np.float32)  # blue, green, red
        return (image[..., ::-1].astype(np.float32) - mean).transpose(2, 0, 1)

    def decode(self, outputs: Outputs, size: Size) -> Candidates:
        levels = {width: found[0] for width, found in _by_width(outputs).items()}
        corners, steps = _grid(size, self.strides, 2)
        middles = corners + steps / 2
        cells = [len(_cells(size, stride)) for stride in self.strides]
        sides = np.concatenate(
            [np.tile(pair, count) for pair, count in zip(self.sides, cells, strict=True)]
        )[:, None].astype(np.float32)
        middles_found = middles + levels[4][:, :2] * self.shift * sides
        halves = sides * np.exp(levels[4][:, 2:] * self.growth) / 2
        points = (levels[10] * self.shift * sides).reshape(-1, 5, 2)
        boxes = np.concatenate([middles_found - halves, middles_found + halves], axis=1)
        return Candidates(levels[2][:, 1], boxes, middles[:, None] + points)


LAYOUTS: tuple[Layout, ...] = (InsightFace(), YuNet(), PriorBox())


def _by_width(outputs: Outputs) -> dict[int, list[np.ndarray]]:
    """Outputs as [rows, width] by width, finest stride first."""
    found: dict[int, list[np.ndarray]] = {}
    for array in outputs.values():
        width = array.shape[-1] if array.ndim else 0
        found.setdefault(width, []).append(array.reshape(-1, width) if width else array)
    return {width: sorted(arrays, key=len, reverse=True) for width, arrays in found.items()}


def _rows(arrays: list[np.ndarray]) -> list[int]:
    return [len(array) for array in arrays]


@cache
def _cells(size: Size, stride: int) -> np.ndarray:
    """Top left corners of a stride's cells, row by row; float32 [cells, 2] x, y in pixels."""
    rows, columns = (-(-side // stride) for side in size)
    y, x = np.mgrid[:rows, :columns]
    return np.stack([x, y], axis=-1).reshape(-1, 2).astype(np.float32) * stride


@cache
def _grid(size: Size, strides: tuple[int, ...], per_cell: int) -> tuple[np.ndarray, np.ndarray]:
    """Corners float32 [N, 2] and strides float32 [N, 1] of all proposals in their order."""
    cells = [np.repeat(_cells(size, stride), per_cell, axis=0) for stride in strides]
    steps = [np.full((len(part), 1), stride) for part, stride in zip(cells, strides, strict=True)]
    return np.concatenate(cells), np.concatenate(steps).astype(np.float32)
