"""The sketch of a record as it grows, whatever the record keeps of it; no jax."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import cv2
import numpy as np

from flip_jax.data.jpeg import BadImage, jpeg_size
from flip_jax.data.records import Record
from flip_jax.data.sketch_strokes import by_hand, raster_at, strokes_at
from flip_jax.data.transforms import decode_image, resize_image


def sketch_kind(record: Record) -> str | None:
    """`strokes`: lines in their own order; `steps`: published step by step; `raster`: one picture,
    revealed in a made-up order, see `sketch_strokes`; None: no sketch."""
    if record.drawings:
        return "steps" if len(record.drawings) > 1 else "raster"
    return "strokes" if record.strokes else None


def sketch_at(record: Record, shares: Sequence[float], side: int, hand: float = 0.0) -> np.ndarray:
    """The sketch at some stages.

    Args:
      record: one with a sketch.
      shares: how much of it is drawn, ascending, above 0 up to 1, which is all of it. Of a sketch
        that was published step by step, the first of its steps that has so much.
      side: S, pixels; the sketch is squashed as its photo is.
      hand: how far off strokes are, which are the picture's own lines, see `by_hand`; the same
        each time. Drawings stay as they are.

    Returns:
      uint8 [len(shares), S, S, 3], 255 = paper.

    Raises:
      ValueError: the stored sketch cannot be decoded or is blank; names the record.
    """
    try:
        pictures = _pictures(record, np.asarray(shares), side, hand)
    except ValueError as error:
        raise ValueError(f"sketch of {record.id}: {error}") from error
    return np.stack([resize_image(cv2.cvtColor(p, cv2.COLOR_GRAY2RGB), side) for p in pictures])


def _pictures(
    record: Record, shares: np.ndarray, side: int, hand: float
) -> np.ndarray | list[np.ndarray]:
    """Grey pictures uint8 [H, W]."""
    drawings = record.drawings
    if len(drawings) > 1:
        # A share of n / N shows step n, whatever its last bit.
        numbers = np.ceil(shares * len(drawings) - 1e-9).astype(int) - 1
        return [_grey(drawings[number]) for number in numbers]
    if drawings:
        return raster_at(_grey(drawings[0]), shares)
    shape = jpeg_size(record.image)
    strokes = by_hand(record.strokes, shape, hand, zlib.crc32(record.id.encode()))
    return strokes_at(strokes, shape, shares, side)


def _grey(data: bytes) -> np.ndarray:
    try:
        return cv2.cvtColor(decode_image(data), cv2.COLOR_RGB2GRAY)
    except BadImage as error:
        raise ValueError(f"a drawing is no picture: {error}") from error
