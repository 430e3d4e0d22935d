"""300-W: the 68-point annotation of AFW, HELEN, LFPW and iBUG."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from flip_jax.data.readers.reader import Reader, floats
from flip_jax.data.readers.samples import LandmarkSample

_POINTS = 68
_FOLDERS = {
    "train": {"afw": None, "helen/trainset": None, "lfpw/trainset": None},
    "test": {"helen/testset": "common", "lfpw/testset": "common", "ibug": "challenging"},
}


class Faces300W(Reader[LandmarkSample]):
    """300-W in the split that alignment is reported on.

    `train`: AFW and the training parts of HELEN and LFPW, 3,148 faces. `test`: the full set, 689
    faces, in the subsets `common` (test parts of HELEN and LFPW, 554) and `challenging` (iBUG,
    135). The 600 pictures of the competition's own test are not read.

    The .pts files count pixels from 1, as MATLAB does: 1 is taken off every coordinate. No boxes
    are read: `box` is the smallest around the landmarks.
    """

    NAME = "300w"
    SPLITS = ("train", "test")
    SAMPLE = LandmarkSample
    SOURCE = (
        "the folders afw, helen, ibug and lfpw (afw.zip, helen.zip, ibug.zip and lfpw.zip of "
        "300-W, Imperial College London), helen and lfpw with their folders trainset and testset."
    )

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._faces: list[tuple[Path, str | None]] = []  # .pts file, subset
        for name, subset in _FOLDERS[split].items():
            found = sorted(self._find(name).glob("*.pts"))
            if not found:
                raise self._missing(self.root / name / "*.pts")
            self._faces += [(path, subset) for path in found]

    def __len__(self) -> int:
        return len(self._faces)

    def _sample(self, index: int) -> LandmarkSample:
        path, subset = self._faces[index]
        landmarks = self._read_points(path)
        name = path.relative_to(self.root).with_suffix("").as_posix()
        return LandmarkSample(
            id=name,
            group_id=f"{self.NAME}:{name}",
            image=self._read(self._picture(path.with_suffix(""))),
            landmarks=landmarks,
            box=np.concatenate([landmarks.min(0), landmarks.max(0)]),
            visible=np.ones(_POINTS, bool),
            subsets=frozenset([subset] if subset else []),
        )

    def _read_points(self, path: Path) -> np.ndarray:
        head, brace, rest = self._read_text(path).partition("{")
        body, end, _ = rest.partition("}")
        words = body.split()
        if not brace or not end or head.split()[-1:] != [str(_POINTS)] or len(words) != 2 * _POINTS:
            raise ValueError(
                f"{path}: {len(words) / 2:g} points between braces, must be {_POINTS} after "
                f"'n_points: {_POINTS}'"
            )
        return floats(words, str(path)).reshape(_POINTS, 2) - 1
