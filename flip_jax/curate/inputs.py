"""The input in chunks of rows, and the samples of a chunk."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_jax.config import to_dict
from flip_jax.curate.config import InputConfig
from flip_jax.curate.fetch import STAGE as FETCH
from flip_jax.curate.fetch import Fetched
from flip_jax.curate.rows import ROWS, Row, check_columns, table_rows
from flip_jax.curate.sidecars import folder_rows, tar_rows
from flip_jax.curate.stages import Place, Sample, Tally, batched, fingerprint
from flip_jax.curate.storage import Work, expand, is_local, open_file, open_table
from flip_jax.short_names import short_names

INPUT = "input"


@dataclass(frozen=True)
class Chunk:
    """Some consecutive rows of one input file, as `rows/KEY.parquet` of the work folder.

    Attributes:
      key: hash of the rows.
      container: folder or file that the rows' places are in; empty where they have none.
      stamp: changes with a container that is one file.
      file, number: the chunk's place in the order of the input.
      rows: how many.
    """

    key: str
    container: str
    stamp: str
    file: int
    number: int
    rows: int


def input_files(cfg: InputConfig) -> list[str]:
    """The files or folders that `input.paths` names, sorted.

    Raises:
      ValueError: a path or pattern that names nothing, or a table without a wanted column.
    """
    files: set[str] = set()
    for path in shlex.split(cfg.paths):
        folder = cfg.kind == "folder"
        found = [path] if folder and Path(path).is_dir() else [] if folder else expand(path)
        if not found:
            what = "no such folder" if folder else "no such file"
            raise ValueError(f"config.input.paths: {path}: {what}")
        files.update(found)
    if cfg.kind == "table":
        if cfg.images is not None and is_local(cfg.images) and not Path(cfg.images).is_dir():
            raise ValueError(f"config.input.images={cfg.images!r}: no such folder")
        for file in files:
            if file.endswith(".parquet"):
                with open_table(file) as table:
                    check_columns(file, table.schema_arrow.names, cfg)
            elif not is_local(file):
                raise ValueError(f"config.input.paths: {file}: not local, so it must be .parquet")
    return sorted(files)


def input_names(files: list[str], cfg: InputConfig) -> list[str]:
    """What the ids of rows begin with, for each input file or folder: its name, as much more of its
    path as tells them apart. Empty for a single folder, and for tables, whose rows have ids.

    Raises:
      ValueError: the same file or folder twice.
    """
    if cfg.kind == "table" or (cfg.kind == "folder" and len(files) == 1):
        return [""] * len(files)
    if cfg.kind == "folder":
        paths = [Path(os.path.abspath(file)).parts for file in files]
    else:
        paths = [PurePath(file).with_suffix("").parts for file in files]
    try:
        return short_names(paths, "/")
    except ValueError as error:
        raise ValueError(f"config.input.paths={cfg.paths!r}: {error}") from error


def split_input(work: Work, file: str, number: int, name: str, cfg: InputConfig) -> list[Chunk]:
    """Writes the rows of one input file into chunks; done once, remembered in the work folder.

    Args:
      name: of `input_names`.

    Raises:
      ValueError, OSError: the file cannot be read or lacks a column.
    """
    stamp = fingerprint(_stamp(file, cfg.kind))
    done = f"inputs/{fingerprint(file, stamp, name, to_dict(cfg))}.json"
    if work.exists(done):
        found = [Chunk(**{**item, "file": number}) for item in json.loads(work.read(done))]
        if all(work.exists(f"rows/{chunk.key}.parquet") for chunk in found):
            return found
    if cfg.kind == "table":
        container, found = cfg.images or "", table_rows(file, cfg)
    else:
        container, found = file, {"tar": tar_rows, "folder": folder_rows}[cfg.kind](file, cfg, name)
    chunks: list[Chunk] = []
    for rows in batched(found, cfg.chunk_rows):
        sink = BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, ROWS), sink, compression="zstd")
        data = sink.getvalue()
        key = hashlib.sha256(data).hexdigest()
        work.write(f"rows/{key}.parquet", data)
        inside = stamp if cfg.kind == "tar" else ""
        chunks.append(Chunk(key, container, inside, number, len(chunks), len(rows)))
    work.write(done, json.dumps([chunk.__dict__ for chunk in chunks]).encode())
    return chunks


def urls_to_fetch(work: Work, chunk: Chunk) -> dict[int, str]:
    """The urls of the rows that have no picture otherwise, by number of the row."""
    rows = work.table(f"rows/{chunk.key}.parquet", ["url", "fetch", "problem"]).to_pylist()
    return {
        number: row["url"] for number, row in enumerate(rows) if row["fetch"] and not row["problem"]
    }


def read_chunk(
    work: Work, chunk: Chunk, batch: int, fetched: Fetched, tally: Tally
) -> Iterator[list[Sample]]:
    """Yields the samples of a chunk in batches; rows that cannot be used go to the tally."""
    number = -1
    with open_table(work.path(f"rows/{chunk.key}.parquet")) as table:
        for rows in table.iter_batches(batch_size=batch):
            samples = []
            for row in rows.to_pylist():
                number += 1
                sample = _sample(row, chunk.container)
                tally.count(INPUT, "rows")
                found = fetched.get(number)
                if row["problem"]:
                    tally.drop(INPUT, sample, row["problem"])
                elif isinstance(found, Place):
                    samples.append(replace(sample, place=found))
                elif found is not None:
                    tally.drop(FETCH, sample, *found)
                else:
                    samples.append(sample)
            yield samples


def _sample(row: Row, container: str) -> Sample:
    place = None
    if row["path"] is not None:
        path = f"{container}/{row['path']}" if row["path"] else container
        place = Place(path, row["offset"], row["size"])
    labels, chances, box = row["attributes"], row["probabilities"], row["box"]
    return Sample(
        id=row["id"] or "",
        image=row["image"] or b"",
        place=place,
        group=row["group"] or "",
        url=row["url"] or "",
        licence=row["licence"] or "",
        source=row["source"] or "",
        texts=tuple(row["texts"] or ()),
        attributes=None if labels is None else np.frombuffer(labels, np.int8),
        probabilities=None if chances is None else np.frombuffer(chances, np.float32),
        box=None if box is None else np.array(box, np.float32),
    )


def _stamp(file: str, kind: str) -> list[Any]:
    """What tells that an input file is another one than before."""
    if kind == "folder":
        found = sorted(path for path in Path(file).rglob("*") if path.exists())  # links may dangle
        return [(str(path), path.stat().st_mtime_ns) for path in found]
    if is_local(file):
        stat = Path(file).stat()
        return [stat.st_size, stat.st_mtime_ns]
    with open_file(file) as opened:
        return [opened.seek(0, 2)]
