"""Reading picture files, and the two hashes of a crop."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np
from PIL import Image

from flip_jax.curate.optout import ListedStage
from flip_jax.curate.stages import Sample, Tally, fingerprint
from flip_jax.curate.storage import RangeReader
from flip_jax.data.transforms import BadImage, decode_image

HASH_SIDE = 16  # a perceptual hash has HASH_SIDE**2 bits
_DCT_SIDE = 64

# Bit (row, column) of the frequencies belongs to band (row + column) % 16, so that every band has
# one bit of each row and column: low frequencies are much alike in aligned faces, and a band of
# nothing else would hold half of all pictures. Bits of a band are stored side by side.
_ROWS, _COLUMNS = np.indices((HASH_SIDE, HASH_SIDE))
_BAND_ORDER = np.argsort(((_ROWS + _COLUMNS) % HASH_SIDE).ravel(), kind="stable")


class ReadStage(ListedStage):
    """Reads the picture file of each sample that has a place, and refuses huge pictures.

    Drops: `unreadable file`, `truncated`, `empty`, `opted out`, `not a picture`,
    `too many pixels`.
    """

    name = "read"

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        kept = []
        with RangeReader() as files:
            for sample in batch:
                try:
                    data = self._read(sample, files)
                    self._check(data)
                except _Unusable as error:
                    tally.drop(self.name, sample, *error.args)
                else:
                    kept.append(replace(sample, image=data, place=None))
        return kept

    def _read(self, sample: Sample, files: RangeReader) -> bytes:
        if sample.place is None:
            return sample.image
        try:
            data = files.read(*sample.place)
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise _Unusable("unreadable file", str(error)) from error
        if -1 < len(data) < sample.place.size:
            raise _Unusable("truncated", f"{len(data)} of {sample.place.size} bytes")
        return data

    def _check(self, data: bytes) -> None:
        """From the header alone: no pixel is decoded."""
        if not data:
            raise _Unusable("empty", "")
        if self.opt_out.has_file(data):
            raise _Unusable("opted out", "picture file")
        try:
            with Image.open(io.BytesIO(data)) as image:
                width, height = image.size
        except Image.DecompressionBombError as error:
            raise _Unusable("too many pixels", str(error)) from error
        except Exception as error:  # Pillow's plugins raise many types for damaged files
            raise _Unusable("not a picture", str(error)) from error
        if width * height > self.cfg.max_pixels:
            raise _Unusable("too many pixels", f"{width} x {height}")

    def fingerprint(self) -> str:
        parts = (self.cfg.max_pixels, self.opt_out.fingerprint())
        return fingerprint(self.name, self.version, *parts)


class HashStage(ListedStage):
    """Fills `pixel_hash` and `perceptual_hash`; drops crops whose pixels are on the opt-out list.

    Drops: `undecodable`, `opted out`.
    """

    name = "hashes"

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        kept = []
        for sample in batch:
            try:
                image = decode_image(sample.image)
            except BadImage as error:
                tally.drop(self.name, sample, "undecodable", str(error))
                continue
            pixels = pixel_hash(image)
            if self.opt_out.has_hash(pixels):
                tally.drop(self.name, sample, "opted out", "pixels")
                continue
            kept.append(replace(sample, pixel_hash=pixels, perceptual_hash=perceptual_hash(image)))
        return kept

    def fingerprint(self) -> str:
        return fingerprint(self.name, self.version, self.opt_out.fingerprint())


def pixel_hash(image: np.ndarray) -> bytes:
    """The SHA-256 of the size and the pixels of uint8 [H, W, 3]; 32 bytes."""
    digest = hashlib.sha256(np.array(image.shape, "<u4").tobytes())
    digest.update(np.ascontiguousarray(image))
    return digest.digest()


def perceptual_hash(image: np.ndarray) -> bytes:
    """The signs of the 16 x 16 lowest frequencies of the picture; 256 bits that survive scaling,
    recompression and small changes of brightness.

    Grey, 64 x 64 by area, discrete cosine transform; a bit is 1 where the coefficient is above
    the median of all but the constant one.

    Args:
      image: uint8 [H, W, 3] RGB.

    Returns:
      32 bytes, the 16 bits of each band side by side.

    Source: the pHash of Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions", 2010, with 16 x 16 coefficients in place of 8 x 8, which are too few for faces.
    """
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_DCT_SIDE, _DCT_SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[:HASH_SIDE, :HASH_SIDE].ravel()
    bits = low > np.median(low[1:])
    return np.packbits(bits[_BAND_ORDER]).tobytes()


class _Unusable(Exception):
    """args: reason, detail."""
