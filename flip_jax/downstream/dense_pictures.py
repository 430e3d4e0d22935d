"""Pictures with what is marked in them, as stored, and training batches made of them; no jax."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from flip_jax.data.pipeline import read_record
from flip_jax.data.readers.reader import decode_mask
from flip_jax.data.records import BadRecord
from flip_jax.data.transforms import BadImage, decode_image
from flip_jax.downstream.dense_geometry import Geometry
from flip_jax.downstream.faces import Faces

_AHEAD = 2  # batches made before they are asked for


@dataclass(frozen=True, eq=False)
class DensePicture:
    """A picture as its record has it. Points are (x, y), whole coordinates are pixel centres.

    Attributes:
      image: uint8 [H, W, 3].
      mask: uint8 [H, W], class numbers, or None.
      landmarks: float32 [P, 2], or None.
      box: float32 [4], or None.
      visible: int8 [P], of the landmarks, or None.
      attributes: int8 [40], 1 present, 0 absent, -1 unknown; None of a picture without record.
      name: of the record, for messages.
    """

    image: np.ndarray
    mask: np.ndarray | None
    landmarks: np.ndarray | None
    box: np.ndarray | None
    visible: np.ndarray | None = None
    attributes: np.ndarray | None = None
    name: str = "picture"

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)"""
        return self.image.shape[:2]


def read_picture(faces: Faces, row: int) -> DensePicture:
    """Row `row` of `faces`.

    Raises:
      BadRecord: damaged, or a mask of another size than its picture.
    """
    number = int(faces.numbers[row])
    record, image = read_record(faces.source, number, need_caption=False)
    mask, where = None, f"{faces.source.where(number)} ({record.id})"
    if record.mask is not None:
        try:
            mask = decode_mask(record.mask, where)
        except BadImage as error:
            raise BadRecord(str(error)) from error
        if mask.shape != image.shape[:2]:
            raise BadRecord(
                f"{where}: a mask of {list(mask.shape)} pixels for a picture of "
                f"{list(image.shape[:2])}"
            )
    marks = record.landmarks, record.box, record.visible
    return DensePicture(image, mask, *marks, record.attributes, name=where)


def read_pixels(image: np.ndarray | bytes, row: int) -> np.ndarray:
    """Picture `row` of a caller: uint8 [H, W, 3] as it is, the bytes of a file decoded.

    Raises:
      BadImage: no whole picture; names the row.
      ValueError: an array of another dtype or shape.
    """
    if isinstance(image, bytes):
        try:
            return decode_image(image)
        except BadImage as error:
            raise BadImage(f"picture {row}: {error}") from error
    shape, dtype = np.shape(image), getattr(image, "dtype", type(image).__name__)
    if dtype != np.uint8 or len(shape) != 3 or shape[2] != 3:
        raise ValueError(
            f"picture {row} is {dtype} {list(shape)}; give uint8 [H, W, 3], RGB, or the bytes of a "
            "picture file"
        )
    return image


class Squares:
    """Pictures as the network sees them; slices are uint8 [n, S, S, 3]."""

    def __init__(self, faces: Faces, geometry: Callable[[DensePicture], Geometry]):
        self._faces, self._geometry = faces, geometry

    def __len__(self) -> int:
        return len(self._faces)

    def __getitem__(self, rows: slice) -> np.ndarray:
        def one(row: int) -> np.ndarray:
            picture = read_picture(self._faces, row)
            return self._geometry(picture).place_image(picture.image)

        with ThreadPoolExecutor(self._faces.threads) as pool:
            return np.stack(list(pool.map(one, range(*rows.indices(len(self))))))


Example = Callable[[DensePicture, np.random.Generator], dict[str, np.ndarray]]


class DenseBatches:
    """Endless training batches; batch t is a pure function of (faces, seed, t).

    The pictures come in a new order every time round; a batch may end one round and begin the next.
    """

    def __init__(self, faces: Faces, example: Example, batch_size: int, seed: int):
        """Args:
        faces: at least one.
        example: (picture, generator) -> arrays of equal shapes for all pictures; all its
          randomness is of the generator.
        batch_size: pictures.
        """
        self.faces, self.batch_size = faces, batch_size
        self._example, self._seed = example, seed

    @property
    def steps_per_epoch(self) -> int:
        """Batches that show every picture once, rounded; at least 1."""
        return max(1, round(len(self.faces) / self.batch_size))

    def rows(self, step: int) -> np.ndarray:
        """int64 [B]: which pictures batch `step` shows."""
        count = len(self.faces)
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        found = np.empty(self.batch_size, np.int64)
        for turn in np.unique(places // count):
            order = self._rng(0, turn).permutation(count)
            own = places // count == turn
            found[own] = order[places[own] % count]
        return found

    def at(self, step: int, pool: ThreadPoolExecutor) -> dict[str, np.ndarray]:
        """Batch `step`, made in the threads of a pool."""

        def one(item: tuple[int, int]) -> dict[str, np.ndarray]:
            place, row = item
            return self._example(read_picture(self.faces, row), self._rng(1, step, place))

        examples = list(pool.map(one, enumerate(self.rows(step).tolist())))
        return {name: np.stack([e[name] for e in examples]) for name in examples[0]}

    def stream(self, steps: int) -> Iterator[dict[str, np.ndarray]]:
        """Batches 0 to `steps` - 1, some of them made ahead in threads."""
        ready: queue.Queue = queue.Queue(_AHEAD)
        stopped = threading.Event()

        def put(item: dict[str, np.ndarray] | Exception) -> bool:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    return True
                except queue.Full:
                    continue
            return False

        def produce() -> None:
            with ThreadPoolExecutor(self.faces.threads) as pool:
                try:
                    for step in range(steps):
                        if not put(self.at(step, pool)):
                            return
                except Exception as error:  # belongs to the one who asks for the batch
                    put(error)

        producer = threading.Thread(target=produce, daemon=True)
        producer.start()
        try:
            for _ in range(steps):
                item = ready.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            stopped.set()
            producer.join()

    def _rng(self, *key: int) -> np.random.Generator:
        sequence = np.random.SeedSequence(self._seed, spawn_key=tuple(map(int, key)))
        return np.random.default_rng(sequence)
