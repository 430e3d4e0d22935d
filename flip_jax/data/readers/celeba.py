"""CelebA, and the caption data sets on its pictures: CelebA-Dialog and Face2Text."""

from __future__ import annotations

import os
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np

from flip_jax.data.readers.celeba_tables import (
    pick,
    read_attributes,
    read_identities,
    read_numbers,
    read_partition,
)
from flip_jax.data.readers.reader import Reader, grammar_captions
from flip_jax.data.records import Record

_POINTS = ("lefteye", "righteye", "nose", "leftmouth", "rightmouth")
_POINT_COLUMNS = tuple(f"{point}_{axis}" for point in _POINTS for axis in "xy")
_BOX_COLUMNS = ("x_1", "y_1", "width", "height")
_TABLES = (
    "list_attr_celeba.txt, list_eval_partition.txt and identity_CelebA.txt of CelebA (MMLab, The "
    "Chinese University of Hong Kong), and, if wanted, {more}; beside the pictures or in the "
    "folders Anno, Eval and Img of the distribution."
)


class CelebA(Reader[Record]):
    """CelebA's aligned pictures, 178 x 218 pixels.

    Splits are CelebA's partition 0, 1, 2: 162,770, 19,867 and 19,962 pictures of 8,192, 985 and
    1,000 people, no person in two of them.

    Records hold: `id` the file name, `group_id` `celeba:` and the identity, captions drawn from
    the labels by the grammar, all 40 labels (the file's -1 is absent), and the five landmarks left
    eye, right eye, nose, left and right corner of the mouth, left as seen in the picture. `box` is
    None: `list_bbox_celeba.txt` describes the pictures before alignment.

    Args:
      root: see `SOURCE`.
      split: `train`, `val` or `test`.
      captions: to draw for each picture; 0 = none.
    """

    NAME = "celeba"
    SPLITS = ("train", "val", "test")
    SAMPLE = Record
    DRAWS_CAPTIONS = True
    SOURCE = "the folder img_align_celeba (img_align_celeba.zip, .jpg); " + _TABLES.format(
        more="list_landmarks_align_celeba.txt"
    )
    _IMAGES: ClassVar[str] = "img_align_celeba"
    _LANDMARKS: ClassVar[str] = "list_landmarks_align_celeba.txt"
    _BOXES: ClassVar[str | None] = None

    def __init__(self, root: str | os.PathLike, split: str, captions: int = 5):
        super().__init__(root, split)
        self.captions = captions
        self._images = self._find(self._IMAGES, f"Img/{self._IMAGES}")
        self._texts = self._read_texts()
        self._names = self._read_names()
        path, wanted = self._celeba_table("identity_CelebA.txt"), set(self._names)
        self._groups = pick(read_identities(path), self._names, path)
        path = self._celeba_table("list_attr_celeba.txt")
        self._attributes = pick(read_attributes(path, wanted), self._names, path)
        self._landmarks = self._optional(self._LANDMARKS, _POINT_COLUMNS)
        self._boxes = self._optional(self._BOXES, _BOX_COLUMNS)

    def __len__(self) -> int:
        return len(self._names)

    def _sample(self, index: int) -> Record:
        name, attributes = self._names[index], self._attributes[index]
        if self._texts is None:
            captions = grammar_captions(attributes, name, self.captions)
        else:
            captions = self._texts[name]
        landmarks, box = self._landmarks[index], self._boxes[index]
        if landmarks is not None:
            landmarks = landmarks.reshape(5, 2).astype(np.float32)
        if box is not None:
            x, y, width, height = box.astype(np.float32)
            # A few boxes are empty: nobody marked the face.
            box = np.array([x, y, x + width, y + height]) if width and height else None
        return Record(
            id=name,
            group_id=self._groups[index],
            image=self._read(self._images / name),
            captions=captions,
            attributes=attributes,
            box=box,
            landmarks=landmarks,
        )

    def _read_texts(self) -> dict[str, list[str]] | None:
        """Captions by picture; None = the data set has none."""
        return None

    def _read_names(self) -> list[str]:
        partition = read_partition(self._celeba_table("list_eval_partition.txt"))
        return [
            name
            for name, split in partition.items()
            if split == self.split and (self._texts is None or name in self._texts)
        ]

    def _celeba_table(self, name: str) -> Path:
        return self._table(name, f"Anno/{name}", f"Eval/{name}")

    def _optional(self, name: str | None, columns: tuple[str, ...]) -> list[np.ndarray | None]:
        if name is None or not any((self.root / place / name).exists() for place in ("", "Anno")):
            return [None] * len(self)
        path = self._celeba_table(name)
        return pick(read_numbers(path, columns, set(self._names)), self._names, path)


class CelebAInTheWild(CelebA):
    """CelebA's pictures before alignment, in many sizes; otherwise as `CelebA`.

    Landmarks are those of `list_landmarks_celeba.txt`, boxes those of `list_bbox_celeba.txt` (x, y,
    width and height there; corners here). A few boxes are empty there and None here.
    """

    NAME = "celeba_in_the_wild"
    SOURCE = "the folder img_celeba (img_celeba.7z, In-The-Wild Images); " + _TABLES.format(
        more="list_landmarks_celeba.txt and list_bbox_celeba.txt"
    )
    _IMAGES = "img_celeba"
    _LANDMARKS = "list_landmarks_celeba.txt"
    _BOXES = "list_bbox_celeba.txt"


class _DialogText(msgspec.Struct):
    """An entry of CelebA-Dialog's captions; its captions of single attributes are not read."""

    overall_caption: str | None = None


def read_dialog(path: Path) -> dict[str, list[str]]:
    """Reads `captions.json` or `captions_hq.json` of CelebA-Dialog.

    Returns:
      The overall caption by picture; pictures without one are left out.
    """
    try:
        entries = msgspec.json.decode(path.read_bytes(), type=dict[str, _DialogText])
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is not CelebA-Dialog's list of captions: {error}") from error
    texts = {name: (entry.overall_caption or "").strip() for name, entry in entries.items()}
    return {name: [text] for name, text in texts.items() if text}


class CelebADialog(CelebA):
    """CelebA with one caption of CelebA-Dialog per picture, and CelebA's partition."""

    NAME = "celeba_dialog"
    DRAWS_CAPTIONS = False
    SOURCE = "captions.json of CelebA-Dialog (MMLab@NTU), at the top or in text; " + CelebA.SOURCE

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)

    def _read_texts(self) -> dict[str, list[str]]:
        return read_dialog(self._table("captions.json", "text/captions.json"))


class _Description(msgspec.Struct):
    filename: str
    description: str | list[str]


class Face2Text(CelebA):
    """CelebA pictures described by people, 1 to 5 descriptions each.

    Splits are those of Face2Text 2.1 (8,489, 1,869 and 1,869 pictures), which divide pictures, not
    people: a person may be in two of them. `show` counts these groups.
    """

    NAME = "face2text"
    DRAWS_CAPTIONS = False
    SOURCE = (
        "clean_train_2.1.json, clean_dev_2.1.json and clean_test_2.1.json of Face2Text 2.1 (RIVAL, "
        "University of Malta); " + CelebA.SOURCE
    )
    _FILES: ClassVar[dict[str, str]] = {"train": "train", "val": "dev", "test": "test"}

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)

    def _read_texts(self) -> dict[str, list[str]]:
        path = self._table(f"clean_{self._FILES[self.split]}_2.1.json")
        try:
            entries = msgspec.json.decode(path.read_bytes(), type=list[_Description])
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path} is not a list of Face2Text's entries: {error}") from error
        texts: dict[str, list[str]] = {}
        for entry in entries:
            found = entry.description
            for text in [found] if isinstance(found, str) else found:
                if text := text.strip():
                    texts.setdefault(entry.filename, []).append(text)
        return texts

    def _read_names(self) -> list[str]:
        return list(self._texts)
