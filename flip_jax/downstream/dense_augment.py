"""Random changes of training pictures for dense tasks; numpy and OpenCV, no jax.

Geometric ones are a matrix that picture, mask and points share (`random_affine`); photometric ones
change the pixels of the network's input (`change_pixels`). What is drawn is a function of the
generator alone.

Source: the names and widths are those of FaRL's configs (arXiv 2112.03109); how strong gray, gamma,
blur, occlusion and noise are is published only as names, the ranges are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from flip_jax.data.landmark_schemes import SCHEMES, scheme_of


@dataclass(frozen=True)
class Augment:
    """How much of what. Everything 0 = pictures as they are."""

    shift: float = 0.01  # at most, share of the side, along each axis
    rotate: float = 0.314  # radians
    scale: float = 0.1  # of the factor around 1
    # Whether `rotate` and `scale` are standard deviations of normal numbers (parsing) or limits of
    # even ones (alignment).
    normal: bool = True
    # Probabilities.
    gray: float = 0.2
    gamma: float = 0.5
    blur: float = 0.2
    occlusion: float = 0.0
    noise: float = 0.0
    flip: float = 0.0  # left and right; the protocols have none

    def check(self, where: str) -> None:
        """Raises: ValueError: a number out of range."""
        for name, value in vars(self).items():
            most = 1.0 if name not in ("rotate", "normal") else np.inf
            if not 0 <= value <= most or (name == "scale" and value == 1):
                below = {"scale": " and below 1", "rotate": ""}.get(name, " and at most 1")
                raise ValueError(f"{where}.{name}={value}: must be at least 0{below}")


def random_affine(augment: Augment, size: int, rng: np.random.Generator) -> tuple[np.ndarray, bool]:
    """Draws turn, scale and shift of the square around its centre, and whether it is mirrored.

    Returns:
      float64 [2, 3], see `Geometry.then`; whether left and right change places: then `flip_mask`
      and `flip_points` must follow.
    """
    draw = rng.normal if augment.normal else (lambda _, width, n: rng.uniform(-width, width, n))
    angle, grow = draw(0, 1, 2) * (augment.rotate, augment.scale)
    # A normal number may be anything; a face is not to vanish or turn inside out.
    factor = np.clip(1 + grow, 0.5, 1.5)
    shift = rng.uniform(-augment.shift, augment.shift, 2) * size
    mirrored = bool(rng.random() < augment.flip)
    turn = factor * np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    if mirrored:
        turn = turn @ np.diag((-1.0, 1.0))
    centre = np.full(2, (size - 1) / 2)
    return np.column_stack([turn, centre + shift - turn @ centre]), mirrored


def change_pixels(augment: Augment, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Occlusion, noise, gray, gamma and blur, each with its probability, in this order.

    Args:
      image: uint8 [S, S, 3], not changed.

    Returns:
      uint8 [S, S, 3].
    """
    for name, change in _CHANGES.items():
        # Drawn in any case: one probability does not move the numbers of the next change.
        happens, strength = rng.random() < getattr(augment, name), rng.random(8)
        if happens:
            image = change(image, strength, rng)
    return image


def _occlude(image: np.ndarray, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An ellipse of one colour, up to 0.4 of the side long, anywhere."""
    side, image = len(image), image.copy()
    axes = np.maximum(np.round((0.05 + 0.15 * u[2:4]) * side), 1).astype(int).tolist()
    centre = np.round(u[:2] * side).astype(int).tolist()
    cv2.ellipse(image, centre, axes, 180 * u[4], 0, 360, (255 * u[5:8]).tolist(), -1)
    return image


def _add_noise(image: np.ndarray, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal, of a standard deviation up to 25 of 255."""
    noise = rng.standard_normal(image.shape, np.float32) * (25 * u[0])
    return np.clip(image + noise + 0.5, 0, 255).astype(np.uint8)


def _make_gray(image: np.ndarray, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    gray = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    return np.repeat(gray[..., None], 3, -1)


def _bend(image: np.ndarray, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gamma from 1/2 to 2, as often above as below 1."""
    table = 255 * (np.arange(256) / 255) ** (2 ** (2 * u[0] - 1))
    return cv2.LUT(image, np.round(table).astype(np.uint8))


def _blur(image: np.ndarray, u: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Gaussian, of a standard deviation up to 0.01 of the side."""
    return cv2.GaussianBlur(image, (0, 0), max(0.01 * u[0] * len(image), 0.1))


_CHANGES = {
    "occlusion": _occlude,
    "noise": _add_noise,
    "gray": _make_gray,
    "gamma": _bend,
    "blur": _blur,
}
# Words that mark a side in names of classes, each with its mirror image.
_SIDES = {"l": "r", "r": "l", "left": "right", "right": "left"}


def mirrored_classes(names: Sequence[str]) -> np.ndarray:
    """int64 [K]: the class that each becomes in a mirror, by names such as `l_eye` and `r_eye`.

    A side is a word of its own, anywhere in a name, in letters of any size: `Eye left`. `l_lip`
    stays what it is, as there is no `r_lip`.

    Raises:
      ValueError: no names, as manifests without classes have it; a name with `left` or `right`
        whose other side is missing.
    """
    if not names:
        raise ValueError(
            "augment.flip: the data set does not name the classes of its masks, and which of them "
            "are left and right is not known; set augment.flip=0"
        )
    places = {name.lower(): k for k, name in enumerate(names)}
    found = np.arange(len(names))
    for name, k in places.items():
        words = re.split(r"([^\W_]+)", name)
        other = places.get("".join(_SIDES.get(word, word) for word in words))
        if other is None and {"left", "right"} & set(words):
            raise ValueError(
                f"augment.flip: class {names[k]!r} has no other side among {', '.join(names)}; "
                "set augment.flip=0"
            )
        found[k] = k if other is None else other
    return found


def flip_mask(mask: np.ndarray, names: tuple[str, ...]) -> np.ndarray:
    """A mirrored mask (its pixels have moved already) with left and right classes exchanged."""
    table = np.arange(256, dtype=np.uint8)
    table[: len(names)] = mirrored_classes(names)
    return table[mask]


def flip_points(points: np.ndarray) -> np.ndarray:
    """What is known of mirrored points, [P, ...] (moved already), in the order of their scheme.

    Raises:
      ValueError: no table for so many points.
    """
    scheme = scheme_of(len(points))
    if scheme is None:
        raise ValueError(
            f"augment.flip: which of {len(points)} landmarks are mirror images is not known, only "
            f"of {', '.join(map(str, SCHEMES))}; set augment.flip=0"
        )
    return points[scheme.mirror]
