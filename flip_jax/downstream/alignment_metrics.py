"""How far predicted landmarks are from the true ones, in units of the face.

NME is the mean distance over the points of a face, divided by a length of that face; the number of
a test set is the mean over its faces. `FR@t` is the share of faces with an NME above t, `AUC@t` the
area below the curve of cumulated errors up to t, divided by t. All three are means over faces, so
that they have weights, parts and intervals as other numbers have.

Source: farl/experiments/face_alignment/scorer.py of FaRL, which sums the curve in steps of 1e-4;
the area of a curve of steps is known exactly, and is what is given here.

Dims: N faces, P points. Points and boxes are in pixels of the picture, whatever picture that is.
"""

from __future__ import annotations

import numpy as np

from flip_jax.data.landmark_schemes import scheme_of

# What a distance is divided by. `ocular`: outer corners of the eyes; `pupil`: pupils, or means of
# the points of an eye; `diagonal` and `box`: of the face's box, the latter sqrt(width x height).
NORMALIZERS = ("ocular", "pupil", "diagonal", "box")


def lengths(kind: str, points: np.ndarray, known: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """What the distances of each face are divided by.

    Args:
      kind: of `NORMALIZERS`.
      points: true ones, [N, P, 2]; known: bool [N, P]; boxes: [N, 4].

    Returns:
      float64 [N]; NaN where a point that it takes is not known, or the length is 0.

    Raises:
      ValueError: there is no such normaliser, or points of this number have none.
    """
    points, boxes = np.asarray(points, np.float64), np.asarray(boxes, np.float64)
    if kind in ("diagonal", "box"):
        width, height = (boxes[:, 2:] - boxes[:, :2]).T
        bad = (width <= 0) | (height <= 0)
        found = np.hypot(width, height) if kind == "diagonal" else np.sqrt(np.abs(width * height))
        return np.where(bad, np.nan, found)
    groups = _eyes(kind, points.shape[1])
    known = np.all([known[:, list(group)].all(1) for group in groups], axis=0)
    left, right = (points[:, list(group)].mean(1) for group in groups)
    found = np.linalg.norm(right - left, axis=-1)
    return np.where(known & (found > 0), found, np.nan)


def normalizers_of(points: int) -> list[str]:
    """Those that faces with so many points have."""
    scheme = scheme_of(points)
    eyes = {"ocular": scheme and scheme.corners, "pupil": scheme and scheme.pupils}
    return [kind for kind in NORMALIZERS if eyes.get(kind, True)]


def _eyes(kind: str, points: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if kind not in normalizers_of(points):
        raise ValueError(
            f"normaliser {kind!r} is not there for {points} points; there are "
            f"{', '.join(normalizers_of(points))}"
        )
    scheme = scheme_of(points)
    return scheme.pupils if kind == "pupil" else tuple((corner,) for corner in scheme.corners)


def face_errors(
    predicted: np.ndarray, points: np.ndarray, known: np.ndarray, length: np.ndarray
) -> np.ndarray:
    """NME of each face, float64 [N], not in percent.

    Points that are not known are left out; a face without any, or without a length, gives NaN.

    Args:
      predicted, points: [N, P, 2]; known: bool [N, P]; length: [N], see `lengths`.

    Raises:
      ValueError: the shapes differ, or a prediction is NaN or infinite.
    """
    if predicted.shape != points.shape or known.shape != points.shape[:2]:
        raise ValueError(
            f"predicted {predicted.shape}, points {points.shape} and known {known.shape}: must be "
            "[N, P, 2], the same and [N, P]"
        )
    if not np.isfinite(predicted).all():
        raise ValueError("a predicted point is NaN or infinite")
    step = np.where(known[..., None], np.float64(predicted) - points, 0.0)
    count = known.sum(1)
    mean = np.linalg.norm(step, axis=-1).sum(1) / np.maximum(count, 1)
    return np.where(count > 0, mean / length, np.nan)


def failures(errors: np.ndarray, threshold: float) -> np.ndarray:
    """Whose mean is FR@threshold: 1.0 above it, 0.0 else, NaN stays."""
    return np.where(np.isfinite(errors), (errors > threshold).astype(np.float64), np.nan)


def area_shares(errors: np.ndarray, threshold: float) -> np.ndarray:
    """Whose mean is AUC@threshold: the part of a face in the area, 0..1, NaN stays."""
    return np.clip(1.0 - errors / threshold, 0.0, 1.0)


def error_curve(errors: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(errors, share of faces with at most this error): a curve of steps up to the threshold."""
    known = np.sort(errors[np.isfinite(errors)])
    within = known[known <= threshold]
    share = np.arange(1, len(within) + 1) / max(len(known), 1)
    return np.append(np.insert(within, 0, 0.0), threshold), np.append(
        np.insert(share, 0, 0.0), share[-1:] if len(share) else 0.0
    )
