"""LFW, and LFWA's 40 attributes on it."""

from __future__ import annotations

import os
from pathlib import Path, PureWindowsPath

import numpy as np

from flip_jax.data.attributes import ATTRIBUTES, UNKNOWN
from flip_jax.data.readers.mat_files import read_mat
from flip_jax.data.readers.reader import Reader, grammar_captions, table_lines
from flip_jax.data.records import Record

_FOLDERS = ("lfw", "lfw_funneled", "lfw-deepfunneled", "lfw_deepfunneled")
_PICTURES = (
    "the folder lfw, lfw_funneled or lfw-deepfunneled of Labeled Faces in the Wild (University of "
    "Massachusetts, Amherst)"
)


class Lfw(Reader[Record]):
    """LFW's pictures without labels or captions, in the split of its view 1.

    `train`: peopleDevTrain.txt, 9,525 pictures of 4,038 people; `test`: peopleDevTest.txt, 3,708
    of 1,711 others.
    """

    NAME = "lfw"
    SPLITS = ("train", "test")
    SAMPLE = Record
    SOURCE = f"{_PICTURES}, peopleDevTrain.txt and peopleDevTest.txt."

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._images = self._find(*_FOLDERS)
        path = self._table(f"peopleDev{split.capitalize()}.txt")
        (_, head), *people = list(table_lines(path)) or [(1, ["nothing"])]
        if head != [str(len(people))]:
            raise ValueError(
                f"{path} has {len(people)} people and says it has {' '.join(head)}; download it "
                "again"
            )
        self._files = []
        for line, words in people:
            if len(words) != 2 or not words[1].isdecimal():
                raise ValueError(f"{path} line {line}: must be name and number of pictures")
            self._files += [
                f"{words[0]}/{words[0]}_{n:04d}.jpg" for n in range(1, int(words[1]) + 1)
            ]

    def __len__(self) -> int:
        return len(self._files)

    def _sample(self, index: int) -> Record:
        file = self._files[index]
        return Record(
            id=file,
            group_id=_group(file),
            image=self._read(self._images / file),
            captions=[],
            attributes=np.full(len(ATTRIBUTES), UNKNOWN, np.int8),
        )


class Lfwa(Reader[Record]):
    """LFW with the 40 attributes of LFWA+, in LFWA+'s split by people: 6,263 and 6,880 pictures.

    The split is taken from `indices_train_test.mat` and must have no picture and no person on both
    sides. FLIP's released loader returns the test set for training and for testing, which makes
    its accuracies on all of LFWA an accuracy on the training set: do not compare with them.

    Args:
      root: see `SOURCE`.
      split: `train` or `test`.
      captions: to draw for each picture from its labels; 0 = none.

    Raises:
      ImportError: h5py is not installed; both tables are MATLAB 7.3 files.
    """

    NAME = "lfwa"
    SPLITS = ("train", "test")
    SAMPLE = Record
    DRAWS_CAPTIONS = True
    SOURCE = (
        f"{_PICTURES}; lfw_att_40.mat and indices_train_test.mat of LFWA+ (MMLab, The Chinese "
        "University of Hong Kong)."
    )

    def __init__(self, root: str | os.PathLike, split: str, captions: int = 5):
        super().__init__(root, split)
        self.captions = captions
        self._images = self._find(*_FOLDERS)
        path = self._table("lfw_att_40.mat")
        table = read_mat(path, ("name", "AttrName", "label"))
        # Windows paths: Aaron_Eckhart\Aaron_Eckhart_0001.jpg
        files = [PureWindowsPath(name).as_posix() for name in table["name"]]
        labels = _in_order(table["label"], table["AttrName"], len(files), path)
        rows = self._rows(files)[split]
        self._files = [files[row] for row in rows]
        self._attributes = labels[rows]

    def __len__(self) -> int:
        return len(self._files)

    def _sample(self, index: int) -> Record:
        file, attributes = self._files[index], self._attributes[index]
        return Record(
            id=file,
            group_id=_group(file),
            image=self._read(self._images / file),
            captions=grammar_captions(attributes, file, self.captions),
            attributes=attributes,
        )

    def _rows(self, files: list[str]) -> dict[str, np.ndarray]:
        path = self._table("indices_train_test.mat")
        names = {split: f"indices_img_{split}" for split in self.SPLITS}
        table = read_mat(path, tuple(names.values()))
        rows = {split: table[name].ravel().astype(int) - 1 for split, name in names.items()}
        for split, numbers in rows.items():
            if strange := set(numbers.tolist()) - set(range(len(files))):
                raise ValueError(
                    f"{path}: {names[split]} holds {min(strange) + 1}, must be 1..{len(files)}"
                )
        people = [{_group(files[row]) for row in numbers} for numbers in rows.values()]
        if shared := people[0] & people[1]:
            raise ValueError(
                f"{path}: {len(shared)} people such as {min(shared)} are in train and test; a "
                "figure measured on such a split says nothing. Download the file again"
            )
        return rows


def _group(file: str) -> str:
    return f"lfw:{file.partition('/')[0]}"


def _in_order(values: np.ndarray, names: list[str], rows: int, path: Path) -> np.ndarray:
    """Returns the labels, int8 [rows, 40], in the order of `ATTRIBUTES`."""
    found = [name.strip().replace(" ", "_").lower() for name in names]
    wanted = [name.lower() for name in ATTRIBUTES]
    if sorted(found) != sorted(wanted) or values.shape != (rows, len(wanted)):
        raise ValueError(
            f"{path}: labels {list(values.shape)} of {', '.join(names)}; must be {rows} times "
            f"{', '.join(ATTRIBUTES)}"
        )
    if not np.isin(values, (0, 1)).all():
        raise ValueError(f"{path}: labels must be 0 or 1")
    return values[:, [found.index(name) for name in wanted]].astype(np.int8)
