"""What readers give where one picture with captions does not say it all; no jax.

Points are (x, y) in pixels of the picture as its file stores it. Whole coordinates are pixel
centres: (0, 0) is the centre of the top left pixel, (width - 1, height - 1) the last one. A box is
x0, y0, x1, y1 in the same coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flip_jax.data.attributes import ATTRIBUTES


@dataclass(frozen=True, eq=False)
class ParsingSample:
    """A picture and the class of each of its pixels.

    Attributes:
      id: unique in the data set.
      group_id: equal for pictures of one person, where that is known; else the picture's own.
      image: a picture file, as published.
      mask: uint8 [H, W], numbers of the reader's `CLASSES`. It covers the whole picture, but may
        have fewer pixels (`CelebAMaskHQ`: 512 x 512 for 1024 x 1024).
      landmarks: float32 [P, 2], or None.
    """

    id: str
    group_id: str
    image: bytes
    mask: np.ndarray
    landmarks: np.ndarray | None = None

    def __post_init__(self):
        _check(self.id, "mask", self.mask, np.uint8, (None, None))
        if self.landmarks is not None:
            _check(self.id, "landmarks", self.landmarks, np.float32, (None, 2))


@dataclass(frozen=True, eq=False)
class LandmarkSample:
    """A face in a picture and its landmarks.

    Attributes:
      id: unique in the data set.
      group_id: equal for faces of one picture.
      image: a picture file, as published.
      landmarks: float32 [P, 2]; may lie outside the picture.
      box: float32 [4], of the face; the smallest box around the landmarks where none is published.
      visible: bool [P], False for points the annotators could not see; all True where the data set
        does not say.
      subsets: parts of the split by which results are reported, e.g. `{"challenging"}`.
    """

    id: str
    group_id: str
    image: bytes
    landmarks: np.ndarray
    box: np.ndarray
    visible: np.ndarray
    subsets: frozenset[str]

    def __post_init__(self):
        _check(self.id, "landmarks", self.landmarks, np.float32, (None, 2))
        _check(self.id, "box", self.box, np.float32, (4,))
        _check(self.id, "visible", self.visible, np.bool_, (len(self.landmarks),))


@dataclass(frozen=True, eq=False)
class SketchPair:
    """A photograph and a drawing of it.

    Attributes:
      id: unique in the data set.
      group_id: equal for pictures of one person, where that is known; else the pair's own.
      photo: a picture file, as published.
      sketch: a picture file, as published; dark lines on a light ground.
      attributes: int8 [40] in the order of `ATTRIBUTES`; 1 present, 0 absent, -1 unknown.
      style: number of the drawing style.
      steps: the sketch as it grows, picture files, the last one complete; empty where the data
        set has none.
    """

    id: str
    group_id: str
    photo: bytes
    sketch: bytes
    attributes: np.ndarray
    style: int
    steps: tuple[bytes, ...] = ()

    def __post_init__(self):
        _check(self.id, "attributes", self.attributes, np.int8, (len(ATTRIBUTES),))


def _check(
    sample: str, field: str, value: np.ndarray, dtype: type, shape: tuple[int | None, ...]
) -> None:
    fits = value.ndim == len(shape) and all(
        size in (None, found) for size, found in zip(shape, value.shape, strict=True)
    )
    if value.dtype != dtype or not fits:
        raise ValueError(
            f"sample {sample!r}: {field} is {value.dtype}{list(value.shape)}, must be "
            f"{np.dtype(dtype)}{['any' if size is None else size for size in shape]}"
        )
    if not np.isfinite(value).all():
        raise ValueError(f"sample {sample!r}: {field} contains NaN or infinity")
