"""Record shards from finished parts, and the data set from finished shards."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_jax.curate.groups import Groups
from flip_jax.curate.order import OFFSET_AND_SIZE, SHARD_COLUMNS, order_name, part_key
from flip_jax.curate.parts import Candidate
from flip_jax.curate.stages import batched
from flip_jax.curate.storage import Work, is_local, open_file, open_table
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import (
    MANIFEST,
    Manifest,
    Record,
    Split,
    Spread,
    decode_record,
    load_manifest,
)

SOURCES = "sources.parquet"
_SOURCES_AT_A_TIME = 1000
_ROWS_TOGETHER = 50  # of these, in a row group of the data set's table
_OPEN_FILES = 128

_SOURCES = pa.schema(
    [
        ("split", pa.string()),
        ("id", pa.string()),
        ("group_id", pa.string()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
        ("pixel_sha256", pa.string()),
    ]
)


@dataclass(frozen=True)
class ShardFile:
    """A finished shard: `shards/KEY.array_record` and `shards/KEY.sources`.

    Attributes:
      split: its split.
      place: its number in it.
      key: hash of what is in it.
      statistics: `Split` of this shard alone, as JSON.
    """

    split: str
    place: int
    key: str
    statistics: bytes


def write_shard(
    work: Work,
    groups: Groups,
    name: str,
    carried: Iterable[tuple[np.ndarray, bytes]] | None = None,
) -> ShardFile:
    """Writes the candidates of a shard in the order of their numbers, or finds it finished.

    Args:
      carried: from `carry`; None = the rows are in the shard's `order_name`, the candidates in the
        files of parts.
    """
    if carried is None:
        rows = np.concatenate(list(work.rows(order_name(name), SHARD_COLUMNS)))
        data = None
    else:
        found = sorted(carried, key=lambda each: each[0].tolist())
        rows, data = np.stack([row for row, _ in found]), [candidate for _, candidate in found]
    split, _, place = name.rpartition("-")
    named = groups.named(rows[:, -1])
    told = name.encode() + rows.tobytes() + repr(named).encode()
    key = hashlib.sha256(told).hexdigest()
    if not work.exists(f"shards/{key}.json"):
        with work.scratch() as folder:
            writer = RecordWriter(folder / "data", "", shard_bytes=1 << 62)
            with writer, pq.ParquetWriter(folder / "sources", _SOURCES) as sources:
                for batch in batched(_candidates(work, rows, named, data), _SOURCES_AT_A_TIME):
                    for record, _ in batch:
                        writer.write(split, record)
                    told = [_source(split, *each) for each in batch]
                    sources.write_table(pa.Table.from_pylist(told, _SOURCES))
            statistics = load_manifest(folder / "data").splits[split]
            (shard,) = statistics.shards
            work.publish(folder / "data" / shard.file, f"shards/{key}.array_record")
            work.publish(folder / "sources", f"shards/{key}.sources")
            work.write(f"shards/{key}.json", msgspec.json.encode(statistics))
    return ShardFile(split, int(place), key, work.read(f"shards/{key}.json"))


def _sources(work: Work, key: str, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
    """The source table of a finished shard, in pieces."""
    with open_table(work.path(f"shards/{key}.sources")) as table:
        yield from table.iter_batches(_SOURCES_AT_A_TIME, columns=columns)


def _candidates(
    work: Work, rows: np.ndarray, named: Sequence[str | None], data: Sequence[bytes] | None
) -> Iterator[tuple[Record, Candidate]]:
    """Reads the candidates of a shard's rows; puts groups right."""
    with _Blobs(work) as blobs:
        for index, (row, group) in enumerate(zip(rows, named, strict=True)):
            if data is None:
                offset, size = row[OFFSET_AND_SIZE].tolist()
                found = blobs.read(f"parts/{part_key(row)}.records", offset, size)
            else:
                found = data[index]
            candidate = msgspec.msgpack.decode(found, type=Candidate)
            record = decode_record(candidate.record)
            if group not in (None, record.group_id):
                record = msgspec.structs.replace(record, group_id=group)
            yield record, candidate


def _source(split: str, record: Record, candidate: Candidate) -> dict[str, str]:
    return {
        "split": split,
        "id": record.id,
        "group_id": record.group_id,
        "url": candidate.url,
        "licence": candidate.licence,
        "source": candidate.source,
        "pixel_sha256": candidate.pixel_hash.hex(),
    }


class _Blobs(ExitStack):
    """The files of parts, of which a bounded number is open."""

    def __init__(self, work: Work):
        super().__init__()
        self.work = work
        self._files: OrderedDict[str, BinaryIO] = OrderedDict()
        self.callback(lambda: [file.close() for file in self._files.values()])

    def read(self, name: str, offset: int, size: int) -> bytes:
        file = self._files.pop(name, None)
        if file is None:
            file = open_file(self.work.path(name))
            if len(self._files) == _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files[name] = file
        file.seek(offset)
        return file.read(size)


def check_target(path: str) -> None:
    """Refuses a place that is taken.

    Raises:
      ValueError: it is there and not an empty folder.
    """
    if is_local(path):
        target = Path(path)
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    else:
        taken = Work(path).exists(MANIFEST)
    if taken:
        raise ValueError(
            f"config.output.path={path!r} exists and is not empty; remove it or choose another one"
        )


def assemble(
    work: Work,
    shards: Iterable[ShardFile],
    groups: dict[str, int],
    source: str,
    counts: dict[str, int],
    path: str,
) -> Manifest:
    """Makes the data set of finished shards; a local folder appears whole or not at all.

    Args:
      groups: how many each split has.
      source, counts: for the manifest.
      path: the folder to make.

    Raises:
      ValueError: there is no shard, so no record.
    """
    shards = sorted(shards, key=lambda shard: (shard.split, shard.place))
    if not shards:
        raise ValueError(
            f"no record was left; the files in {work.path('status')} say why of every row"
        )
    splits: dict[str, Split] = {}
    files: dict[str, str] = {}  # name in the data set -> in the work folder
    for shard in shards:
        added = msgspec.json.decode(shard.statistics, type=Split)
        split = splits.setdefault(shard.split, Split())
        added.shards[0].file = f"{shard.split}-{len(split.shards):05d}.array_record"
        files[added.shards[0].file] = f"shards/{shard.key}.array_record"
        _merge(split, added)
    for name, split in splits.items():
        split.groups = groups[name]
    # Splits are made of whole groups.
    manifest = Manifest(
        source=source,
        groups_in_several_splits=0,
        splits=splits,
        counts=dict(sorted(counts.items())),
    )
    with work.scratch() as folder:
        sources = pq.ParquetWriter(folder / SOURCES, _SOURCES, compression="zstd")
        with sources:
            for shard in shards:
                for batches in batched(_sources(work, shard.key), _ROWS_TOGETHER):
                    sources.write_table(pa.Table.from_batches(batches))
        text = msgspec.json.format(msgspec.json.encode(manifest), indent=1)
        (folder / MANIFEST).write_bytes(text)
        place = _place_locally if is_local(path) else _place_remotely
        place(work, files, folder, path)
    return manifest


def _place_locally(work: Work, files: dict[str, str], folder: Path, path: str) -> None:
    target = Path(path).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.partial-*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        for name, shard in files.items():
            _link(work.path(shard), partial / name)
        for name in (SOURCES, MANIFEST):
            shutil.copyfile(folder / name, partial / name)
        partial.chmod(0o755)  # mkdtemp's folder is private
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _link(source: str, target: Path) -> None:
    """Gives a shard a second name where the disk allows it, else copies it."""
    if is_local(source):
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or one without links
            pass
    with open_file(source) as opened, open(target, "wb") as copy:
        shutil.copyfileobj(opened, copy, 16 * 2**20)


def _place_remotely(work: Work, files: dict[str, str], folder: Path, path: str) -> None:
    target = Work(path)
    for name, shard in files.items():
        _link(work.path(shard), folder / name)
        target.publish(folder / name, name)
        (folder / name).unlink(missing_ok=True)
    for name in (SOURCES, MANIFEST):  # the manifest last: with it the data set is there
        target.publish(folder / name, name)


def _merge(total: Split, added: Split) -> None:
    for name, count in (
        ("words_per_caption", "captions"),
        ("image_height", "records"),
        ("image_width", "records"),
    ):
        before, more = getattr(total, count), getattr(added, count)
        merged = _merge_spreads(getattr(total, name), before, getattr(added, name), more)
        setattr(total, name, merged)
    total.records += added.records
    total.captions += added.captions
    total.shards += added.shards


def _merge_spreads(first: Spread, before: int, second: Spread, more: int) -> Spread:
    if not before or not more:
        return first if before else second
    return Spread(
        min(first.least, second.least),
        (first.mean * before + second.mean * more) / (before + more),
        max(first.greatest, second.greatest),
    )
