"""AFLW-19: the 19-point annotation of AFLW."""

from __future__ import annotations

import os

import numpy as np

from flip_jax.data.readers.mat_files import read_mat
from flip_jax.data.readers.reader import Reader
from flip_jax.data.readers.samples import LandmarkSample

_POINTS = 19
_TRAIN = 20_000


class Aflw19(Reader[LandmarkSample]):
    """AFLW-19's 20,000 training and 4,386 test faces, in the order of its permutation `ra`.

    Of `AFLWinfo_release.mat`: `data` (x of all points, then y), `bbox` (left, right, top, bottom),
    `mask_new` (1 = visible), `nameList` and `ra` (rows from 1; the first 20,000 are the training
    set). Hidden points have coordinates too. Test faces all of whose points are visible are the
    subset `frontal`. Coordinates are as published. Ids are `picture#row`.

    Source: farl/datasets/aflw.py of FacePerceiver/FaRL.
    """

    NAME = "aflw19"
    SPLITS = ("train", "test")
    SAMPLE = LandmarkSample
    SOURCE = (
        "AFLWinfo_release.mat (compositional learning, MMLab, The Chinese University of Hong Kong) "
        "and the folder data/flickr with 0, 2 and 3 (aflw-images-{0,2,3}.tar.gz of AFLW, Graz "
        "University of Technology)."
    )

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._images = self._find("data/flickr", "flickr")
        path = self._table("AFLWinfo_release.mat")
        table = read_mat(path, ("bbox", "data", "mask_new", "nameList", "ra"))
        self._files = table["nameList"]
        self._boxes = table["bbox"].astype(np.float32)
        self._points = table["data"].astype(np.float32)
        self._visible = table["mask_new"] == 1
        order = table["ra"].ravel().astype(int) - 1
        faces = len(self._files)
        shapes = (self._boxes.shape, self._points.shape, self._visible.shape)
        if shapes != ((faces, 4), (faces, 2 * _POINTS), (faces, _POINTS)):
            raise ValueError(f"{path}: bbox, data and mask_new are {shapes} for {faces} names")
        if sorted(order) != list(range(faces)):
            raise ValueError(f"{path}: ra is not a permutation of the {faces} faces")
        self._rows = order[:_TRAIN] if split == "train" else order[_TRAIN:]

    def __len__(self) -> int:
        return len(self._rows)

    def _sample(self, index: int) -> LandmarkSample:
        row = self._rows[index]
        left, right, top, bottom = self._boxes[row]
        visible = self._visible[row]
        frontal = self.split == "test" and visible.all()
        return LandmarkSample(
            id=f"{self._files[row]}#{row}",
            group_id=f"aflw19:{self._files[row]}",
            image=self._read(self._images / self._files[row]),
            landmarks=self._points[row].reshape(2, _POINTS).T,
            box=np.array([left, top, right, bottom]),
            visible=visible,
            subsets=frozenset(["frontal"] if frontal else []),
        )
