"""Where a data set is from: the counts and the source table that a build leaves beside it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from flip_jax.curate.quality.distinct import Distinct

# Names that `pipeline` and `output` write; they are not imported, because they bring Beam.
COUNTS, SOURCES = "counts.json", "sources.parquet"
STAGES = (
    *("input", "fetch", "opt-out", "read", "faces", "attributes", "captions", "rewrite"),
    *("hashes", "dedupe", "kept"),
)
_DROPPED = "dropped: "
_VALUES = 12  # of a column, most frequent first, that are listed
_REMEMBERED = 10_000  # values of a column that are counted


def place_of(count: str) -> int:
    """The place in a build of a count such as `faces/dropped: no face`."""
    stage = count.partition("/")[0]
    return STAGES.index(stage) if stage in STAGES else len(STAGES)


@dataclass(frozen=True)
class StageCounts:
    """What became of samples in one stage of a build.

    Attributes:
      went_in, went_out: samples; a picture with two faces becomes two.
      dropped: by reason.
      other: everything else that was counted, such as texts that were rewritten.
    """

    name: str
    went_in: int
    went_out: int
    dropped: dict[str, int]
    other: dict[str, int]


def read_stages(work: Path, pictures: int) -> list[StageCounts]:
    """The counts of the build that made a data set, in the order of its stages.

    Args:
      work: its work folder.
      pictures: in the data set.

    Raises:
      FileNotFoundError: no counts there.
      ValueError: they cannot be read, or are of another build.
    """
    file = work / COUNTS
    if not file.is_file():
        raise FileNotFoundError(f"--work {work}: holds no {COUNTS}; name the build's work folder")
    try:
        counts = {str(name): int(count) for name, count in json.loads(file.read_bytes()).items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} does not hold counts: {error}; run the build again") from error
    kept = sum(count for name, count in counts.items() if name.startswith("kept/"))
    if kept != pictures:
        raise ValueError(
            f"{file} is of a build that kept {kept:,} pictures, the data set has {pictures:,}; "
            "give --work the folder of the build that made it"
        )
    return _by_stage(counts)


def _by_stage(counts: dict[str, int]) -> list[StageCounts]:
    stages: dict[str, StageCounts] = {}
    passed = counts.get("input/rows", 0)
    for name in sorted({name.partition("/")[0] for name in counts}, key=lambda n: (place_of(n), n)):
        here = {what: n for (stage, _, what), n in _split(counts) if stage == name}
        drops = {what.removeprefix(_DROPPED): n for what, n in here.items() if _DROPPED in what}
        # Stages that count only what they drop take what the one before let pass.
        went_in = here.get("in", passed)
        passed = here.get("out", went_in - sum(drops.values()))
        told = {what: n for what, n in here.items() if what not in ("in", "out", "rows")}
        other = {what: n for what, n in told.items() if _DROPPED not in what}
        stages[name] = StageCounts(name, went_in, passed, drops, other)
    return list(stages.values())


def _split(counts: dict[str, int]) -> list[tuple[tuple[str, str, str], int]]:
    return [(name.partition("/"), count) for name, count in sorted(counts.items())]


@dataclass(frozen=True)
class Column:
    """Values of a column of the source table.

    Attributes:
      known: rows with a value.
      values: the most frequent ones, with their rows.
      more: whether there are others.
    """

    known: int
    values: list[tuple[str, int]]
    more: bool


@dataclass(frozen=True)
class Sources:
    """What the source table of a data set says.

    Attributes:
      rows: of the table.
      columns: `licence`, `source` and `host`, the last one taken from the urls.
      equal_pixels: records beyond the first with the same decoded pixels.
    """

    rows: int
    columns: dict[str, Column]
    equal_pixels: int


def read_sources(data: Path) -> Sources | None:
    """Reads the source table in a data set's folder, in pieces; None where there is none.

    Raises:
      ValueError: it cannot be read or lacks a column.
    """
    file = data / SOURCES
    if not file.is_file():
        return None
    counts = {name: Counter() for name in ("licence", "source", "host")}
    full: set[str] = set()
    pixels, rows = Distinct(1), 0
    try:
        # With `pre_buffer` all row groups that have been read would be held to the end.
        parquet = pq.ParquetFile(file, pre_buffer=False)
        wanted = ["url", "licence", "source", "pixel_sha256"]
        if lacking := sorted(set(wanted) - set(parquet.schema_arrow.names)):
            raise ValueError(f"no column {', '.join(lacking)}")
        for batch in parquet.iter_batches(batch_size=2**16, columns=wanted):
            rows += len(batch)
            values = {"host": [_host(url or "") for url in batch["url"].to_pylist()]} | {
                name: batch[name].to_pylist() for name in ("licence", "source")
            }
            for name, column in values.items():
                _count(counts[name], column, full, name)
            hashes = [text for text in batch["pixel_sha256"].to_pylist() if text]
            keys = np.array([int(text[:16], 16) for text in hashes], np.uint64)
            pixels.add(keys, np.zeros_like(keys), np.ones((len(keys), 1), np.int64))
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{file} is not the source table of a build: {error}") from error
    found = pixels.found()
    extra = round((found.counts[:, 0] - 1).sum() / found.share)
    return Sources(rows, {n: _column(c, n in full) for n, c in counts.items()}, extra)


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:  # such as brackets that do not close
        return ""


def _count(counter: Counter, values: list[str | None], full: set[str], name: str) -> None:
    new = Counter(value for value in values if value)
    for value, count in new.items():
        if value in counter or len(counter) < _REMEMBERED:
            counter[value] += count
        else:  # of a column with so many, those met first stand for all
            full.add(name)
            counter[""] += count


def _column(counter: Counter, full: bool) -> Column:
    known = sum(counter.values())
    named = [(value, count) for value, count in counter.items() if value]
    named.sort(key=lambda item: (-item[1], item[0]))
    return Column(known, named[:_VALUES], full or len(named) > _VALUES)
