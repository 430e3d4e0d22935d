"""LaPa: face parsing in the wild, with 106 landmarks."""

from __future__ import annotations

import os

import numpy as np

from flip_jax.data.readers.reader import Reader, decode_mask, floats
from flip_jax.data.readers.samples import ParsingSample

_POINTS = 106


class Lapa(Reader[ParsingSample]):
    """LaPa's pictures with masks of 11 classes and 106 landmarks.

    Splits are its own. Nobody says who is in the pictures: each is a group of its own. Left and
    right are as the data set names them.
    """

    NAME = "lapa"
    SPLITS = ("train", "val", "test")
    SAMPLE = ParsingSample
    SOURCE = "the folders train, val and test of LaPa.tar.gz (JDAI-CV/lapa-dataset)."
    CLASSES = (
        *("background", "skin", "left_eyebrow", "right_eyebrow", "left_eye", "right_eye", "nose"),
        *("upper_lip", "inner_mouth", "lower_lip", "hair"),
    )

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._folder = self._find(f"{split}/images").parent
        for part in ("labels", "landmarks"):
            self._find(f"{split}/{part}")
        self._stems = sorted(path.stem for path in (self._folder / "images").glob("*.jpg"))
        if not self._stems:
            raise self._missing(self._folder / "images" / "*.jpg")

    def __len__(self) -> int:
        return len(self._stems)

    def _sample(self, index: int) -> ParsingSample:
        stem = self._stems[index]
        path = self._folder / "labels" / f"{stem}.png"
        mask = decode_mask(self._read(path), path)
        if mask.max() >= len(self.CLASSES):
            raise ValueError(f"{path}: class {mask.max()}, must be below {len(self.CLASSES)}")
        return ParsingSample(
            id=f"{self.split}/{stem}",
            group_id=f"lapa:{self.split}/{stem}",
            image=self._read(self._folder / "images" / f"{stem}.jpg"),
            mask=mask,
            landmarks=self._landmarks(stem),
        )

    def _landmarks(self, stem: str) -> np.ndarray:
        path = self._folder / "landmarks" / f"{stem}.txt"
        count, *values = floats(self._read_text(path).split() or ["0"], str(path))
        if count != _POINTS or len(values) != 2 * _POINTS:
            raise ValueError(
                f"{path}: announces {count:.0f} points and has {len(values) / 2:g}, must be "
                f"{_POINTS}"
            )
        return np.array(values, np.float32).reshape(_POINTS, 2)
