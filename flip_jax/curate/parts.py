"""One chunk of the input through all stages: candidate records in a part of the work folder.

A part is `parts/KEY.records`, encoded candidates one after the other, and `parts/KEY.parquet`, a
row for each sample, those that were kept first. The table is published last: where it is, the part
is done. Its key is a hash of the rows and of all settings that matter, so that finished parts are
found again after a kill, and made anew after a change.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_jax.curate.config import CurateConfig
from flip_jax.curate.fetch import Fetched, fetch_chunk, fetch_fingerprint, forget_chunk
from flip_jax.curate.inputs import Chunk, read_chunk, urls_to_fetch
from flip_jax.curate.optout import OptOut
from flip_jax.curate.stages import Drop, Sample, Stage, Tally, fingerprint
from flip_jax.curate.storage import Work
from flip_jax.data.attributes import ATTRIBUTES, UNKNOWN
from flip_jax.data.records import SCHEMA_VERSION, Record, encode_record

_VERSION = 1  # of the files of a part

TABLE = pa.schema(
    [
        ("id", pa.string()),
        ("url", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
        ("stage", pa.string()),  # where the sample was dropped; null = kept, with all that follows
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("group", pa.string()),  # of the input; null where it names none
        ("number", pa.uint64()),  # hash of the id: the order of the output
        ("node", pa.uint64()),  # hash of the group, see `node_number`
        ("pixel_hash", pa.binary(32)),
        ("perceptual_hash", pa.binary(32)),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)


class Candidate(msgspec.Struct, frozen=True):
    """A record on its way to a shard, and where it is from."""

    record: bytes  # encoded
    url: str
    licence: str
    source: str
    pixel_hash: bytes


@dataclass(frozen=True)
class Part:
    """A finished chunk.

    Attributes:
      key: names its files.
      rows_key: of the chunk, a hash of its rows.
      place: file and chunk number, the order of the input.
      records: how many.
    """

    key: str
    rows_key: str
    place: tuple[int, int]
    records: int

    @property
    def table(self) -> str:
        return f"parts/{self.key}.parquet"

    @property
    def file(self) -> str:
        return f"parts/{self.key}.records"


class PartMaker:
    """Takes chunks through the stages. Pickles to workers and loads models only for new work."""

    def __init__(self, work: Work, cfg: CurateConfig, stages: Sequence[Stage]):
        self.work, self.cfg, self.stages = work, cfg, list(stages)
        self.opt_out = OptOut(cfg.opt_out)
        self.fetch_fingerprint = fetch_fingerprint(cfg.fetch, self.opt_out)
        prints = [stage.fingerprint() for stage in stages]
        self.fingerprint = fingerprint(_VERSION, SCHEMA_VERSION, self.fetch_fingerprint, prints)
        self._ready = False

    def make(self, chunk: Chunk) -> tuple[Part, dict[str, int]]:
        """Makes the part of a chunk, or finds it finished; also returns the counts of its tally."""
        key = fingerprint(self.fingerprint, chunk.key, chunk.container, chunk.stamp)
        name = f"parts/{key}.parquet"
        if not self.work.exists(name):
            self._make(chunk, key)
        facts = json.loads(self.work.schema(name).metadata[b"facts"])
        place = (chunk.file, chunk.number)
        return Part(key, chunk.key, place, facts["records"]), facts["counts"]

    def _make(self, chunk: Chunk, key: str) -> None:
        if not self._ready:
            for stage in self.stages:
                stage.setup()
            self._ready = True
        urls = urls_to_fetch(self.work, chunk)
        fetch_key = fingerprint(self.fetch_fingerprint, chunk.key)
        fetched = {}
        if urls:
            fetched = fetch_chunk(self.work, fetch_key, urls, self.cfg.fetch, self.opt_out)
        with self.work.scratch() as folder:
            with open(folder / "records", "wb") as blob:
                rows, tally = self._run(chunk, fetched, blob)
            facts = {"records": len(rows), "counts": tally.counts}
            rows += map(_dropped_row, tally.drops)
            table = pa.Table.from_pylist(rows, TABLE)
            table = table.replace_schema_metadata({"facts": json.dumps(facts, sort_keys=True)})
            pq.write_table(table, folder / "table", compression="zstd")
            self.work.publish(folder / "records", f"parts/{key}.records")
            self.work.publish(folder / "table", f"parts/{key}.parquet")
        if urls and not self.cfg.fetch.keep:
            forget_chunk(self.work, fetch_key)

    def _run(
        self, chunk: Chunk, fetched: Fetched, blob: BinaryIO
    ) -> tuple[list[dict[str, Any]], Tally]:
        """Writes the records of a chunk; returns their rows of the table."""
        tally, rows = Tally(), []
        for batch in read_chunk(self.work, chunk, self.cfg.batch_rows, fetched, tally):
            for stage in self.stages:
                tally.count(stage.name, "in", len(batch))
                batch = stage.process(batch, tally)
                tally.count(stage.name, "out", len(batch))
            for sample in batch:
                data = encode_candidate(sample)
                rows.append(_kept_row(sample, blob.tell(), len(data)))
                blob.write(data)
        return rows, tally

    def teardown(self) -> None:
        if self._ready:
            for stage in self.stages:
                stage.teardown()
        self._ready = False


def id_number(id: str) -> int:
    """Hashes an id to 64 bits. Records are put in order by it, as in a shuffle."""
    return int.from_bytes(hashlib.blake2b(id.encode(), digest_size=8).digest(), "little")


def node_number(group: str, number: int) -> int:
    """The 64 bits that stand for a group: below 2**63 for a person that the input names, above
    for a sample that is known by its id alone."""
    if group:
        return id_number(f"group:{group}") >> 1
    return number >> 1 | 1 << 63


def encode_candidate(sample: Sample) -> bytes:
    """The `Candidate` of a sample; its group is not settled yet."""
    labels = sample.attributes
    record = Record(
        id=sample.id,
        group_id=sample.group or sample.id,
        image=sample.image,
        captions=list(sample.captions),
        attributes=np.full(len(ATTRIBUTES), UNKNOWN, np.int8) if labels is None else labels,
        box=sample.box,
        landmarks=sample.landmarks,
    )
    origin = (sample.url, sample.licence, sample.source, sample.pixel_hash)
    return msgspec.msgpack.encode(Candidate(encode_record(record), *origin))


def _kept_row(sample: Sample, offset: int, size: int) -> dict[str, Any]:
    number = id_number(sample.id)
    return {
        **_origin(sample),
        "group": sample.group or None,
        "number": number,
        "node": node_number(sample.group, number),
        "pixel_hash": sample.pixel_hash,
        "perceptual_hash": sample.perceptual_hash,
        "offset": offset,
        "size": size,
    }


def _dropped_row(drop: Drop) -> dict[str, Any]:
    return {
        **_origin(drop.sample),
        "stage": drop.stage,
        "reason": drop.reason,
        "detail": drop.detail,
    }


def _origin(sample: Sample) -> dict[str, Any]:
    names = ("id", "url", "licence", "source")
    return {name: getattr(sample, name) for name in names}
