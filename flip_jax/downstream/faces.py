"""The people of one split, as downstream tasks see them: labels in memory, pictures on demand."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from flip_jax.data import transforms
from flip_jax.data.pipeline import read_record
from flip_jax.data.records import BadRecord, Record, RecordSource


class Faces:
    """Records of a split whose pictures decode, in order, or some of them.

    Attributes:
      source: where they are from.
      numbers: int64 [N], record numbers in `source`.
      ids: [N], record ids.
      group_ids: [N], equal for pictures of one person.
      groups: int64 [N], the same as numbers from 0 on.
      attributes: int8 [N, 40], 1 present, 0 absent, -1 unknown.
      captions: [N] lists of captions, which may be empty.
      masked: bool [N], whether a record has a mask.
      points: int64 [N], its number of landmarks; 0 = none.
      images: uint8 [N, S, S, 3], decoded when sliced.
      bad: what is wrong with each record that was passed over.
    """

    def __init__(
        self,
        source: RecordSource,
        image_size: int,
        *,
        limit: int | None = None,
        threads: int = 2,
    ):
        """Looks at every record once.

        Args:
          image_size: S, pixels; pictures are squashed to a square, as in training.
          limit: the first so many usable records; None = all.
          threads: that read and decode.

        Raises:
          ValueError: no record is usable, or a number is below 1.
        """
        if min(image_size, threads) < 1 or (limit is not None and limit < 1):
            raise ValueError(
                f"image_size={image_size}, threads={threads} and limit={limit} must be 1 or more"
            )
        self.source, self.image_size, self.threads = source, image_size, threads
        self.bad: list[str] = []
        numbers, records = [], []
        for number, record in _usable(source, threads, self.bad):
            numbers.append(number)
            records.append(record)
            if len(records) == limit:
                break
        if not records:
            raise ValueError(
                f"{source.path}, split {source.split!r}: none of {len(source)} records has a "
                f"picture; the first: {self.bad[0] if self.bad else 'there is none'}"
            )
        self.numbers = np.array(numbers, np.int64)
        self.ids = [record.id for record in records]
        self.group_ids = [record.group_id for record in records]
        self.groups = np.unique(self.group_ids, return_inverse=True)[1]
        self.attributes = np.stack([record.attributes for record in records])
        self.captions = [record.captions for record in records]
        self.masked = np.array([record.mask is not None for record in records])
        self.points = np.array([0 if r.landmarks is None else len(r.landmarks) for r in records])
        self.images = Pictures(self)

    def __len__(self) -> int:
        return len(self.numbers)

    def record(self, row: int) -> Record:
        """All that is stored of row `row`, strokes and landmarks included."""
        return self.source[int(self.numbers[row])]

    def image(self, row: int) -> np.ndarray:
        """Picture `row` as the model sees it, uint8 [S, S, 3]."""
        _, pixels = read_record(self.source, int(self.numbers[row]), need_caption=False)
        return transforms.resize_image(pixels, self.image_size)

    def take(self, rows: Sequence[int] | np.ndarray) -> Faces:
        """Some of them, in the order of `rows`, by number; or where a bool [N] is True."""
        rows = np.asarray(rows)
        rows = np.flatnonzero(rows) if rows.dtype == bool else rows.astype(np.int64)
        some = object.__new__(Faces)
        some.source, some.image_size, some.threads = self.source, self.image_size, self.threads
        some.bad = self.bad
        some.numbers, some.attributes = self.numbers[rows], self.attributes[rows]
        some.masked, some.points = self.masked[rows], self.points[rows]
        some.ids, some.group_ids, some.captions = (
            [values[row] for row in rows] for values in (self.ids, self.group_ids, self.captions)
        )
        some.groups = np.unique(self.groups[rows], return_inverse=True)[1]
        some.images = Pictures(some)
        return some

    @property
    def digest(self) -> str:
        """Identifies the pictures as the model sees them, 64 hex digits."""
        seen = hashlib.sha256(f"{self.source.manifest_hash} {self.source.split} ".encode())
        seen.update(f"squash {self.image_size} ".encode() + self.numbers.tobytes())
        return seen.hexdigest()

    def describe(self) -> dict[str, int | str]:
        """What a report says: split, records, groups, records passed over."""
        return {
            "split": self.source.split,
            "records": len(self),
            "groups": int(self.groups.max()) + 1,
            "bad_records": len(self.bad),
        }


@dataclass(frozen=True)
class Splits:
    """What a task uses of a data set; those of `train` are in the order of the subsets."""

    train: Faces
    val: Faces
    test: Faces


class Pictures:
    """The pictures of `Faces`; slices are uint8 [n, S, S, 3]."""

    def __init__(self, faces: Faces):
        self._faces = faces

    def __len__(self) -> int:
        return len(self._faces)

    def __getitem__(self, rows: slice) -> np.ndarray:
        faces = self._faces
        size = faces.image_size
        with ThreadPoolExecutor(faces.threads) as pool:
            images = list(pool.map(faces.image, range(*rows.indices(len(faces)))))
        return np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8)


def _usable(source: RecordSource, threads: int, bad: list[str]) -> Iterator[tuple[int, Record]]:
    """(number, record without its pictures) of every record that decodes, in order."""

    def inspect(number: int) -> Record | str:
        try:
            record, _ = read_record(source, number, need_caption=False)
        except BadRecord as error:
            return str(error)
        return Record(
            id=record.id,
            group_id=record.group_id,
            image=b"",
            captions=record.captions,
            attributes=record.attributes,
            landmarks=record.landmarks,
            mask=None if record.mask is None else b"",
        )

    chunk = 64 * threads
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), chunk):
            numbers = range(start, min(start + chunk, len(source)))
            for number, found in zip(numbers, pool.map(inspect, numbers), strict=True):
                if isinstance(found, str):
                    bad.append(found)
                else:
                    yield number, found
