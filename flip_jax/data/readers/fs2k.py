"""FS2K's pairs of photo and sketch, and FS2K-SDE's sketches stroke by stroke."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES, UNKNOWN
from flip_jax.data.readers.reader import Reader
from flip_jax.data.readers.samples import SketchPair

# In the annotation 0 is yes and 1 is no.
_YES_NO = {"gender": "Male", "earring": "Wearing_Earrings", "smile": "Smiling"}
# Brown, black, red, none visible, golden. Red is none of CelebA's colours; there is no grey.
_HAIR = {0: "Brown_Hair", 1: "Black_Hair", 2: None, 3: None, 4: "Blond_Hair"}
_NO_HAIR = 3
_CODES = {**dict.fromkeys(_YES_NO, 2), "hair_color": len(_HAIR), "style": 3}  # and how many
_FILES = (
    "the folders photo and sketch, anno_train.json and anno_test.json of FS2K (DengPingFan/FS2K)"
)


class _Fs2kPairs(Reader[SketchPair]):
    SPLITS = ("train", "test")
    SAMPLE = SketchPair

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        for folder in ("photo", "sketch"):
            self._find(folder)

    def _entries(self, split: str) -> list[dict[str, Any]]:
        path = self._table(f"anno_{split}.json")
        try:
            entries = json.loads(path.read_bytes())  # Python's parser takes the NaN in colours
        except ValueError as error:
            raise ValueError(f"{path} is not a JSON file: {error}") from error
        for entry in entries:
            name = entry.get("image_name", "")
            if not re.fullmatch(r"photo\d/image\d+", name):
                raise ValueError(f"{path}: image_name {name!r} must be like photo1/image0110")
            for key, count in _CODES.items():
                if entry.get(key) not in range(count):
                    raise ValueError(
                        f"{path}: {key} of {name} is {entry.get(key)!r}, must be 0..{count - 1}"
                    )
        return entries

    def _pair(self, entry: dict[str, Any], steps: Iterable[Path] = ()) -> SketchPair:
        name = entry["image_name"]
        sketch = name.replace("photo", "sketch").replace("image", "sketch")
        return SketchPair(
            id=name,
            group_id=f"fs2k:{name}",
            photo=self._read(self._picture(self.root / "photo" / name)),
            sketch=self._read(self._picture(self.root / "sketch" / sketch)),
            attributes=_labels(entry),
            style=entry["style"],
            steps=tuple(self._read(path) for path in steps),
        )


class Fs2k(_Fs2kPairs):
    """FS2K's 1,058 training and 1,046 test pairs, in three drawing styles.

    The photo `photo1/image0110` belongs to the sketch `sketch1/sketch0110`; both are .jpg or .png.
    Labels given are Male, Wearing_Earrings, Smiling and, where hair is visible, Black, Blond
    (golden) and Brown_Hair; all others are unknown. `id` is `photo1/image0110`.
    """

    NAME = "fs2k"
    SOURCE = f"{_FILES}."

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._rows = self._entries(split)

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> SketchPair:
        return self._pair(self._rows[index])


class Fs2kSde1(_Fs2kPairs):
    """FS2K-SDE, part 1: the sketches of FS2K's photo1 as they grow.

    A folder `dataset1/sketch/train/NAME` or `dataset1/sketch/test/NAME` holds the steps of one
    sketch, 70 pictures, ordered by the number in their names; NAME ends in the number of the
    photo. The split is that of FS2K-SDE, 70 % and 30 %, not that of FS2K.
    """

    NAME = "fs2k_sde1"
    SOURCE = f"dataset1 of FS2K-SDE (ddw2AIGROUP2CQUPT/FS2K-SDE), unpacked; {_FILES}."
    _PART: ClassVar[str] = "dataset1"
    _PHOTOS: ClassVar[str] = "photo1"

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        rows = {}
        for half in self.SPLITS:
            for entry in self._entries(half):
                folder, name = entry["image_name"].split("/")
                if folder == self._PHOTOS:
                    rows[_number(name)] = entry
        folder = self._find(f"{self._PART}/sketch/{split}")
        self._folders = sorted(path for path in folder.iterdir() if path.is_dir())
        if not self._folders:
            raise self._missing(folder / "*")
        self._rows = []
        for path in self._folders:
            if (number := _number(path.name)) not in rows:
                raise ValueError(f"{path}: FS2K has no picture {number} in {self._PHOTOS}")
            self._rows.append(rows[number])

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> SketchPair:
        folder = self._folders[index]
        steps = sorted(folder.iterdir(), key=lambda path: (_number(path.stem), path.name))
        if not steps:
            raise FileNotFoundError(f"{folder} is empty; unpack {self.NAME} again")
        return self._pair(self._rows[index], steps)


class Fs2kSde2(Fs2kSde1):
    """FS2K-SDE, part 2: the sketches of FS2K's photo3; otherwise as part 1."""

    NAME = "fs2k_sde2"
    SOURCE = f"dataset2 of FS2K-SDE (ddw2AIGROUP2CQUPT/FS2K-SDE), unpacked; {_FILES}."
    _PART = "dataset2"
    _PHOTOS = "photo3"


def _labels(entry: dict[str, Any]) -> np.ndarray:
    labels = np.full(len(ATTRIBUTES), UNKNOWN, np.int8)
    for key, attribute in _YES_NO.items():
        labels[ATTRIBUTE_INDEX[attribute]] = entry[key] == 0
    if entry["hair_color"] != _NO_HAIR:
        for colour in filter(None, _HAIR.values()):
            labels[ATTRIBUTE_INDEX[colour]] = _HAIR[entry["hair_color"]] == colour
    return labels


def _number(name: str) -> int:
    """The last number in a name; -1 without one."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[-1]) if numbers else -1
