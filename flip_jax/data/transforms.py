"""Image decoding, resizing and augmentation on uint8 RGB arrays; numpy and native code, no jax.

Images stay uint8 [H, W, 3] to the device: float conversion on the host costs three times the
time and four times the bytes.
"""

from __future__ import annotations

import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from flip_jax.data.jpeg import BadImage, check_pixels, decode_jpeg, is_jpeg, is_plain_jpeg

# Loader threads supply the parallelism; OpenCV's own pool on top of them oversubscribes the cores.
cv2.setNumThreads(0)

AUGMENT_OPS = (
    "Identity",
    "Brightness",
    "Sharpness",
    "Equalize",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
)
AUGMENT_MAX_LEVEL = 10
_FILL = 128  # of each channel
# Up to here plain cubic sampling is nearer to antialiased bicubic than averages are: both 46 dB.
_CUBIC_SHRINKS = 1.2
# All that reach the decoders: some plugins of Pillow's run other programs (EPS: Ghostscript).
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")


def decode_image(data: bytes, least: int | None = None, *, upright: bool = True) -> np.ndarray:
    """Decodes a picture as it is meant to be seen.

    Greyscale, palette and CMYK become RGB, the EXIF orientation is applied, transparency is
    dropped. JPEG takes the fast path, where every defect that libjpeg notices counts as damage;
    PNG, WebP, GIF, BMP, TIFF and PPM are accepted too.

    Args:
      data: the whole file.
      least: see `decode_jpeg`.
      upright: False leaves the EXIF orientation alone, for what was measured in the file's pixels.

    Returns:
      uint8 [H, W, 3] RGB, C-contiguous.

    Raises:
      BadImage: empty, unknown format, truncated or corrupt data, more than 8 bits per channel
        where Pillow keeps them, or more than `MAX_PIXELS` pixels.
    """
    if is_jpeg(data) and (image := decode_jpeg(data, least, upright)) is not None:
        return image
    with _open(data) as image:
        try:
            return rgb_array(image, upright)
        except Exception as error:  # Pillow's plugins raise many types for damaged files.
            raise BadImage(f"cannot decode the picture: {error}") from error


def rgb_array(image: Image.Image, upright: bool = True) -> np.ndarray:
    """Returns an opened picture as it is meant to be seen, uint8 [H, W, 3] RGB.

    Args:
      upright: see `decode_image`.

    Raises:
      BadImage: integer or float pixels, which Pillow would cut off at 255 instead of scaling them.
    """
    if image.mode.startswith(("I", "F")):
        raise BadImage(
            f"pixels of mode {image.mode}; convert the picture to 8 bits per channel first"
        )
    return np.array((ImageOps.exif_transpose(image) if upright else image).convert("RGB"))


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """Encodes uint8 [H, W, 3] RGB as baseline JPEG without chroma subsampling.

    Args:
      quality: 1 to 100.
    """
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(image), quality=quality, colorspace="RGB", colorsubsampling="444"
    )


def prepare_image(
    data: bytes, max_side: int | None, quality: int, *, upright: bool = True
) -> tuple[bytes, bool]:
    """Makes the JPEG that a record stores.

    A JPEG that decodes, is baseline RGB, upright and not too large stays byte for byte; any other
    picture is encoded again.

    Args:
      data: a picture file.
      max_side: pixels; a larger picture is shrunk, its aspect ratio kept. None = never.
      quality: of a JPEG encoded again, 1 to 100.
      upright: see `decode_image`.

    Returns:
      The JPEG file, and whether it was encoded again.

    Raises:
      BadImage: the picture cannot be decoded.
    """
    image = decode_image(data, upright=upright)
    side = max(image.shape[:2])
    if max_side is not None and side > max_side:
        height, width = (max(round(n * max_side / side), 1) for n in image.shape[:2])
        small = Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS)
        return encode_jpeg(np.asarray(small), quality), True
    if is_plain_jpeg(data):
        return data, False
    try:
        return encode_jpeg(image, quality), True
    except ValueError as error:  # a side of more than 65,500 pixels
        height, width = image.shape[:2]
        raise BadImage(f"{width} x {height} pixels cannot be a JPEG: {error}") from error


def contain(
    picture: Image.Image, side: int, way: Image.Resampling = Image.Resampling.BICUBIC
) -> Image.Image:
    """The largest copy within a square of `side` pixels, at least one pixel in each direction.

    `ImageOps.contain` refuses pictures of extreme shape, which it makes 0 pixels high or wide.
    """
    width, height = (max(round(side * n / max(picture.size)), 1) for n in picture.size)
    return picture.resize((width, height), way)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Squashes a picture to `size` x `size`: bicubic, the aspect ratio is not kept.

    Pillow's antialiased bicubic is the definition. It does the work when an axis shrinks: plain
    cubic sampling of 512 px at 224 px is down to 47 dB (faces) or 14 dB (noise) against it. When
    no axis shrinks OpenCV's cubic is 13 times as fast at 45 dB or more; the rest is its sharper
    kernel (a = -0.75 instead of -0.5).

    Args:
      image: uint8 [H, W, 3].
      size: pixels.

    Returns:
      uint8 [size, size, 3]; may be `image` itself.

    Source: the reference's `transforms.Resize((224, 224), interpolation=BICUBIC)` on PIL images.
    """
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    if height <= size and width <= size:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def load_image(data: bytes, size: int) -> np.ndarray:
    """Decodes a picture and squashes it to `size` x `size`, for training: no slower than need be.

    Differs from `resize_image(decode_image(data), size)`, 44 dB or more on faces, where an axis
    shrinks: libjpeg leaves out what would be thrown away (`decode_jpeg`), and OpenCV does the
    rest, by cubic sampling where little is left to shrink and by averages of areas elsewhere.

    Args:
      data: the whole file.
      size: pixels.

    Returns:
      uint8 [size, size, 3].

    Raises:
      BadImage: see `decode_image`.
    """
    image = decode_image(data, size)
    shrinks = image.shape[0] / size, image.shape[1] / size
    if min(shrinks) < 1 < max(shrinks):
        return resize_image(image, size)
    kind = cv2.INTER_CUBIC if max(shrinks) <= _CUBIC_SHRINKS else cv2.INTER_AREA
    return cv2.resize(image, (size, size), interpolation=kind)


def random_flip(
    image: np.ndarray, rng: np.random.Generator, moves: list[np.ndarray] | None = None
) -> np.ndarray:
    """Mirrors uint8 [H, W, 3] left and right with probability 1/2; draws one number.

    `moves`: see `rand_augment`.
    """
    if rng.random() >= 0.5:
        return image
    if moves is not None:
        moves.append(np.array([[-1, 0, image.shape[1] - 1], [0, 1, 0]], np.float32))
    return cv2.flip(image, 1)


def rand_augment(
    image: np.ndarray,
    rng: np.random.Generator,
    ops: int = 2,
    level: int = 5,
    moves: list[np.ndarray] | None = None,
) -> np.ndarray:
    """The reference's RandomAugment: `ops` names with replacement, each applied with p = 1/2.

    The magnitude is fixed by `level`, the sign is random. At level 5 Brightness and Sharpness
    have factor 1.0 and do nothing, with Identity three of nine names are no-ops; that is how the
    reference was trained.

    Args:
      image: uint8 [H, W, 3].
      rng: source of all randomness.
      ops: number of draws; 0 = off.
      level: 0 to 10.
      moves: where pixels went, [2, 3] matrices, is added here, for `move_labels`.

    Returns:
      uint8 [H, W, 3].

    Raises:
      ValueError: `level` or `ops` out of range.

    Source: ddw2AIGROUP2CQUPT/FaceCaption-15M:data/randaugment.py, RandomAugment(2, 5). Departure:
    a sharpened value outside 0..255 is clipped (there it wraps around; unreachable at level 5).
    """
    if ops < 0 or not 0 <= level <= AUGMENT_MAX_LEVEL:
        raise ValueError(
            f"rand_augment: ops={ops}, level={level}; allowed: ops >= 0 and level from 0 to "
            f"{AUGMENT_MAX_LEVEL}"
        )
    for name in rng.integers(len(AUGMENT_OPS), size=ops):
        if rng.random() <= 0.5:
            image = _augment(image, AUGMENT_OPS[name], level / AUGMENT_MAX_LEVEL, rng, moves)
    return image


def move_labels(labels: np.ndarray, moves: list[np.ndarray]) -> np.ndarray:
    """Class numbers uint8 [H, W] where the pixels of their picture went; 0 comes in from outside.

    Args:
      moves: of `random_flip` and `rand_augment`, in order.
    """
    for matrix in moves:
        labels = cv2.warpAffine(labels, matrix, labels.shape[::-1], flags=cv2.INTER_NEAREST)
    return labels


def _augment(
    image: np.ndarray,
    name: str,
    strength: float,
    rng: np.random.Generator,
    moves: list[np.ndarray] | None,
) -> np.ndarray:
    """Applies one named operation; `strength` is level / 10."""
    if name == "Identity":
        return image
    if name == "Equalize":
        return equalize(image)
    if name == "Brightness":
        return brightness(image, strength * 1.8 + 0.1)
    if name == "Sharpness":
        return sharpness(image, strength * 1.8 + 0.1)
    sign = -1.0 if rng.random() > 0.5 else 1.0
    height, width = image.shape[:2]
    if name == "Rotate":
        # Here alone the reference negates below one half.
        matrix = cv2.getRotationMatrix2D((width / 2, height / 2), -sign * strength * 30, 1)
    else:
        matrix = np.array([[1, 0, 0], [0, 1, 0]], np.float32)
        shear, offset = sign * strength * 0.3, sign * strength * 10
        cell, value = {
            "ShearX": ((0, 1), shear),
            "ShearY": ((1, 0), shear),
            "TranslateX": ((0, 2), -offset),
            "TranslateY": ((1, 2), -offset),
        }[name]
        matrix[cell] = value
    if moves is not None:
        moves.append(matrix)
    if name.startswith("Translate"):
        return _translate(image, round(float(matrix[0, 2])), round(float(matrix[1, 2])))
    return cv2.warpAffine(image, matrix, (width, height), borderValue=(_FILL,) * 3)


def _translate(image: np.ndarray, right: int, down: int) -> np.ndarray:
    """What `cv2.warpAffine` makes of whole pixels, in a tenth of the time."""
    height, width = image.shape[:2]
    top, left = max(down, 0), max(right, 0)
    part = image[max(-down, 0) : max(height - top, 0), max(-right, 0) : max(width - left, 0)]
    out = np.full_like(image, _FILL)
    out[top : top + part.shape[0], left : left + part.shape[1]] = part
    return out


def equalize(image: np.ndarray) -> np.ndarray:
    """Equalizes the histogram of each channel; uint8 [H, W, 3], same as PIL `ImageOps.equalize`."""
    table = np.empty((256, 1, 3), np.uint8)
    for channel in range(3):
        counts = (
            cv2.calcHist([image], [channel], None, [256], [0, 256]).reshape(-1).astype(np.int64)
        )
        used = counts[counts > 0]
        step = int(used[:-1].sum()) // 255
        if step == 0:
            table[:, 0, channel] = np.arange(256)
        else:
            below = np.cumsum(counts) - counts
            table[:, 0, channel] = np.minimum((below + step // 2) // step, 255)
    return cv2.LUT(image, table)


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Multiplies by `factor`, cut off (not rounded) to uint8 as PIL and the reference do."""
    if factor == 1.0:
        return image
    table = np.clip(np.arange(256, dtype=np.float32) * np.float32(factor), 0, 255)
    return cv2.LUT(image, table.astype(np.uint8))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with a smoothed copy: 0 = smooth, 1 = unchanged, above 1 = sharper.

    The outermost pixels stay as they are, as in PIL `ImageEnhance.Sharpness`.
    """
    if factor == 1.0 or min(image.shape[:2]) < 3:
        return image
    kernel = np.ones((3, 3), np.float32)
    kernel[1, 1] = 5
    smooth = cv2.filter2D(image, -1, kernel / 13)[1:-1, 1:-1].astype(np.float32)
    blend = smooth + np.float32(factor) * (image[1:-1, 1:-1] - smooth)
    out = image.copy()
    out[1:-1, 1:-1] = np.clip(blend, 0, 255).astype(np.uint8)
    return out


def _open(data: bytes) -> Image.Image:
    if not data:
        raise BadImage("the picture has zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Exception as error:  # Pillow's plugins raise many types for damaged files.
        raise BadImage(f"not a picture of {', '.join(_FORMATS)}: {error}") from error
    check_pixels(image.height, image.width)
    return image
