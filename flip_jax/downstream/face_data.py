"""A data set for downstream tasks: its splits as `Faces`, and the features made of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.data.records import (
    MANIFEST,
    RecordSource,
    file_sha256,
    group_number,
    load_manifest,
)
from flip_jax.downstream.backbone import Backbone, image_embedding
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.features import FeatureCache

USUAL_SPLITS = ("train", "val", "test")  # what tasks ask for by themselves
VAL_SHARE = 10  # one group of so many becomes validation where a data set has none


class DataLacks(ValueError):
    """A task needs what the data set has not; `suite` leaves such a task out."""


class FaceData:
    """A data set of records; each of its splits is looked at once.

    Attributes:
      path: its folder.
      manifest: what its `manifest.json` holds.
      features: cached outputs of encoders.

    Raises:
      FileNotFoundError, ValueError: no data set there, see `flip_jax.data.records.load_manifest`.
    """

    def __init__(
        self,
        path: Path | str,
        image_size: int,
        *,
        cache: Path | str | None = None,
        limit: int | None = None,
        threads: int = 2,
        log: Callable[[str], None] = print,
    ):
        """Args:
        image_size: pixels, as the encoder takes them.
        cache: folder of features; None = they are made anew each time.
        limit: at most so many records of each split, the first ones.
        threads: that read and decode.
        log: is told of bad records and damaged features.
        """
        self.path, self.image_size = Path(path), image_size
        self.manifest = load_manifest(path)
        self.features = FeatureCache(cache, log)
        self._limit, self._threads, self._log = limit, threads, log
        self._splits: dict[str, Faces] = {}

    def split(self, name: str) -> Faces:
        """The records of one split.

        Raises:
          DataLacks: no such split, of the usual ones.
          ValueError: no such split, or none of its records is usable.
          OSError: a shard is missing or damaged.
        """
        if name not in self.manifest.splits:
            # One of another name was asked for by a setting.
            error = DataLacks if name in USUAL_SPLITS else ValueError
            raise error(
                f"{self.path} has no split {name!r}; it has {', '.join(self.manifest.splits)}"
            )
        if name not in self._splits:
            source = RecordSource(self.path, name)
            options = {"limit": self._limit, "threads": self._threads}
            faces = self._splits[name] = Faces(source, self.image_size, **options)
            if faces.bad:
                self._log(
                    f"{len(faces.bad)} bad records of split {name!r} are left out, the "
                    f"first: {faces.bad[0]}"
                )
        return self._splits[name]

    def image_embeds(self, backbone: Backbone, faces: Faces) -> np.ndarray:
        """Joint embeddings float32 [N, E] of the pictures, from the cache if they are there."""
        return self.features.of_images(backbone, faces, "joint embedding", image_embedding)

    def describe(self) -> dict[str, Any]:
        """What a report says of the data that was looked at."""
        return {
            "path": str(self.path),
            "manifest_sha256": file_sha256(self.path / MANIFEST),
            "splits": [faces.describe() for faces in self._splits.values()],
        }

    def three_splits(self, train: str, val: str, test: str) -> tuple[Faces, Faces, Faces]:
        """Faces for training, validation and test.

        A data set without the split `val` gives about every tenth group of `train`, by a hash of
        the group; the two share no group. With both splits there, they are as the data set has
        them.

        Raises:
          DataLacks, ValueError, OSError: as `split`; or `train` has too few groups to be divided,
            or two of the names are the same.
        """
        named = {"train_split": train, "val_split": val, "test_split": test}
        for (one, name), (other, same) in itertools.combinations(named.items(), 2):
            if name == same:
                raise ValueError(f"{other}={same}: must be another split than {one}")
        whole, tested = self.split(train), self.split(test)
        if val in self.manifest.splits or val != "val":
            return whole, self.split(val), tested
        held = np.array([group_number(g) % VAL_SHARE == 0 for g in whole.group_ids])
        if held.all() or not held.any():
            raise DataLacks(
                f"{self.path} has no split {val!r}, and {train!r} with its "
                f"{whole.describe()['groups']} groups is too small to be divided; build the data "
                "set with a validation split"
            )
        return whole.take(~held), whole.take(held), tested
