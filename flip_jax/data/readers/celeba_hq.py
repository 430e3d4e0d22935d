"""CelebA-HQ: the masks of CelebAMask-HQ, and captions of MM-CelebA-HQ and CelebA-Dialog."""

from __future__ import annotations

import os
import pickle
from abc import abstractmethod
from pathlib import PurePath
from typing import ClassVar

import numpy as np

from flip_jax.data.readers.celeba import read_dialog
from flip_jax.data.readers.celeba_tables import (
    pick,
    read_attributes,
    read_hq_mapping,
    read_identities,
    read_partition,
)
from flip_jax.data.readers.reader import Reader, Sample, decode_mask
from flip_jax.data.readers.samples import ParsingSample
from flip_jax.data.records import Record

_PICTURES = (
    "the folder CelebA-HQ-img and CelebA-HQ-to-CelebA-mapping.txt of CelebAMask-HQ (MMLab, The "
    "Chinese University of Hong Kong); identity_CelebA.txt and list_eval_partition.txt of CelebA."
)


class _CelebAHQ(Reader[Sample]):
    """What the data sets on CelebA-HQ's 30,000 pictures `0.jpg` to `29999.jpg` share.

    A picture belongs to the person and, where the data set has no splits of its own, to the split
    of the picture of CelebA that it was made from: 24,183, 2,993 and 2,824 pictures.
    """

    SPLITS = ("train", "val", "test")

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._images = self._find("CelebA-HQ-img", "images", "image/images", "image")
        path = self._table("CelebA-HQ-to-CelebA-mapping.txt")
        mapping = read_hq_mapping(path)
        self._numbers = self._read_numbers(mapping)
        originals = pick(mapping, self._numbers, path)
        path = self._table("identity_CelebA.txt", "Anno/identity_CelebA.txt")
        self._groups = pick(read_identities(path), originals, path)

    def __len__(self) -> int:
        return len(self._numbers)

    def _read_numbers(self, mapping: dict[int, str]) -> list[int]:
        path = self._table("list_eval_partition.txt", "Eval/list_eval_partition.txt")
        partition = read_partition(path)
        splits = pick(partition, list(mapping.values()), path)
        return [n for n, split in zip(mapping, splits, strict=True) if split == self.split]


class CelebAMaskHQ(_CelebAHQ[ParsingSample]):
    """CelebAMask-HQ: pictures of 1024 x 1024 pixels, masks of 512 x 512 in 19 classes.

    Published are the pixels of one part each, `0/00000_skin.png`, 2,000 pictures to a folder. They
    are put on each other in the order of `CLASSES`, so that a later class hides an earlier one.
    `l_` and `r_` are the person's own left and right.

    Source: face_parsing/Data_preprocessing/g_mask.py of switchablenorms/CelebAMask-HQ.
    """

    NAME = "celeba_mask_hq"
    SAMPLE = ParsingSample
    SOURCE = "the folder CelebAMask-HQ-mask-anno and " + _PICTURES
    CLASSES = (
        *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear"),
        *("r_ear", "mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
    )

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._masks = self._find("CelebAMask-HQ-mask-anno")

    def _sample(self, index: int) -> ParsingSample:
        number = self._numbers[index]
        image = self._read(self._images / f"{number}.jpg")
        return ParsingSample(f"{number}.jpg", self._groups[index], image, self._merge(number))

    def _merge(self, number: int) -> np.ndarray:
        mask = None
        stem = self._masks / str(number // 2000) / f"{number:05d}"
        for value, part in enumerate(self.CLASSES[1:], 1):
            path = stem.with_name(f"{stem.name}_{part}.png")
            if not path.exists():  # a part that the picture does not show
                continue
            pixels = decode_mask(path.read_bytes(), path) > 0
            if mask is None:
                mask = np.zeros(pixels.shape, np.uint8)
            if mask.shape != pixels.shape:
                raise ValueError(f"{path} is {pixels.shape}, other parts are {mask.shape}")
            mask[pixels] = value
        if mask is None:
            raise FileNotFoundError(f"{stem}_*.png are missing; unpack {self.NAME} again")
        return mask


class _CaptionedHQ(_CelebAHQ[Record]):
    """Pictures of CelebA-HQ with captions and CelebAMask-HQ's copy of the 40 labels."""

    SAMPLE = Record

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        path = self._table("CelebAMask-HQ-attribute-anno.txt")
        names = [f"{number}.jpg" for number in self._numbers]
        self._attributes = pick(read_attributes(path, set(names)), names, path)

    def _sample(self, index: int) -> Record:
        number = self._numbers[index]
        return Record(
            id=f"{number}.jpg",
            group_id=self._groups[index],
            image=self._read(self._images / f"{number}.jpg"),
            captions=self._captions(number),
            attributes=self._attributes[index],
        )

    @abstractmethod
    def _captions(self, number: int) -> list[str]: ...


class CelebADialogHQ(_CaptionedHQ):
    """CelebA-HQ with CelebA-Dialog's caption of each picture; 5380.jpg has none, so is left out."""

    NAME = "celeba_dialog_hq"
    SOURCE = (
        "captions_hq.json of CelebA-Dialog (MMLab@NTU), at the top or in text; "
        "CelebAMask-HQ-attribute-anno.txt, " + _PICTURES
    )

    def _read_numbers(self, mapping: dict[int, str]) -> list[int]:
        self._texts = read_dialog(self._table("captions_hq.json", "text/captions_hq.json"))
        numbers = super()._read_numbers(mapping)
        return [number for number in numbers if f"{number}.jpg" in self._texts]

    def _captions(self, number: int) -> list[str]:
        return self._texts[f"{number}.jpg"]


class MMCelebAHQ(_CaptionedHQ):
    """Multi-Modal-CelebA-HQ: ten sentences per picture, made from the labels by a grammar.

    Splits are its own, 24,000 and 6,000 pictures, which divide pictures, not people: a person may
    be in both. `show` counts these groups.
    """

    NAME = "mm_celeba_hq"
    SPLITS = ("train", "test")
    SOURCE = (
        "celeba-caption (text.zip), train/filenames.pickle and test/filenames.pickle of "
        "Multi-Modal-CelebA-HQ; CelebAMask-HQ-attribute-anno.txt, "
        + _PICTURES.replace(" and list_eval_partition.txt", "")
    )
    _CAPTIONS: ClassVar[tuple[str, ...]] = ("celeba-caption", "text/celeba-caption")

    def __init__(self, root: str | os.PathLike, split: str):
        super().__init__(root, split)
        self._texts = self._find(*self._CAPTIONS)

    def _read_numbers(self, mapping: dict[int, str]) -> list[int]:
        path = self._table(f"{self.split}/filenames.pickle")
        try:
            with open(path, "rb") as file:
                # latin-1: the lists were pickled by Python 2.
                names = _PlainUnpickler(file, encoding="latin-1").load()
            return [int(PurePath(name).stem) for name in names]
        except (pickle.UnpicklingError, EOFError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a list of picture names: {error}") from error

    def _captions(self, number: int) -> list[str]:
        lines = self._read_text(self._texts / f"{number}.txt").splitlines()
        return [text for line in lines if (text := line.strip())]


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists of strings; a pickle that asks for anything else could run any code."""

    def find_class(self, module: str, name: str) -> None:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
