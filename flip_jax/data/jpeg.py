"""JPEG files: what their header says, and their pixels, at full size or at a part of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

import cv2
import numpy as np
import simplejpeg

# Refused from the header, before any pixel is decoded: a small file can claim 16k x 16k pixels.
MAX_PIXELS = 100_000_000
# A progressive file may go over all its pixels again in every scan; about ten are usual.
MAX_SCANS = 100
_SCAN = 0xFF, 0xDA  # only as a marker: among coded pixels a zero follows each FF

# EXIF orientation -> the turn that makes the stored rows upright; 1 = none.
_TURNS = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}


class BadImage(ValueError):
    """The bytes are not a picture that can be decoded whole."""


def is_jpeg(data: bytes) -> bool:
    """Whether it begins as a JPEG does."""
    return data[:3] == b"\xff\xd8\xff"


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Reads (height, width) of a JPEG as it is shown, from the header alone.

    Raises:
      BadImage: no JPEG header, or more than `MAX_PIXELS` pixels.
    """
    height, width, _ = _header(data)
    return (width, height) if _orientation(data) >= 5 else (height, width)


def decode_jpeg(data: bytes, least: int | None = None, upright: bool = True) -> np.ndarray | None:
    """Decodes a JPEG; None for CMYK, whose inversion by Adobe simplejpeg does not know.

    Every defect that libjpeg notices counts as damage.

    Args:
      least: pixels. The picture comes at 1/2, 1/4 or 1/8 of its size where neither side is shorter
        than this then: libjpeg leaves the high frequencies of each block out, in about half the
        time. None = full size.
      upright: whether the EXIF orientation is applied.

    Returns:
      uint8 [H, W, 3] RGB, C-contiguous.

    Raises:
      BadImage: truncated or corrupt data, more than `MAX_PIXELS` pixels or `MAX_SCANS` scans.
    """
    height, width, colorspace = _header(data)
    scans = _count_scans(data)
    if scans > MAX_SCANS:
        raise BadImage(f"{scans} scans; at most {MAX_SCANS} are decoded (save the picture again)")
    if colorspace in ("CMYK", "YCCK"):
        return None
    part = _part(min(height, width), least)
    try:
        image = simplejpeg.decode_jpeg(
            data,
            colorspace="RGB",
            # They ask for 1 / part exactly: libjpeg knows all eighths, the others are slow.
            min_height=-(-height // part),
            min_width=-(-width // part),
        )
    except ValueError as error:
        raise BadImage(f"damaged JPEG: {error}") from error
    turn = _TURNS.get(_orientation(data)) if upright else None
    return image if turn is None else turn(image)


def _count_scans(data: bytes) -> int:
    """Four times as fast as `bytes.count`."""
    codes = np.frombuffer(data, np.uint8)
    return np.count_nonzero((codes[:-1] == _SCAN[0]) & (codes[1:] == _SCAN[1]))


def _part(side: int, least: int | None) -> int:
    """The largest of 1, 2, 4, 8 that leaves `least` pixels of a side."""
    if least is None:
        return 1
    return next(part for part in (8, 4, 2, 1) if part == 1 or side // part >= least)


def check_pixels(height: int, width: int) -> None:
    """Refuses pictures of more than `MAX_PIXELS` pixels: BadImage."""
    if height * width > MAX_PIXELS:
        raise BadImage(
            f"{width} x {height} pixels; at most {MAX_PIXELS:,} are decoded (shrink the picture)"
        )


def _header(data: bytes) -> tuple[int, int, str]:
    """Returns stored height, width and colour space."""
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise BadImage(f"not a readable JPEG header: {error}") from error
    check_pixels(height, width)
    return height, width, colorspace


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yields marker and content of each header segment.

    Pillow would parse all of them; this walk costs microseconds.
    """
    position = 2
    while data[position : position + 1] == b"\xff" and position + 4 <= len(data):
        if data[position + 1] == 0xFF:  # any number of these may stand before a marker
            position += 1
            continue
        marker, length = struct.unpack_from(">BH", data, position + 1)
        if marker == 0xDA:  # start of scan: no header segment follows
            return
        yield marker, data[position + 4 : position + 2 + length]
        position += 2 + length


def _orientation(data: bytes) -> int:
    """Returns the EXIF orientation, 1 to 8; 1 where there is none or it cannot be read."""
    for marker, content in _segments(data):
        if marker == 0xE1 and content.startswith(b"Exif\0\0"):
            return _tiff_orientation(content[6:])
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    try:
        if order is None:
            return 1
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, start + 2 + 12 * entry)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def is_plain_jpeg(data: bytes) -> bool:
    """Whether it is a baseline (not progressive) colour JPEG that needs no turning."""
    return (
        is_jpeg(data)
        and _header(data)[2] in ("YCbCr", "RGB")
        and any(marker == 0xC0 for marker, _ in _segments(data))
        and _orientation(data) == 1
    )
