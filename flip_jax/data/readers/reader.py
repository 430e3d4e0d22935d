"""What readers of published data sets share: a split as a sequence, read from disk as asked for."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
from PIL import Image

from flip_jax.data.captions import captions
from flip_jax.data.records import group_number
from flip_jax.data.transforms import BadImage

Sample = TypeVar("Sample")
_PICTURE_SUFFIXES = (".jpg", ".png", ".jpeg", ".JPG", ".PNG")


class Reader(Sequence[Sample]):
    """One split of a published data set, in the shape its publisher gives it.

    Tables are read at once; pictures, masks and point files when their sample is asked for. Can be
    shared between threads and pickled into other processes.

    Args:
      root: folder of the unpacked data set; `SOURCE` says what has to be in it.
      split: one of `SPLITS`.

    Attributes:
      NAME: of the data set: in commands, in TFDS (`flip_NAME`) and before group ids.
      SPLITS: the splits; no sample is in two.
      SAMPLE: what a sample is: `Record` or a class of `flip_jax.data.readers.samples`.
      SOURCE: what to download, and where below the root it belongs.
      DRAWS_CAPTIONS: whether captions are drawn from the labels; the class then takes how many per
        picture as `captions`.
      tables: the annotation files that were read.

    Raises:
      FileNotFoundError: a table or folder is missing; the message says what to download.
      ValueError: unknown split, or a table that is not as published; names file, line and value.
    """

    NAME: ClassVar[str]
    SPLITS: ClassVar[tuple[str, ...]]
    SAMPLE: ClassVar[type]
    SOURCE: ClassVar[str]
    DRAWS_CAPTIONS: ClassVar[bool] = False

    def __init__(self, root: str | os.PathLike, split: str):
        self.root, self.split = Path(root), split
        self.tables: list[Path] = []
        if split not in self.SPLITS:
            raise ValueError(f"{self.NAME} has no split {split!r}; it has {', '.join(self.SPLITS)}")

    def __getitem__(self, index: int) -> Sample:
        """Reads sample `index`, 0 <= index < len(self).

        Raises:
          IndexError: out of range.
          OSError: a file of the sample is missing or cannot be read; names it.
          ValueError: a mask or point file is damaged; names it. Pictures are not decoded here.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)} in split {self.split!r}")
        return self._sample(int(index))

    @abstractmethod
    def _sample(self, index: int) -> Sample: ...

    def _find(self, *names: str) -> Path:
        """Returns the first of these files or folders below the root that is there."""
        for name in names:
            if (path := self.root / name).exists():
                return path
        raise self._missing(self.root / names[0])

    def _table(self, *names: str) -> Path:
        self.tables.append(self._find(*names))
        return self.tables[-1]

    def _picture(self, stem: Path) -> Path:
        """Returns the picture of this name, whatever its suffix; with .jpg if there is none."""
        for suffix in _PICTURE_SUFFIXES:
            if (path := stem.with_name(stem.name + suffix)).exists():
                return path
        return stem.with_name(stem.name + _PICTURE_SUFFIXES[0])

    def _read(self, path: Path) -> bytes:
        # Names come from downloaded tables.
        if not path.is_relative_to(self.root) or ".." in path.relative_to(self.root).parts:
            raise ValueError(f"{path} is not below {self.root}; download {self.NAME} again")
        try:
            return path.read_bytes()
        except FileNotFoundError:
            raise FileNotFoundError(f"{path} is missing; unpack {self.NAME} again") from None

    def _read_text(self, path: Path) -> str:
        try:
            return self._read(path).decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file: {error}") from error

    def _missing(self, path: Path) -> FileNotFoundError:
        return FileNotFoundError(
            f"{path} is missing. {self.NAME} is read from {self.SOURCE} Nothing is downloaded: "
            f"get it from its publisher and put it below {self.root}."
        )


def grammar_captions(attributes: np.ndarray, sample_id: str, count: int) -> list[str]:
    """Draws captions from labels, the same for a sample whenever it is read.

    Args:
      attributes: int8 [40]: 1 present, 0 absent, -1 unknown.
      sample_id: `build` draws the same captions for a picture of this file name.
      count: 0 or larger.
    """
    return captions(attributes, group_number(f"0:{sample_id}"), count)


def table_lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yields (number of the line from 1, its words) for every line that is not blank.

    Raises:
      ValueError: not a text file.
    """
    with open(path, encoding="utf-8") as file:
        try:
            for number, line in enumerate(file, 1):
                if words := line.split():
                    yield number, words
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text file: {error}") from error


def floats(words: Sequence[str], where: str) -> np.ndarray:
    """Converts words to float32.

    Raises:
      ValueError: one is no finite number; names `where`.
    """
    try:
        values = np.array([float(word) for word in words], np.float32)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not np.isfinite(values).all():
        raise ValueError(f"{where}: contains NaN or infinity")
    return values


def decode_mask(data: bytes, path: Path) -> np.ndarray:
    """Decodes a mask to uint8 [H, W], the values as stored (palette numbers, not colours).

    Raises:
      BadImage: no picture, damaged, or in colour; names `path`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.mode not in ("L", "P", "1"):
                raise BadImage(f"{path}: pixels of mode {image.mode}; a mask has one channel")
            return np.asarray(image, np.uint8)
    except BadImage:
        raise
    except Exception as error:  # Pillow raises many types for damaged files
        raise BadImage(f"{path}: cannot decode the mask: {error}") from error
