"""The record format: one schema and its random-access reader; no jax.

A data set is a folder of ArrayRecord shards beside one `manifest.json`, which names the schema
version, the shards of every split with size and checksum, and the statistics of the data.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from array_record.python import array_record_module

import flip_jax
from flip_jax.data.attributes import ATTRIBUTES

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
_DTYPES = ("|i1", "<f4")


class BadRecord(ValueError):
    """A record that cannot be read or used; the message names shard and record number."""


class Record(msgspec.Struct, kw_only=True, frozen=True, eq=False, omit_defaults=True):
    """One picture with all that is known of it.

    Attributes:
      id: unique within the data set.
      group_id: equal for pictures of one person (or copies of one picture), e.g. `celeba:1234`.
      image: a JPEG file.
      captions: any number of non-empty sentences.
      attributes: int8 [40] in the order of `ATTRIBUTES`; 1 present, 0 absent, -1 unknown.
      box: float32 [4], x0, y0, x1, y1 of the face in pixels.
      landmarks: float32 [P, 2], (x, y) in pixels; the scheme is the source's.
      visible: int8 [P], 1 = seen, 0 = hidden, of the landmarks; None = nobody said.
      subsets: parts of the split by which results are reported, e.g. `challenging`.
      mask: a PNG file of class numbers, one per pixel.
      polylines: the lines of a sketch in one array, float32 [N, 3], (x, y, number of the line),
        see `join_strokes`; one array, because dozens of small ones make reading slow.
      drawings: a sketch of pixels as it grows, picture files, the last one complete; a single one
        where the steps are not known, none where there is no such sketch.
    """

    id: str
    group_id: str
    image: bytes
    captions: list[str]
    attributes: np.ndarray
    box: np.ndarray | None = None
    landmarks: np.ndarray | None = None
    visible: np.ndarray | None = None
    subsets: list[str] = msgspec.field(default_factory=list)
    mask: bytes | None = None
    polylines: np.ndarray | None = None
    drawings: list[bytes] = msgspec.field(default_factory=list)

    @property
    def strokes(self) -> list[np.ndarray]:
        """The lines of the sketch in the order they are drawn, float32 [n, 2] (x, y) each."""
        if self.polylines is None or not len(self.polylines):
            return []
        starts = np.flatnonzero(np.diff(self.polylines[:, 2])) + 1
        return np.split(self.polylines[:, :2], starts)

    def __post_init__(self):
        if not self.id or not self.group_id:
            raise ValueError(f"record {self.id!r}: id and group_id must not be empty")
        if any(not caption.strip() for caption in self.captions):
            raise ValueError(f"record {self.id!r}: captions contain an empty one; leave it out")
        self._check("attributes", self.attributes, np.int8, (len(ATTRIBUTES),))
        if np.any((self.attributes < -1) | (self.attributes > 1)):
            raise ValueError(f"record {self.id!r}: attributes must be -1, 0 or 1")
        if self.box is not None:
            self._check("box", self.box, np.float32, (4,))
        if self.landmarks is not None:
            self._check("landmarks", self.landmarks, np.float32, (len(self.landmarks), 2))
        if self.visible is not None:
            points = 0 if self.landmarks is None else len(self.landmarks)
            self._check("visible", self.visible, np.int8, (points,))
            if np.any((self.visible != 0) & (self.visible != 1)):
                raise ValueError(f"record {self.id!r}: visible must be 0 or 1")
        if self.polylines is not None:
            self._check("polylines", self.polylines, np.float32, (len(self.polylines), 3))

    def _check(self, field: str, value: np.ndarray, dtype: type, shape: tuple[int, ...]) -> None:
        if value.dtype != dtype or value.shape != shape:
            raise ValueError(
                f"record {self.id!r}: {field} is {value.dtype}{list(value.shape)}, must be "
                f"{np.dtype(dtype)}{list(shape)}"
            )
        if not np.isfinite(value).all():
            raise ValueError(f"record {self.id!r}: {field} contains NaN or infinity")


def join_strokes(strokes: Sequence[np.ndarray]) -> np.ndarray:
    """Puts lines, [n, 2] each and not empty, into the one array that a record stores."""
    numbered = [np.insert(line, 2, number, axis=1) for number, line in enumerate(strokes)]
    return np.concatenate([np.zeros((0, 3)), *numbered]).astype(np.float32)


def encode_record(record: Record) -> bytes:
    return _ENCODER.encode(record)


def decode_record(data: bytes) -> Record:
    """Inverse of `encode_record`.

    Raises:
      ValueError: the bytes are not a record of this schema.
    """
    try:
        return _DECODER.decode(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"not a record of schema version {SCHEMA_VERSION}: {error}") from error


def group_number(group_id: str) -> int:
    """Maps a group id to 0 .. 2**31 - 1, the same on every machine, for int32 on the device.

    Two groups share a number with probability 2**-31: among 10,000 groups there is such a pair
    with probability 2.3 %, among a million there are about 233. The price of one is that two
    strangers count as the same person.
    """
    digest = hashlib.blake2b(group_id.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & 0x7FFF_FFFF


def _pack(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return [value.dtype.str, list(value.shape), value.tobytes()]
    raise NotImplementedError(f"cannot store {type(value)}")


def _unpack(kind: type, value: Any) -> Any:
    dtype, shape, data = value
    if kind is not np.ndarray or dtype not in _DTYPES:
        raise ValueError(f"array of type {dtype!r}; allowed: {', '.join(_DTYPES)}")
    return np.frombuffer(data, dtype).reshape(shape)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_pack)
_DECODER = msgspec.msgpack.Decoder(Record, dec_hook=_unpack)


class Shard(msgspec.Struct, kw_only=True):
    file: str
    records: int = 0
    bytes: int = 0
    sha256: str = ""


class Spread(msgspec.Struct):
    """Least, mean and greatest of the numbers shown to `add`; zeros before the first."""

    least: float = 0.0
    mean: float = 0.0
    greatest: float = 0.0

    def add(self, value: float, count: int) -> None:
        """Takes in the `count`-th value, counted from 1."""
        self.least = min(self.least, value) if count > 1 else value
        self.greatest = max(self.greatest, value) if count > 1 else value
        self.mean += (value - self.mean) / count


class Split(msgspec.Struct, kw_only=True):
    records: int = 0
    groups: int = 0
    captions: int = 0
    words_per_caption: Spread = msgspec.field(default_factory=Spread)
    image_height: Spread = msgspec.field(default_factory=Spread)  # pixels
    image_width: Spread = msgspec.field(default_factory=Spread)
    shards: list[Shard] = msgspec.field(default_factory=list)


class Manifest(msgspec.Struct, kw_only=True):
    """What `manifest.json` holds."""

    schema_version: int = SCHEMA_VERSION
    created_by: str = f"flip_jax {flip_jax.__version__}"
    source: str
    groups_in_several_splits: int  # above 0 where test people were trained on
    splits: dict[str, Split]
    # Of a curation: how many samples each stage saw and dropped, and why, as `stage/name`.
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    # Names of the classes of the masks, in the order of their numbers, background first; empty
    # where there are no masks, or nobody said.
    mask_classes: list[str] = msgspec.field(default_factory=list)


class _Version(msgspec.Struct):
    schema_version: int


def load_manifest(path: str | os.PathLike) -> Manifest:
    """Reads `path/manifest.json`.

    Raises:
      FileNotFoundError: no such folder, or no data set in it.
      ValueError: not a manifest, or one of another schema version.
    """
    path = Path(path)
    advice = "`python -m flip_jax.data build` or `draw` makes a data set"
    if not path.is_dir():
        raise FileNotFoundError(f"data folder {path} does not exist; {advice}")
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no {MANIFEST}, so no finished data set; {advice}")
    data = file.read_bytes()
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
        if version == SCHEMA_VERSION:
            return msgspec.json.decode(data, type=Manifest)
    except msgspec.MsgspecError as error:
        raise ValueError(f"{file} is not a manifest: {error}; build the data set again") from error
    raise ValueError(
        f"{file} has schema version {version}, this release reads {SCHEMA_VERSION}; build the data "
        "set again or use the release that made it"
    )


class RecordSource:
    """Random access to the records of one split.

    Safe to share between threads, and cheap to pickle into other processes: shards are opened
    at the first read.

    Args:
      path: folder with `manifest.json`.
      split: name of the split.
      check: refuse a shard that is missing or of another size than the manifest says; without it,
        reading from such a shard is the error.

    Raises:
      FileNotFoundError: no such folder, manifest or shard.
      ValueError: wrong schema version, unknown split, or a shard of the wrong size.
    """

    def __init__(self, path: str | os.PathLike, split: str, *, check: bool = True):
        self.path, self.split = Path(path), split
        self.manifest = load_manifest(path)
        # Identifies the data in checkpoints and reports.
        self.manifest_hash = file_sha256(self.path / MANIFEST)
        if split not in self.manifest.splits:
            raise ValueError(
                f"{self.path} has no split {split!r}; it has {', '.join(self.manifest.splits)}"
            )
        self._shards = self.manifest.splits[split].shards
        for shard in self._shards if check else ():
            self._check_shard(shard)
        # Number of records before the end of each shard.
        self._ends = list(itertools.accumulate(shard.records for shard in self._shards))
        self._readers: list[Any] = [None] * len(self._shards)
        self._lock = threading.Lock()

    def damaged_shards(self) -> list[str]:
        """Reads all bytes; says what is wrong with each shard that the manifest does not describe:
        it is missing, or its size or SHA-256 is another."""
        damage = []
        for shard in self._shards:
            try:
                self._check_shard(shard, checksum=True)
            except (ValueError, OSError) as error:
                damage.append(str(error))
        return damage

    def _check_shard(self, shard: Shard, checksum: bool = False) -> None:
        file = self.path / shard.file
        advice = "copy the data set again or rebuild it"
        if not file.is_file():
            raise FileNotFoundError(f"shard {file} is missing; {advice}")
        size = file.stat().st_size
        if size != shard.bytes:
            raise ValueError(f"shard {file} has {size} bytes, not {shard.bytes}; {advice}")
        if checksum and file_sha256(file) != shard.sha256:
            raise ValueError(f"shard {file} does not have the SHA-256 of the manifest; {advice}")

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        """Reads record `index`, 0 <= index < len(self).

        Raises:
          IndexError: out of range.
          BadRecord: the stored bytes are damaged.
          OSError: the shard as a whole cannot be read.
        """
        shard, position = self._locate(index)
        try:
            return decode_record(self._reader(shard).read([position])[0])
        except (RuntimeError, ValueError) as error:  # ArrayRecord raises RuntimeError
            raise BadRecord(f"{self.where(index)}: {error}") from error

    def where(self, index: int) -> str:
        """Names the shard and the number in it, for messages."""
        shard, position = self._locate(index)
        return f"{self.path / self._shards[shard].file} record {position}"

    def _locate(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} of {len(self)} in split {self.split!r}")
        shard = bisect.bisect_right(self._ends, index)
        return shard, int(index) - self._ends[shard] + self._shards[shard].records

    def _reader(self, shard: int) -> Any:
        if self._readers[shard] is None:
            with self._lock:
                if self._readers[shard] is None:
                    self._readers[shard] = self._open(shard)
        return self._readers[shard]

    def _open(self, shard: int) -> Any:
        file, records = self.path / self._shards[shard].file, self._shards[shard].records
        try:
            reader = array_record_module.ArrayRecordReader(str(file), _READER_OPTIONS)
            found = reader.num_records()
        except RuntimeError as error:
            raise OSError(f"shard {file} cannot be opened: {error}") from error
        if found != records:  # ArrayRecord takes a damaged index for an empty file
            raise OSError(f"shard {file} is damaged: {found} readable records of {records}")
        return reader

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": [None] * len(self._shards), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
