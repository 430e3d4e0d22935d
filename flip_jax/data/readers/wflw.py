"""WFLW: 98 landmarks, with what makes each face hard."""

from __future__ import annotations

import os

import numpy as np

from flip_jax.data.readers.reader import Reader, floats, table_lines
from flip_jax.data.readers.samples import LandmarkSample

_POINTS = 98
# Attributes in the order of the columns; 1 = the face belongs to the subset.
_SUBSETS = ("pose", "expression", "illumination", "makeup", "occlusion", "blur")
_COLUMNS = 2 * _POINTS + 4 + len(_SUBSETS) + 1


class Wflw(Reader[LandmarkSample]):
    """WFLW's 7,500 training and 2,500 test faces.

    A line of its lists holds 98 points, the face's rectangle, six attributes and the picture. The
    attributes are the subsets `pose`, `expression`, `illumination`, `makeup`, `occlusion` and
    `blur`; a face can be in several or none. A picture can have several faces: ids are
    `split/picture#n`, n counting the faces of the picture in the list from 0.
    """

    NAME = "wflw"
    SPLITS = ("train", "test")
    SAMPLE = LandmarkSample
    SOURCE = (
        "the folders WFLW_images (WFLW_images.tar.gz) and WFLW_annotations "
        "(WFLW_annotations.tar.gz) of WFLW (Look at Boundary, wywu)."
    )

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._images = self._find("WFLW_images")
        path = self._table(
            f"WFLW_annotations/list_98pt_rect_attr_train_test/list_98pt_rect_attr_{split}.txt"
        )
        self._ids, self._files, self._subsets, rows = [], [], [], []
        faces: dict[str, int] = {}
        for line, words in table_lines(path):
            where = f"{path} line {line}"
            if len(words) != _COLUMNS:
                raise ValueError(f"{where}: {len(words)} words, must be {_COLUMNS}")
            *numbers, file = words
            flags = numbers[-len(_SUBSETS) :]
            if set(flags) - {"0", "1"}:
                raise ValueError(f"{where}: attributes {' '.join(flags)} must be 0 or 1")
            number = faces[file] = faces.get(file, -1) + 1
            self._ids.append(f"{split}/{file}#{number}")
            self._files.append(file)
            self._subsets.append(
                frozenset(name for name, flag in zip(_SUBSETS, flags, strict=True) if flag == "1")
            )
            rows.append(floats(numbers[: 2 * _POINTS + 4], where))
        self._numbers = np.array(rows, np.float32).reshape(len(rows), 2 * _POINTS + 4)

    def __len__(self) -> int:
        return len(self._ids)

    def _sample(self, index: int) -> LandmarkSample:
        points, box = np.split(self._numbers[index], [2 * _POINTS])
        return LandmarkSample(
            id=self._ids[index],
            group_id=f"wflw:{self._files[index]}",
            image=self._read(self._images / self._files[index]),
            landmarks=points.reshape(_POINTS, 2),
            box=box,
            visible=np.ones(_POINTS, bool),
            subsets=self._subsets[index],
        )
