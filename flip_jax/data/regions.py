"""Which part of the face each patch of a picture shows; numpy and OpenCV, no jax.

A region is a class of the record's mask, or a group of its landmarks: no names, only "a part of the
face that can be covered as a whole". A label map is uint8 [S, S], 0 = no region; the region map is
uint32 [patches], bit r set = some pixel of the patch has label r.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from flip_jax.data.readers.reader import decode_mask
from flip_jax.data.records import Record

MAX_LABEL = 31


@dataclass(frozen=True)
class _Scheme:
    """Landmarks of one scheme: ranges of point numbers, each a region, drawn one over the other.

    `margin`: around a region's points, as a share of the extent of all points; points lie on the
    outline of a part in dense schemes, in its middle in sparse ones.
    """

    ranges: tuple[tuple[int, int], ...]
    margin: float


# Brows, eyes, nose, mouth, by number of points: iBUG (300W, drawn faces), WFLW, LaPa, AFLW-19,
# CelebA.
_SCHEMES = {
    68: _Scheme(((17, 22), (22, 27), (27, 36), (36, 42), (42, 48), (48, 68)), 0.03),
    98: _Scheme(((33, 42), (42, 51), (51, 60), (60, 68), (68, 76), (76, 96)), 0.03),
    106: _Scheme(((33, 42), (42, 51), (51, 66), (66, 75), (75, 84), (84, 104)), 0.03),
    19: _Scheme(((0, 3), (3, 6), (12, 15), (6, 9), (9, 12), (15, 18)), 0.08),
    5: _Scheme(((2, 3), (0, 1), (1, 2), (3, 5)), 0.25),
}


def label_map(record: Record, height: int, width: int, size: int) -> np.ndarray:
    """The regions of a record's picture, squashed to `size` x `size`: uint8 [size, size].

    All zeros where it has neither a mask nor landmarks of a known scheme. A mask may have other
    sides than the picture, as long as it shows the same.

    Args:
      height, width: of the picture that the landmarks are in, pixels.

    Raises:
      BadImage: a mask that is no whole PNG of one channel.
    """
    if record.mask is not None:
        mask = decode_mask(record.mask, Path(f"mask of {record.id}"))
        return cv2.resize(mask, (size, size), interpolation=cv2.INTER_NEAREST_EXACT)
    labels = np.zeros((size, size), np.uint8)
    scheme = None if record.landmarks is None else _SCHEMES.get(len(record.landmarks))
    if scheme is not None:
        points = (record.landmarks + 0.5) * (size / width, size / height) - 0.5
        extent = float(np.sqrt(np.prod(np.ptp(points, axis=0))))
        radius = max(round(scheme.margin * extent), 1)
        for label, (first, end) in enumerate(scheme.ranges, 1):
            hull = cv2.convexHull(np.round(points[first:end]).astype(np.int32))
            cv2.fillConvexPoly(labels, hull, label)
            cv2.polylines(labels, [hull], True, label, thickness=2 * radius + 1)
    return labels


def region_map(labels: np.ndarray, patch_size: int) -> np.ndarray:
    """uint32 [patches], row-major; labels above `MAX_LABEL` are left out.

    Args:
      labels: uint8 [S, S], S a multiple of `patch_size`.
    """
    grid = len(labels) // patch_size
    bits = np.left_shift(np.uint32(1), labels.astype(np.uint32) % 32)
    bits[(labels == 0) | (labels > MAX_LABEL)] = 0
    cells = bits.reshape(grid, patch_size, grid, patch_size)
    return np.bitwise_or.reduce(cells, axis=(1, 3)).reshape(-1)
