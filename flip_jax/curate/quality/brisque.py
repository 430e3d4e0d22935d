"""BRISQUE: how far the statistics of a picture are from those of undistorted photographs.

Source: Mittal, Moorthy and Bovik, "No-Reference Image Quality Assessment in the Spatial Domain",
IEEE Transactions on Image Processing 21, 2012. The features follow the authors' MATLAB release; the
regression in brisque_live.npz is the one that they trained on the LIVE database and released under
the terms in brisque_live.LICENSE.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from scipy.special import gammaln

MIN_SIDE = 16  # pixels; below, there is next to nothing left at half the size
MAX_SIDE = 2048  # pixels; of a larger picture the middle is taken, to bound the memory
_MODEL = Path(__file__).with_name("brisque_live.npz")
_GAMMA, _RHO = 0.05, -153.591  # of the regression: width of its kernel, minus its offset
_WINDOW = cv2.getGaussianKernel(7, 7 / 6, cv2.CV_64F)
# Flat areas: what remains of a grey value less the mean of equal ones is rounding.
_ROUNDING = 1e-6
# MATLAB's imresize by one half: Keys' cubic, a = -1/2, stretched over eight pixels.
_HALF = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
_SHAPES = np.arange(0.2, 10.001, 0.001)  # the shape parameters that are tried
_SHIFTS = ((0, 1), (1, 0), (1, 1), (-1, 1))


class _Model(NamedTuple):
    vectors: np.ndarray  # float64 [V, 36]
    weights: np.ndarray  # float64 [V]
    least: np.ndarray  # float64 [36], of a feature in training: becomes -1
    greatest: np.ndarray  # becomes 1


def brisque(image: np.ndarray) -> float:
    """Scores a picture.

    Args:
      image: uint8 [H, W, 3] RGB.

    Returns:
      About 0 (like an undistorted photograph) to 100 (badly distorted); a little outside at times.
      NaN where it is not defined: a side below `MIN_SIDE`, or hardly any contrast.
    """
    if min(image.shape[:2]) < MIN_SIDE:
        return math.nan
    top, left = (max(side - MAX_SIDE, 0) // 2 for side in image.shape[:2])
    image = image[top : top + MAX_SIDE, left : left + MAX_SIDE]
    found = features(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))
    model = _model()
    # The release passes features on as text with six decimals.
    scaled = 2 * (np.round(found, 6) - model.least) / (model.greatest - model.least) - 1
    distances = np.square(model.vectors - scaled).sum(axis=1)
    return float(np.sum(model.weights * np.exp(-_GAMMA * distances)) - _RHO)


def features(grey: np.ndarray) -> np.ndarray:
    """The 36 features of uint8 [H, W], float64; NaN where they are not defined."""
    large = grey.astype(np.float64)
    small = cv2.sepFilter2D(
        large, cv2.CV_64F, _HALF, _HALF, anchor=(3, 3), borderType=cv2.BORDER_REFLECT
    )[::2, ::2]
    return np.array([*_features(large), *_features(np.ascontiguousarray(small))])


def _features(grey: np.ndarray) -> list[float]:
    """18 features at one scale: the spread and shape of the contrasts, and of the products of
    neighbours in four directions."""
    mean = cv2.sepFilter2D(grey, cv2.CV_64F, _WINDOW, _WINDOW, borderType=cv2.BORDER_CONSTANT)
    square = cv2.sepFilter2D(
        grey * grey, cv2.CV_64F, _WINDOW, _WINDOW, borderType=cv2.BORDER_CONSTANT
    )
    contrast = grey - mean
    contrast[np.abs(contrast) < _ROUNDING] = 0
    contrast /= np.sqrt(np.abs(square - mean * mean)) + 1
    absolute, power = float(np.abs(contrast).mean()), float(np.square(contrast).mean())
    if not absolute:
        return [math.nan] * 18
    found = [_nearest(_symmetric(), power / absolute**2), power]
    for shift in _SHIFTS:
        found += _asymmetric_fit(contrast * np.roll(contrast, shift, axis=(0, 1)))
    return found


def _asymmetric_fit(products: np.ndarray) -> tuple[float, float, float, float]:
    """Shape, mean and the two variances of an asymmetric generalised Gaussian, by moments."""
    absolute = np.abs(products)
    total, signed = float(np.square(products).sum()), float((products * absolute).sum())
    negative, positive = np.count_nonzero(products < 0), np.count_nonzero(products > 0)
    if not negative or not positive:
        return (math.nan,) * 4
    left, right = (total - signed) / 2 / negative, (total + signed) / 2 / positive
    # Below: means over all pixels; `size` is their number.
    size = products.size
    ratio = math.sqrt(left / right)
    moments = (float(absolute.sum()) / size) ** 2 / (total / size)
    moments *= (ratio**3 + 1) * (ratio + 1) / (ratio**2 + 1) ** 2
    shape = _nearest(1 / _symmetric(), moments)
    log = math.lgamma(2 / shape) - (math.lgamma(1 / shape) + math.lgamma(3 / shape)) / 2
    return shape, (math.sqrt(right) - math.sqrt(left)) * math.exp(log), left, right


@cache
def _symmetric() -> np.ndarray:
    """Variance over squared mean deviation of a generalised Gaussian, for each of `_SHAPES`."""
    return np.exp(gammaln(1 / _SHAPES) + gammaln(3 / _SHAPES) - 2 * gammaln(2 / _SHAPES))


def _nearest(ratios: np.ndarray, ratio: float) -> float:
    return float(_SHAPES[np.abs(ratios - ratio).argmin()])


@cache
def _model() -> _Model:
    with np.load(_MODEL, allow_pickle=False) as file:
        return _Model(*(file[name].astype(np.float64) for name in _Model._fields))
