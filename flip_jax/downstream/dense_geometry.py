"""How a picture gets into the network's square, and what is found there back; numpy, no jax.

Points are (x, y) in pixels, whole coordinates are pixel centres, everything is float64. One chain
of a matrix and a warp moves picture, mask and points alike:

    picture --matrix--> square --tanh warp--> network input

Source: arXiv 2112.03109 (FaRL) and arXiv 1906.01342 (RoI tanh-warping).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from flip_jax.data.transforms import resize_image

# Of each scheme of landmarks, by their number: those whose means are the eyes (the one on the left
# of the picture first), the tip of the nose and the corners of the mouth.
FIVE_POINTS = {
    5: ((0,), (1,), (2,), (3,), (4,)),
    68: (tuple(range(36, 42)), tuple(range(42, 48)), (30,), (48,), (54,)),
    98: ((96,), (97,), (54,), (76,), (82,)),
    106: ((104,), (105,), (54,), (84,), (90,)),
}
# Where these five lie in the square, as shares of its side.
FIVE_PLACES = np.array([(196, 226), (316, 226), (256, 286), (220, 360.4), (292, 360.4)]) / 512


def tanh_warp(c: np.ndarray, factor: float) -> np.ndarray:
    """Squeezes the whole line into (-1, 1); |c| <= 1 - factor stays where it is.

    Beyond, with f the factor, c becomes f tanh((c - 1 + f) / f) + 1 - f; it is odd in c, and its
    slope has no jump. Factor 0 leaves everything as it is.
    """
    if factor == 0:
        return c
    inner = 1 - factor
    outside = np.abs(c) - inner
    bent = np.sign(c) * (factor * np.tanh(outside / factor) + inner)
    return np.where(outside > 0, bent, c)


def tanh_unwarp(c: np.ndarray, factor: float) -> np.ndarray:
    """The exact inverse of `tanh_warp` on (-1, 1)."""
    if factor == 0:
        return c
    inner = 1 - factor
    outside = np.abs(c) - inner
    # Not computed where it is not taken; outside of (-1, 1) there is nothing.
    share = np.clip(outside / factor, 0.0, np.nextafter(1.0, 0.0))
    bent = np.sign(c) * (factor * np.arctanh(share) + inner)
    return np.where(outside > 0, bent, c)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where each pixel of a picture is in the network's input.

    Attributes:
      matrix: float64 [2, 3], pixels of the picture -> pixels of the square.
      size: S, its side.
      factor: of the tanh warp, 0 to 1; 0 = none.
    """

    matrix: np.ndarray
    size: int
    factor: float = 0.0

    def forward(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the picture -> of the network's input."""
        square = points @ self.matrix[:, :2].T + self.matrix[:, 2]
        if self.factor == 0:
            return square
        return (tanh_warp((square + 0.5) * 2 / self.size - 1, self.factor) + 1) * (
            self.size / 2
        ) - 0.5

    def inverse(self, points: np.ndarray) -> np.ndarray:
        """Points [..., 2] of the network's input -> of the picture; the inverse of `forward`."""
        if self.factor:
            warped = (points + 0.5) * 2 / self.size - 1
            points = (tanh_unwarp(warped, self.factor) + 1) * (self.size / 2) - 0.5
        return (points - self.matrix[:, 2]) @ np.linalg.inv(self.matrix[:, :2]).T

    @functools.cached_property
    def sources(self) -> np.ndarray:
        """float64 [S, S, 2]: where in the picture each pixel of the network's input is."""
        return self.inverse(_pixels(self.size, self.size))

    def then(self, square: np.ndarray) -> Geometry:
        """With an affine map [2, 3] of the square after the matrix, before the warp."""
        whole = np.vstack([self.matrix, (0, 0, 1)])
        return Geometry(square @ whole, self.size, self.factor)

    def place_image(self, image: np.ndarray) -> np.ndarray:
        """uint8 [H, W, 3] -> uint8 [S, S, 3], bicubic; black where the picture has nothing.

        A picture that is larger than it will be is shrunk first, so that nothing is skipped.
        """
        height, width = image.shape[:2]
        squash = squash_matrix(height, width, self.size)
        if self.factor == 0 and np.array_equal(self.matrix, squash):
            return resize_image(image, self.size)  # exactly what the encoder is used to
        scale = np.minimum(np.linalg.norm(self.matrix[:, :2], axis=0), 1.0)
        small = tuple(int(n) for n in np.maximum(np.round(scale * (width, height)), 1))
        grid = self.sources
        if small != (width, height):
            image = np.asarray(Image.fromarray(image).resize(small, Image.Resampling.BICUBIC))
            grid = (grid + 0.5) * (np.array(small) / (width, height)) - 0.5
        # OpenCV's coordinates are 16 bits; whatever is far outside is black anyway.
        grid = np.clip(grid, -16.0, max(small) + 16.0).astype(np.float32)
        return cv2.remap(image, grid, None, cv2.INTER_CUBIC, borderMode=cv2.BORDER_CONSTANT)

    def place_mask(self, mask: np.ndarray) -> np.ndarray:
        """uint8 [H, W] -> uint8 [S, S], the nearest pixel; 0 where the picture has nothing."""
        height, width = mask.shape
        x, y = np.moveaxis(np.floor(self.sources + 0.5), -1, 0)
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        x, y = (np.where(inside, n, 0).astype(np.int64) for n in (x, y))
        return np.where(inside, mask[y, x], 0).astype(np.uint8)

    def take_back(self, maps: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """What the network says of every pixel of the picture.

        Args:
          maps: float32 [h, w, K] over the network's input, such as logits, h and w of any size.

        Returns:
          float32 [height, width, K], bilinear with edges repeated; bool [height, width], whether
          the network's input shows the pixel.
        """
        points = self.forward(_pixels(height, width))
        shown = ((points >= -0.5) & (points <= self.size - 0.5)).all(-1)
        grid = (points + 0.5) * (np.array(maps.shape[1::-1]) / self.size) - 0.5
        grid = np.clip(grid, 0.0, np.array(maps.shape[1::-1]) - 1.0)
        return sample_bilinear(maps, grid), shown


def squash_matrix(height: int, width: int, size: int) -> np.ndarray:
    """[2, 3]: the whole picture onto the whole square, the aspect ratio is not kept."""
    x, y = size / width, size / height
    return np.array([(x, 0, x / 2 - 0.5), (0, y, y / 2 - 0.5)])


def five_point_matrix(landmarks: np.ndarray, size: int) -> np.ndarray:
    """[2, 3]: turns, shifts and scales a face so that its five points come next to `FIVE_PLACES`.

    Args:
      landmarks: float [P, 2], P of `FIVE_POINTS`.

    Raises:
      ValueError: another number of points, or all of them in one place.
    """
    if len(landmarks) not in FIVE_POINTS:
        raise ValueError(
            f"no five points are known of {len(landmarks)} landmarks, only of "
            f"{', '.join(map(str, FIVE_POINTS))}"
        )
    parts = FIVE_POINTS[len(landmarks)]
    points = np.stack([landmarks[list(part)].mean(0) for part in parts]).astype(np.float64)
    if not np.ptp(points, axis=0).any():
        raise ValueError("the five points are one: no face can be turned by them")
    return similarity(points, FIVE_PLACES * size - 0.5)


def similarity(points: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[2, 3]: turn, scale and shift that bring [N, 2] points to places with least squares."""
    # As complex numbers such a map is z -> a z + b.
    z, w = (n[:, 0] + 1j * n[:, 1] for n in (points, places))
    centred = z - z.mean()
    a = np.vdot(centred, w - w.mean()) / np.vdot(centred, centred).real
    b = w.mean() - a * z.mean()
    return np.array([(a.real, -a.imag, b.real), (a.imag, a.real, b.imag)])


def sample_bilinear(maps: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """float32 [h, w, K] at float [H, W, 2] (x, y) inside the map -> float32 [H, W, K].

    Not OpenCV's: that rounds positions to 1/32 of a pixel, and a pixel of the map is several of
    the picture.
    """
    low = np.floor(grid).astype(np.int64)
    high = np.minimum(low + 1, np.array(maps.shape[1::-1]) - 1)
    (x0, y0), (x1, y1) = np.moveaxis(low, -1, 0), np.moveaxis(high, -1, 0)
    part = (grid - low).astype(np.float32)[..., None]
    x, y = part[..., 0, :], part[..., 1, :]
    top = maps[y0, x0] * (1 - x) + maps[y0, x1] * x
    return top * (1 - y) + (maps[y1, x0] * (1 - x) + maps[y1, x1] * x) * y


def _pixels(height: int, width: int) -> np.ndarray:
    """float64 [height, width, 2]: (x, y) of every pixel."""
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), -1).astype(np.float64)
