"""Crops of faces at the size they have in the picture: upright boxes, or turned by five points."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np

# Left eye, right eye, nose, left and right corner of the mouth in a picture of 112 x 112, whole
# coordinates are pixel centres. Source: deepinsight/insightface, the template of ArcFace.
ARCFACE_SIDE = 112
ARCFACE_POINTS = np.array(
    [
        (38.2946, 51.6963),
        (73.5318, 51.5014),
        (56.0252, 71.7366),
        (41.5493, 92.3655),
        (70.7299, 92.2041),
    ]
)
_MAX_GROWTH = 4  # an aligned crop that is larger than so many pictures comes from wrong points


class Crop(NamedTuple):
    """A part of a picture.

    Attributes:
      image: uint8 [h, w, 3].
      box: float32 [4], x0, y0, x1, y1 of the face in pixels of the crop.
      landmarks: float32 [5, 2] in pixels of the crop, or None.
    """

    image: np.ndarray
    box: np.ndarray
    landmarks: np.ndarray | None


def crop_box(
    image: np.ndarray, box: np.ndarray, landmarks: np.ndarray | None, margin: float
) -> Crop | None:
    """Cuts a box out of a picture; no pixel changes.

    Args:
      image: uint8 [H, W, 3].
      box: float [4], x0, y0, x1, y1 in pixels; may reach beyond the picture.
      landmarks: float [5, 2] in pixels, or None.
      margin: share of the box's width and height added on each side.

    Returns:
      The crop, clipped to the picture; None where nothing is left or the box is not finite.
    """
    height, width = image.shape[:2]
    inside = _clip(np.asarray(box, np.float64), width, height)
    if not (np.isfinite(box).all() and np.all(inside[2:] > inside[:2])):
        return None
    added = margin * np.subtract(box[2:], box[:2])
    outer = _clip(np.concatenate([box[:2] - added, box[2:] + added]), width, height)
    x0, y0 = np.floor(outer[:2]).astype(int)
    x1, y1 = np.ceil(outer[2:]).astype(int)
    corner = np.array([x0, y0], np.float32)
    return Crop(
        image=np.ascontiguousarray(image[y0:y1, x0:x1]),
        box=(inside - np.tile(corner, 2)).astype(np.float32),
        landmarks=None if landmarks is None else np.asarray(landmarks, np.float32) - corner,
    )


def crop_aligned(
    image: np.ndarray, box: np.ndarray, landmarks: np.ndarray, margin: float
) -> Crop | None:
    """Turns a picture so that the five points lie as in ArcFace's template, and cuts a square.

    The square has the side at which the face keeps its size, so that nothing is blurred or made
    up. What lies outside of the picture is filled with its edge.

    Args:
      image: uint8 [H, W, 3].
      box: float [4], x0, y0, x1, y1 in pixels.
      landmarks: float [5, 2] in pixels, see `Sample`.
      margin: share of the template's side added on each side.

    Returns:
      The crop, its box upright around the turned one's middle; None where the points are no face:
      not finite, all in one place or so far apart that the crop would dwarf the picture.
    """
    points = np.asarray(landmarks, np.float64)
    template = ((ARCFACE_POINTS + 0.5) / ARCFACE_SIDE + margin) / (1 + 2 * margin)  # of a side of 1
    if not np.isfinite(points).all() or np.ptp(points, axis=0).max() < 1:
        return None
    scale, _ = _scale_and_turn(points, template)
    if not scale * _MAX_GROWTH * max(image.shape[:2]) > 1:
        return None
    side = max(round(1 / scale), 1)
    matrix = similarity(points, template * side - 0.5)
    turned = cv2.warpAffine(
        image, matrix, (side, side), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE
    )
    scale = np.hypot(*matrix[:, 0])
    middle = matrix[:, :2] @ (np.add(box[:2], box[2:]) / 2) + matrix[:, 2]
    half = np.subtract(box[2:], box[:2]) * scale / 2
    inside = _clip(np.concatenate([middle - half, middle + half]), side, side)
    landmarks = points @ matrix[:, :2].T + matrix[:, 2]
    return Crop(turned, inside.astype(np.float32), landmarks.astype(np.float32))


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The turn, scale and shift that take points nearest to others in the mean square.

    Args:
      source, target: float [N, 2], N >= 2, not all of `source` in one place.

    Returns:
      float64 [2, 3]: target = matrix[:, :2] @ source + matrix[:, 2]. It never mirrors.

    Source: Umeyama 1991, in the plane, where a turn and a scale are one complex number.
    """
    scale, turn = _scale_and_turn(source, target)
    matrix = scale * np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    shift = target.mean(axis=0) - matrix @ source.mean(axis=0)
    return np.column_stack([matrix, shift])


def _scale_and_turn(source: np.ndarray, target: np.ndarray) -> tuple[float, complex]:
    """Returns the scale and a complex number of length 1."""
    a, b = ((points - points.mean(axis=0)) @ (1, 1j) for points in (source, target))
    factor = np.vdot(a, b) / np.vdot(a, a).real
    scale = abs(factor)
    return scale, factor / scale if scale else 1


def _clip(box: np.ndarray, width: int, height: int) -> np.ndarray:
    return np.clip(box, 0, [width, height, width, height])
