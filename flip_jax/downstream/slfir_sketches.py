"""Faces with sketches that grow, and which sketch is to find which photo."""

from __future__ import annotations

import hashlib
import threading
from typing import Any

import numpy as np

from flip_jax.data.record_sketch import sketch_at, sketch_kind
from flip_jax.downstream.face_data import DataLacks
from flip_jax.downstream.faces import Faces

# Whose sketch finds a photo: that of the very photo, or of another picture of the person.
SUBJECTS = ("photo", "other")
_ADVICE = (
    "SLFIR needs records with a sketch and a caption: drawn faces (`python -m flip_jax.data draw`) "
    "or pairs of FS2K (`python -m flip_jax.data read fs2k`)"
)


class SketchFaces:
    """The faces of a split that have a sketch and a caption. N faces, T steps, S pixels.

    Attributes:
      faces: their pictures.
      steps: T, pictures of every sketch, from the first lines to the complete one.
      hand: see `record_sketch.sketch_at`.
      left_out: faces without a sketch or a caption.
      origins: how many sketches are of which kind, see `record_sketch.sketch_kind`.
    """

    def __init__(self, faces: Faces, steps: int, per_person: int | None = None, hand: float = 0.0):
        """Looks at every record once.

        Args:
          steps: T, 1 or more.
          per_person: at most so many usable pictures of each person, the first ones; None = all.

        Raises:
          DataLacks: no face has a sketch and a caption.
        """
        rows, origins, self.left_out = [], [], 0
        taken = np.zeros(int(faces.groups.max()) + 1, int)
        for row, person in enumerate(faces.groups.tolist()):
            if per_person is not None and taken[person] == per_person:
                continue
            origin = sketch_kind(faces.record(row)) if faces.captions[row] else None
            if origin is None:
                self.left_out += 1
                continue
            taken[person] += 1
            rows.append(row)
            origins.append(origin)
        if not rows:
            raise DataLacks(
                f"{faces.source.path}, split {faces.source.split!r}: none of {len(faces)} records "
                f"has a sketch and a caption. {_ADVICE}"
            )
        self.faces, self.steps, self.hand = faces.take(np.array(rows)), steps, hand
        self.origins = {name: origins.count(name) for name in sorted(set(origins))}

    def __len__(self) -> int:
        return len(self.faces)

    def grown(self, row: int) -> np.ndarray:
        """Sketch `row` at all its steps, uint8 [T, S, S, 3]; the last one is complete.

        Raises:
          ValueError: the stored sketch cannot be decoded or is blank; names the record.
        """
        shares = np.arange(1, self.steps + 1) / self.steps
        return sketch_at(self.faces.record(row), shares, self.faces.image_size, self.hand)

    def all_steps(self) -> np.ndarray:
        """1..T for every sketch: int32 [N, T]."""
        return np.tile(np.arange(1, self.steps + 1, dtype=np.int32), (len(self), 1))

    def some_steps(self, count: int, seed: int) -> np.ndarray:
        """`count` steps of every sketch, one from each of as many equal parts, ascending.

        Returns:
          int32 [N, min(count, T)], 1..T; all steps if `count` is T or more.
        """
        if count >= self.steps:
            return self.all_steps()
        rng = np.random.default_rng(seed)
        at = (np.arange(count) + rng.random((len(self), count))) / count
        return 1 + np.minimum(at * self.steps, self.steps - 1).astype(np.int32)


class PartialSketches:
    """Chosen steps of all sketches as rows of pictures: row n * K + k is step `chosen[n, k]` of
    sketch n. Slices are uint8 [rows, S, S, 3], drawn when they are asked for.
    """

    def __init__(self, sketches: SketchFaces, chosen: np.ndarray):
        """Args: chosen: int [N, K], 1..T."""
        self._sketches, self._chosen = sketches, chosen
        self._lock = threading.Lock()
        self._last: tuple[int, np.ndarray] | None = None  # a slice may end inside a sketch

    def __len__(self) -> int:
        return self._chosen.size

    def __getitem__(self, rows: slice) -> np.ndarray:
        found = range(*rows.indices(len(self)))
        return np.stack([self._picture(*divmod(row, self._chosen.shape[1])) for row in found])

    def _picture(self, sketch: int, column: int) -> np.ndarray:
        with self._lock:
            if self._last is None or self._last[0] != sketch:
                self._last = sketch, self._sketches.grown(sketch)
            return self._last[1][self._chosen[sketch, column] - 1]

    def key(self) -> dict[str, Any]:
        """Identifies the pictures, for a cache."""
        return {
            "pictures": self._sketches.faces.digest,
            "steps": self._sketches.steps,
            "hand": self._sketches.hand,
            "chosen": hashlib.sha256(self._chosen.astype("<i4").tobytes()).hexdigest(),
        }


def pair_rows(groups: np.ndarray, subject: str, *, one_each: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which sketch is to find which photo.

    Args:
      groups: int [N], equal for pictures of one person.
      subject: of `SUBJECTS`. With `other`, the sketch is of the person's next picture, and people
        with a single one are left out.
      one_each: only the first photo of each person, so that every sketch has one right photo.

    Returns:
      (photo int64 [P], sketch int64 [P]), numbers of faces; may be empty.
    """
    photos, sketches = [], []
    for person in np.unique(groups):
        own = np.flatnonzero(groups == person)
        if subject == "other" and len(own) < 2:
            continue
        drawn = np.roll(own, -1) if subject == "other" else own
        photos.append(own[:1] if one_each else own)
        sketches.append(drawn[:1] if one_each else drawn)
    if not photos:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    return np.concatenate(photos), np.concatenate(sketches)
