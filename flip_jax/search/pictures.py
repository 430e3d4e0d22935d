"""Pictures that come in and go out: checks before anything is decoded, and thumbnails; no jax."""

from __future__ import annotations

import io

import cv2
import numpy as np
from PIL import Image

from flip_jax.data.transforms import BadImage, decode_image, encode_jpeg

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_BYTES = 8 * 2**20  # of an uploaded file
MAX_PIXELS = 32_000_000  # 96 MB decoded; a small file can claim far more
MIN_SIDE = 8  # pixels
THUMBNAIL = 320  # pixels, longer side
_QUALITY = 88


class RefusedPicture(ValueError):
    """An upload that is not decoded or cannot be; `code` says why, in one word."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


def decode_upload(data: bytes) -> np.ndarray:
    """Decodes a picture of unknown origin.

    Args:
      data: the whole file.

    Returns:
      uint8 [H, W, 3] RGB, upright.

    Raises:
      RefusedPicture: more than `MAX_BYTES`, no JPEG, PNG or WebP, more than `MAX_PIXELS` by its
        header, smaller than `MIN_SIDE`, or damaged.
    """
    if len(data) > MAX_BYTES:
        raise RefusedPicture("picture_bytes", f"the picture has more than {MAX_BYTES >> 20} MB")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        width = height = MAX_PIXELS
    except Exception as error:  # Pillow's plugins raise many types for damaged files
        raise RefusedPicture("picture_format", f"not a {', '.join(FORMATS)} picture") from error
    if width * height > MAX_PIXELS:
        limit = f"at most {MAX_PIXELS // 1_000_000} megapixels are decoded"
        raise RefusedPicture("picture_pixels", f"the picture has too many pixels; {limit}")
    if min(width, height) < MIN_SIDE:
        raise RefusedPicture("picture_small", f"the picture must be {MIN_SIDE} pixels or more")
    try:
        return decode_image(data)
    except BadImage as error:
        why = "the picture is damaged, not whole, or not of 8 bits per channel"
        raise RefusedPicture("picture_damaged", why) from error


def thumbnail(data: bytes, side: int = THUMBNAIL) -> bytes:
    """A JPEG file of at most `side` pixels, from a picture file; nothing but pixels is kept.

    Raises:
      BadImage: the picture cannot be decoded.
    """
    image = decode_image(data)
    height, width = image.shape[:2]
    scale = side / max(height, width)
    if scale < 1:
        size = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return encode_jpeg(image, _QUALITY)
