"""Canvas of the drawn faces: one geometry for the picture, the class mask and the sketch.

Parts are given as points in face units (origin between the eyes, x to
the picture's right, y down, 1 = half a face width). A `Frame` turns them into picture units
(0..1 on both axes), a `Canvas` turns those into pixels of whatever it draws.
"""

from __future__ import annotations

import cmath
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import cv2
import numpy as np

# CelebAMask-HQ's order. `l_` and `r_` are the person's own left and right, as there.
PARSING_CLASSES = (
    "background",
    "skin",
    "nose",
    "eye_g",
    "l_eye",
    "r_eye",
    "l_brow",
    "r_brow",
    "l_ear",
    "r_ear",
    "mouth",
    "u_lip",
    "l_lip",
    "hair",
    "hat",
    "ear_r",
    "neck_l",
    "neck",
    "cloth",
)
CLASS_INDEX = {name: index for index, name in enumerate(PARSING_CLASSES)}

# Stages of the sketch, in the order in which an artist would put down the lines, each with the
# classes that hide its lines.
STAGES = HEAD, BODY, FEATURES, SHADING, HAIR, WEAR = range(6)
HIDERS = {
    HEAD: ("hair", "hat"),
    BODY: ("skin", "hair", "hat"),
    FEATURES: ("hair", "hat"),
    SHADING: ("hair", "hat"),
    HAIR: ("hat",),
    WEAR: (),
}

Colour = Sequence[float] | np.ndarray  # RGB, 0..255

_SHIFT = 4  # fractional bits of OpenCV's fixed-point coordinates


@dataclass(frozen=True)
class Frame:
    """Maps face units to picture units: turn about the vertical and the ear axis, then roll.

    Attributes:
        origin: picture units of the face's origin.
        pivot: face units of the point that stays when the head rolls.
        scale: picture widths per face unit.
        yaw, pitch, roll: radians; positive yaw looks to the picture's right.
        dome: how far the middle of the face stands out; 0 = a flat body.
    """

    origin: tuple[float, float]
    pivot: tuple[float, float]
    scale: float
    yaw: float = 0.0
    pitch: float = 0.0
    roll: float = 0.0
    dome: float = 0.0

    def __call__(self, points: np.ndarray, lift: float = 0.0) -> np.ndarray:
        """Projects points.

        Args:
            points: [n, 2] x, y in face units.
            lift: height over the dome, in face units; negative = behind it.

        Returns:
            float64 [n, 2] x, y in picture units.
        """
        x, y = np.asarray(points, np.float64).T
        depth = lift
        if self.dome:
            depth = lift + self.dome * np.exp(x * x / -0.7) * (1 - 0.18 * y * y)
        # Rolling is a product of complex numbers, which keeps x and y together.
        turned = np.empty(len(x), np.complex128)
        turned.real = x * math.cos(self.yaw) + depth * math.sin(self.yaw)
        turned.imag = y * math.cos(self.pitch) - depth * math.sin(self.pitch)
        pivot, origin = complex(*self.pivot), complex(*self.origin)
        turned -= pivot
        turned *= self.scale * cmath.exp(1j * self.roll)
        turned += origin + self.scale * pivot
        return turned.view(np.float64).reshape(-1, 2)


def smooth(points: np.ndarray, closed: bool = False, steps: int = 6) -> np.ndarray:
    """Catmull-Rom curve through `points` [n, 2], `steps` samples per interval."""
    points = np.asarray(points, np.float64)
    if closed:
        padded = np.concatenate([points[-1:], points, points[:2]])
    else:
        padded = np.concatenate([points[:1], points, points[-1:]])
    p0, p1, p2, p3 = (padded[i : len(padded) - 3 + i, None] for i in range(4))
    t = (np.arange(steps) / steps)[None, :, None]
    curve = 0.5 * (
        2 * p1
        + (p2 - p0) * t
        + (2 * p0 - 5 * p1 + 4 * p2 - p3) * t**2
        + (3 * p1 - p0 - 3 * p2 + p3) * t**3
    ).reshape(-1, 2)
    return curve if closed else np.concatenate([curve, points[-1:]])


def resample(points: np.ndarray, count: int) -> np.ndarray:
    """`count` points at equal arc length along the polyline `points` [n, 2]."""
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(points, axis=0).T))])
    at = np.linspace(0, length[-1], count)
    return np.stack([np.interp(at, length, points[:, axis]) for axis in (0, 1)], axis=1)


def ellipse(
    centre: Sequence[float],
    radii: Sequence[float],
    start: float = 0.0,
    stop: float = 2 * math.pi,
    count: int = 28,
) -> np.ndarray:
    """Points [count, 2] on an ellipse's arc, angles in radians, clockwise on the screen."""
    return _arc(start, stop, count) * radii + centre


@functools.cache
def _arc(start: float, stop: float, count: int) -> np.ndarray:
    """Points [count, 2] of the unit circle."""
    angle = np.linspace(start, stop, count)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


@functools.cache
def _hump(count: int) -> np.ndarray:
    """A parabola [count] from 1 at both ends to 0 in the middle."""
    return np.linspace(-1, 1, count) ** 2


def moved(points: np.ndarray, x: float = 0.0, y: float = 0.0) -> np.ndarray:
    """The points [n, 2] or the point [2], translated."""
    return np.asarray(points) + np.array([x, y])


def mirror(points: np.ndarray) -> np.ndarray:
    """The points seen in the y axis, in reverse order (so that outlines join up)."""
    return np.asarray(points)[::-1] * (-1.0, 1.0)


def normals(points: np.ndarray) -> np.ndarray:
    """Unit vectors [n, 2] across the polyline `points` [n, 2]."""
    padded = np.concatenate([points[:1], points, points[-1:]])
    along = padded[2:] - padded[:-2]
    across = along[:, ::-1] * (-1.0, 1.0)
    return across / np.maximum(np.hypot(across[:, 0], across[:, 1]), 1e-9)[:, None]


def within(polygon: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Which `points` [n, 2] lie in `polygon` [m, 2], by the parity of crossings: bool [n]."""
    x0, y0 = polygon.T
    x1, y1 = np.roll(polygon, -1, axis=0).T
    x, y = points[:, :1], points[:, 1:]
    crosses = (y0 > y) != (y1 > y)
    rise = np.where(y1 == y0, 1.0, y1 - y0)
    at = x0 + (y - y0) * (x1 - x0) / rise
    return np.count_nonzero(crosses & (at > x), axis=1) % 2 == 1


def ribbon(points: np.ndarray, width: float, taper: float = 1.0) -> np.ndarray:
    """Outline [2n, 2] of a brush stroke along `points`, thinner to both ends by `taper` (0..1)."""
    profile = 1 - taper * _hump(len(points))
    offset = normals(points) * (0.5 * width * profile)[:, None]
    return np.concatenate([points + offset, (points - offset)[::-1]])


@dataclass
class Canvas:
    """An RGB picture, its class mask and its strokes, drawn together. Points in picture units.

    Attributes:
        size: side of the finished picture in pixels.
        image: uint8 [c, c, 3]; c is a power of two, 256 or more and at least 1.5 times `size`.
        mask: uint8 [size, size], index into PARSING_CLASSES.
    """

    size: int
    image: np.ndarray = field(init=False)
    mask: np.ndarray = field(init=False)
    _strokes: list[tuple[int, np.ndarray]] = field(init=False, default_factory=list)

    def __post_init__(self):
        side = 256
        while side < 1.5 * self.size:
            side *= 2
        self.image = np.zeros((side, side, 3), np.uint8)
        self.mask = np.zeros((self.size, self.size), np.uint8)

    def _fixed(self, points: np.ndarray, side: int) -> np.ndarray:
        # Pixel centres lie at half-integers of the continuous picture.
        pixels = (np.asarray(points) * side - 0.5) * (1 << _SHIFT)
        return np.round(pixels).astype(np.int32)

    def label(self, points: np.ndarray, name: str, keep: tuple[str, ...] = ()) -> None:
        """Marks a polygon's pixels as class `name`, except those of the classes in `keep`."""
        before = self.mask.copy() if keep else None
        polygon = self._fixed(points, self.size)
        cv2.fillPoly(self.mask, [polygon], CLASS_INDEX[name], cv2.LINE_8, _SHIFT)
        if keep:
            kept = np.isin(before, [CLASS_INDEX[k] for k in keep])
            self.mask[kept] = before[kept]

    def fill(self, points: np.ndarray, colour: Colour, label: str | None = None) -> None:
        """Fills a polygon; `label` names the class its pixels become."""
        polygon = self._fixed(points, len(self.image))
        cv2.fillPoly(self.image, [polygon], tuple(map(float, colour)), cv2.LINE_AA, _SHIFT)
        if label is not None:
            self.label(points, label)

    def blend(
        self,
        points: np.ndarray,
        colour: Colour,
        alpha: float,
        soft: float = 0.0,
        inside: np.ndarray | None = None,
    ) -> None:
        """Fills a polygon with opacity `alpha`.

        Args:
            points: [n, 2] polygon.
            colour: RGB, 0..255.
            alpha: 0..1.
            soft: standard deviation of the blur of the polygon's edge, in picture widths.
            inside: [m, 2] polygon that nothing is drawn outside of; None = everywhere.
        """
        side = len(self.image)
        points = np.asarray(points)
        sigma = soft * side
        low = np.floor(points.min(axis=0) * side - 3 * sigma - 2).astype(int).clip(0, side)
        high = np.ceil(points.max(axis=0) * side + 3 * sigma + 2).astype(int).clip(0, side)
        if (high <= low).any():
            return
        corner = (low << _SHIFT).astype(np.int32)
        shape = (high[1] - low[1], high[0] - low[0])

        def cover(polygon):
            layer = np.zeros(shape, np.uint8)
            fixed = self._fixed(polygon, side) - corner
            return cv2.fillPoly(layer, [fixed], 255, cv2.LINE_AA, _SHIFT)

        layer = cover(points)
        if sigma > 0:
            # Two box filters of the same variance: near enough to a Gaussian, at a fixed cost.
            width = round(math.sqrt(6 * sigma * sigma + 1))
            for _ in range(2):
                layer = cv2.blur(layer, (width, width), borderType=cv2.BORDER_CONSTANT)
        if inside is not None:
            layer = cv2.multiply(layer, cover(inside), scale=1 / 255)
        weight = (layer.astype(np.float32) * (alpha / 255))[:, :, None]
        region = self.image[low[1] : high[1], low[0] : high[0]]
        region[:] = region + weight * (np.asarray(colour, np.float32) - region) + 0.5

    def line(self, points: np.ndarray, colour: Colour, width: float, taper: float = 1.0) -> None:
        """Brush stroke of `width` picture widths, thinner to its ends by `taper` (0..1)."""
        # A line thinner than a pixel of the canvas would break up.
        width = max(width, 1.2 / len(self.image))
        self.fill(ribbon(np.asarray(points), width, taper), colour)

    def hairs(self, lines: np.ndarray, colour: Colour, width: float) -> None:
        """Even lines [k, n, 2], all at once."""
        thickness = max(1, round(width * len(self.image)))
        fixed = self._fixed(lines, len(self.image))
        colour = tuple(map(float, colour))
        cv2.polylines(self.image, list(fixed), False, colour, thickness, cv2.LINE_AA, _SHIFT)

    def outline(
        self, points: np.ndarray, colour: Colour, width: float, closed: bool = True
    ) -> None:
        """Even line along a polyline."""
        thickness = max(1, round(width * len(self.image)))
        polygon = self._fixed(points, len(self.image))
        cv2.polylines(
            self.image, [polygon], closed, tuple(map(float, colour)), thickness, cv2.LINE_AA, _SHIFT
        )

    def stroke(self, stage: int, points: np.ndarray) -> None:
        """Adds a line of the sketch; strokes of a lower `stage` come first."""
        self._strokes.append((stage, np.asarray(points)))

    def sketch(self) -> tuple[np.ndarray, ...]:
        """The strokes by stage, without what later layers hide or the picture's edge cuts off.

        Returns:
            Polylines float32 [n, 2] in pixels, n >= 2, at least 1.2 % of the size long.
        """
        strokes = sorted(self._strokes, key=lambda item: item[0])
        counts = [len(points) for _, points in strokes]
        stage = np.repeat([stage for stage, _ in strokes], counts)
        number = np.repeat(np.arange(len(strokes)), counts)
        pixels = np.concatenate([points for _, points in strokes]) * self.size - 0.5
        pixels = pixels.astype(np.float32)
        inside = ((pixels >= 0) & (pixels <= self.size - 1)).all(axis=1)
        x, y = pixels.clip(0, self.size - 1).round().astype(int).T
        seen = inside & ~np.stack([self._hidden(s) for s in STAGES])[stage, y, x]
        cuts = np.flatnonzero(np.diff(seen) | (np.diff(number) > 0)) + 1
        starts = np.concatenate([[0], cuts])
        steps = np.hypot(*np.diff(pixels, axis=0, prepend=pixels[:1]).T)
        steps[starts] = 0
        # What is left of a line may be a mere dot.
        drawn = seen[starts] & (np.add.reduceat(steps, starts) > 0.012 * self.size)
        return tuple(run for run, keep in zip(np.split(pixels, cuts), drawn, strict=True) if keep)

    def _hidden(self, stage: int) -> np.ndarray:
        """Where later layers cover lines of this stage: bool [size, size]."""
        hides = np.array([name in HIDERS[stage] for name in PARSING_CLASSES], np.uint8)
        # Lines on the edge of the cover stay: only what lies inside it is hidden.
        margin = np.ones((3, 3), np.uint8)
        iterations = max(1, round(self.size / 64))
        return cv2.erode(hides[self.mask], margin, iterations=iterations).astype(bool)
