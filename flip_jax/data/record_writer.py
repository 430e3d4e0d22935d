"""Writing a data set: ArrayRecord shards and their manifest, whole or not at all; no jax."""

from __future__ import annotations

import contextlib
import glob
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from array_record.python import array_record_module

from flip_jax.data.jpeg import BadImage, jpeg_size
from flip_jax.data.records import (
    MANIFEST,
    Manifest,
    Record,
    Shard,
    Split,
    encode_record,
    file_sha256,
)

_log = logging.getLogger(__name__)

# One record per chunk: a random read then decompresses nothing but its own record.
_WRITER_OPTIONS = "group_size:1"


class RecordWriter:
    """Writes a data set; the folder appears whole when the `with` block ends, or not at all.

    Everything goes to a hidden folder beside the target, which is renamed at the end and removed
    on any error. The same records in the same order give the same bytes.

    Args:
      out_dir: the folder to make.
      source: where the data comes from, for the manifest.
      overwrite: replace a data set that is already there.
      shard_bytes: size after which the next shard begins.
      mask_classes: names of the classes of the masks, for the manifest.

    Raises:
      ValueError: `out_dir` is not empty and `overwrite` is off, or it holds anything but a data
        set of whatever schema version; on leaving the block: nothing was written, or something
        else was put there meanwhile.
      OSError: the folder or the disk refuses.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike,
        source: str,
        *,
        overwrite: bool = False,
        shard_bytes: int = 256 * 2**20,
        mask_classes: Sequence[str] = (),
    ):
        self.out_dir = Path(out_dir).absolute()
        self._source, self._shard_bytes = source, shard_bytes
        self._mask_classes = list(mask_classes)
        self._writers: dict[str, _SplitWriter] = {}
        self._ids: set[str] = set()
        self._overwrite = overwrite
        self._check_target()

    def __enter__(self) -> RecordWriter:
        self.out_dir.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self.out_dir.name}.partial-"
        for left in sorted(self.out_dir.parent.glob(f"{glob.escape(prefix)}*")):
            _log.warning("%s was left by a build that was killed, unless it still runs", left)
        self._folder = Path(tempfile.mkdtemp(prefix=prefix, dir=self.out_dir.parent))
        return self

    def write(self, split: str, record: Record) -> None:
        """Appends one record.

        Raises:
          ValueError: an id that was written before, a bad split name, or `image` is no JPEG
            (`BadImage`).
          OSError: the disk refuses.
        """
        if not split.isidentifier():
            raise ValueError(f"split {split!r} must be a plain word such as 'train' or 'test'")
        if record.id in self._ids:
            raise ValueError(f"record id {record.id!r} was written before; ids must be unique")
        try:
            size = jpeg_size(record.image)
        except BadImage as error:
            raise BadImage(f"record {record.id!r}: {error}") from error
        if split not in self._writers:
            self._writers[split] = _SplitWriter(self._folder, split, self._shard_bytes)
        self._writers[split].write(record, *size)
        self._ids.add(record.id)

    def __exit__(self, kind, value, traceback) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                for writer in self._writers.values():
                    with contextlib.suppress(OSError):  # the first error is on its way already
                        writer.close()
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)

    def _finish(self) -> None:
        if not self._writers:
            raise ValueError(f"no record was written to {self.out_dir}; a data set needs one")
        splits = {name: self._writers[name].finish() for name in sorted(self._writers)}
        seen = Counter(group for writer in self._writers.values() for group in writer.groups)
        manifest = Manifest(
            source=self._source,
            groups_in_several_splits=sum(count > 1 for count in seen.values()),
            splits=splits,
            mask_classes=self._mask_classes,
        )
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        (self._folder / MANIFEST).write_bytes(text)
        self._folder.chmod(0o755)  # mkdtemp's folder is private
        self._check_target()  # again: what came there meanwhile is not this one's
        old = self._folder.with_name(self._folder.name + ".old")
        if self.out_dir.exists():
            self.out_dir.rename(old)
        self._folder.rename(self.out_dir)
        shutil.rmtree(old, ignore_errors=True)

    def _check_target(self) -> None:
        if self.out_dir.exists() and (not self.out_dir.is_dir() or any(self.out_dir.iterdir())):
            if not self._overwrite:
                raise ValueError(
                    f"{self.out_dir} exists and is not empty; choose another folder or overwrite"
                )
            _check_replaceable(self.out_dir)


class _AnyManifest(msgspec.Struct):
    """What manifests of all schema versions have in common."""

    schema_version: int
    splits: dict[str, Any]


def _check_replaceable(folder: Path) -> None:
    advice = "is not overwritten; remove it by hand or choose another folder"
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(f"{folder} holds no {MANIFEST}, so it is not a data set and {advice}")
    try:
        splits = msgspec.json.decode(file.read_bytes(), type=_AnyManifest).splits
    except msgspec.MsgspecError as error:
        raise ValueError(
            f"{file} is not the manifest of a data set ({error}), so {folder} {advice}"
        ) from error
    shard = re.compile(rf"({'|'.join(map(re.escape, splits))})-\d+\.array_record")
    extra = sorted(
        path.name
        for path in folder.iterdir()
        if path.name != MANIFEST and not (path.is_file() and shard.fullmatch(path.name))
    )
    if extra:
        raise ValueError(f"{folder} holds more than a data set ({', '.join(extra)}) and {advice}")


class _SplitWriter:
    """Writes the shards of one split and keeps its statistics."""

    def __init__(self, folder: Path, name: str, shard_bytes: int):
        self.folder, self.name, self.shard_bytes = folder, name, shard_bytes
        self.split = Split()
        self.groups: set[str] = set()
        self._writer = None
        self._bytes = 0  # in the open shard

    def write(self, record: Record, height: int, width: int) -> None:
        data = encode_record(record)
        split = self.split
        with _disk_errors():
            if self._writer is None:
                file = f"{self.name}-{len(split.shards):05d}.array_record"
                split.shards.append(Shard(file=file))
                path = str(self.folder / file)
                self._writer = array_record_module.ArrayRecordWriter(path, _WRITER_OPTIONS)
            self._writer.write(data)
        split.shards[-1].records += 1
        split.records += 1
        split.image_height.add(height, split.records)
        split.image_width.add(width, split.records)
        for caption in record.captions:
            split.captions += 1
            split.words_per_caption.add(len(caption.split()), split.captions)
        self.groups.add(record.group_id)
        self._bytes += len(data)
        if self._bytes >= self.shard_bytes:
            self.close()

    def close(self) -> None:
        """Finishes the open shard. Often it is only here that a failed write comes to light."""
        writer, self._writer, self._bytes = self._writer, None, 0
        if writer is not None:
            with _disk_errors():
                writer.close()

    def finish(self) -> Split:
        self.close()
        for shard in self.split.shards:
            file = self.folder / shard.file
            shard.bytes, shard.sha256 = file.stat().st_size, file_sha256(file)
        self.split.groups = len(self.groups)
        return self.split


@contextlib.contextmanager
def _disk_errors() -> Iterator[None]:
    """ArrayRecord reports every failure as RuntimeError; makes it the OSError that it is."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(f"cannot write records: {error}; is the disk full?") from error
