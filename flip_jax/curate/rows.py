"""Rows of one shape from the tables that others publish."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from flip_jax.curate.config import InputConfig
from flip_jax.curate.storage import open_table
from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES
from flip_jax.data.tables import attribute_labels, cell_text, check_text, read_table

_NUMBER = re.compile(r"-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
_TEXTS = ("id", "file", "url", "text", "group", "licence", "source")
_COLUMNS = ("id", "image", "file", "url", "text", "box", "group", "licence", "source")

ROWS = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),  # the picture file itself, or
        ("path", pa.string()),  # where it is below the chunk's container, and
        ("offset", pa.int64()),  # where in that file
        ("size", pa.int64()),  # -1 = to the end
        ("url", pa.string()),
        ("texts", pa.list_(pa.string())),
        ("box", pa.list_(pa.float32())),  # corners in pixels
        ("group", pa.string()),
        ("licence", pa.string()),
        ("source", pa.string()),
        ("attributes", pa.binary()),  # int8 [40]
        ("probabilities", pa.binary()),  # float32 [40], NaN = unknown
        ("fetch", pa.bool_()),  # there is a url and no picture
        ("problem", pa.string()),  # why the row is of no use
    ]
)
Batch = pa.RecordBatch
Row = dict[str, Any]  # a row of ROWS; what is absent is null
Zeros = Callable[[], bool]  # whether any label of a folder or tar file is 0


def table_rows(file: str, cfg: InputConfig) -> Iterator[Row]:
    """Rows of a .parquet, .csv or .jsonl file.

    Raises:
      ValueError, OSError: it cannot be read or lacks a column.
    """
    if file.endswith(".parquet"):
        with open_table(file) as parquet:
            names = parquet.schema_arrow.names
            read = partial(parquet.iter_batches, cfg.chunk_rows)
            yield from _rows(file, names, lambda columns: read(columns=columns), cfg)
        return
    names = (getattr(cfg, f"{kind}_column") for kind in _TEXTS)
    table = read_table(Path(file), [name for name in names if name is not None])
    yield from _rows(
        file,
        table.column_names,
        lambda columns: table.select(columns).to_batches(max_chunksize=cfg.chunk_rows),
        cfg,
    )


def _rows(
    file: str, names: list[str], read: Callable[[list[str]], Iterable[Batch]], cfg: InputConfig
) -> Iterator[Row]:
    """Reads a table twice where there are attributes: what their -1 means says the whole of it."""
    check_columns(file, names, cfg)
    wanted, attributes = _wanted(cfg), [name for name in ATTRIBUTES if name in names]
    with _naming_labels(file):
        coding = _coding(_known(batch) for batch in read(attributes)) if attributes else None
    for batch in read(list(dict.fromkeys([*wanted, *attributes]))):
        check_text(batch)
        with _naming_labels(file):
            labels = _labels(_known(batch.select(attributes)), coding) if coding else None
        for index, cells in enumerate(batch.select(wanted).to_pylist()):
            row = row_of(cells, cfg)
            if coding is not None:
                row[coding[0]] = labels[index].tobytes()
            yield _checked(row, cfg)


@contextmanager
def _naming_labels(file: str) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def labels_of(cells: dict[str, Any], zeros: Zeros) -> Row:
    """What a .json file beside a picture says of attributes: that field of a row, if any.

    Args:
      zeros: whether any label beside the pictures of the input is 0, so that -1 is unknown; asked
        where there is a -1.

    Raises:
      ValueError: a label that a table may not have either.
    """
    named = {name: cells[name] for name in ATTRIBUTES if name in cells}
    if not named:
        return {}
    try:
        table = _known(pa.RecordBatch.from_pylist([named]))
        kind, _ = _coding([table])
        if kind == "probabilities":
            return {kind: _probabilities(table)[0].tobytes()}
        return {kind: attribute_labels(table, -1 in named.values() and zeros())[0].tobytes()}
    except pa.ArrowException as error:
        raise ValueError(f"labels {named}: {error}") from error


def has_zero_label(cells: Any) -> bool:
    """Whether a .json file beside a picture has a label that is 0; not where they are of no use."""
    if not isinstance(cells, dict):
        return False
    try:
        found = labels_of(cells, zeros=lambda: True)
    except ValueError:
        return False
    return 0 in np.frombuffer(found.get("attributes", b""), np.int8)


def _labels(table: pa.Table, coding: tuple[str, bool | None]) -> np.ndarray:
    zeros = coding[1]
    return _probabilities(table) if zeros is None else attribute_labels(table, zeros)


def _coding(tables: Iterable[pa.Table]) -> tuple[str, bool | None]:
    """How attributes are coded: ("probabilities", None) where there is a fraction among them, else
    "attributes" and whether there is any 0."""
    zeros = False
    for table in tables:
        for column in table.columns:
            if (
                pa.types.is_floating(column.type)
                and pc.any(pc.not_equal(pc.floor(column), column)).as_py()
            ):
                return "probabilities", None
        zeros |= bool(np.any(attribute_labels(table, zeros=True) == 0))
    return "attributes", zeros


def _known(batch: Batch) -> pa.Table:
    """Columns of attributes; pandas makes numbers with gaps float, gaps NaN."""
    table = pa.Table.from_batches([batch])
    for place, name in enumerate(table.column_names):
        if pa.types.is_floating(table[name].type):
            known = pc.if_else(pc.is_nan(table[name]), None, table[name])
            table = table.set_column(place, name, known)
    return table


def _probabilities(table: pa.Table) -> np.ndarray:
    """Returns float32 [N, 40], NaN = unknown."""
    found = np.full((len(table), len(ATTRIBUTES)), np.nan, np.float32)
    for name in table.column_names:
        values = table[name].cast(pa.float32()).to_numpy()
        strange = values[(values < 0) | (values > 1)]
        if len(strange):
            raise ValueError(f"column {name}: {strange[0]:g} is no probability, 0 to 1")
        found[:, ATTRIBUTE_INDEX[name]] = values
    return found


def _wanted(cfg: InputConfig) -> list[str]:
    names = (getattr(cfg, f"{kind}_column") for kind in _COLUMNS)
    return list(dict.fromkeys(name for name in names if name is not None))


def check_columns(file: str, names: list[str], cfg: InputConfig) -> None:
    """Refuses a table without one of the wanted columns: ValueError."""
    for kind in _COLUMNS:
        name = getattr(cfg, f"{kind}_column")
        if name is not None and name not in names:
            raise ValueError(
                f"config.input.{kind}_column={name!r}: {file} has no such column; it has "
                f"{', '.join(names)}"
            )


def row_of(cells: dict[str, Any], cfg: InputConfig) -> Row:
    """Reads the cells of a table row or of a .json file."""

    def cell(kind: str) -> Any:
        name = getattr(cfg, f"{kind}_column")
        return None if name is None else cells.get(name)

    row: Row = {
        "id": _text(cell("id")),
        "url": _url(cell("url")),
        "texts": texts_of(cell("text")),
        "licence": _text(cell("licence")) or cfg.licence,
        "source": _text(cell("source")) or cfg.source,
    }
    group = _text(cell("group"))
    row["group"] = cfg.group_prefix + group if group else None
    if (given := cell("box")) is not None:
        row["box"] = _box(given, cfg.box_format)
        if row["box"] is None:
            row["problem"] = "bad box"
    image = cell("image")
    row["image"] = image.get("bytes") if isinstance(image, dict) else image
    if (name := _text(cell("file"))) is not None:
        path = PurePath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            row["problem"] = "bad file name"
        row |= {"path": name, "offset": 0, "size": -1}
    return row


def _checked(row: Row, cfg: InputConfig) -> Row:
    """Gives a row an id; finds rows of no use."""
    row["fetch"] = row["image"] is None and row.get("path") is None
    if row["fetch"] and not row["url"]:
        row.setdefault("problem", "no url" if cfg.url_column else "no picture")
    if not row["id"]:
        if cfg.id_column is not None:
            row.setdefault("problem", "no id")
        if row.get("path"):
            row["id"] = row["path"]
        else:  # one picture may be there with several boxes
            seed = json.dumps([row["url"], row.get("box")]).encode() + (row["image"] or b"")
            row["id"] = hashlib.sha256(seed).hexdigest()[:32]
    return row


def _text(value: Any) -> str | None:
    return cell_text(value).strip() or None


def texts_of(value: Any) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [" ".join(text.split()) for text in values if isinstance(text, str) and text.strip()]


def _url(value: Any) -> str | None:
    """A cell of FaceCaption-15M may hold several, with ", " between, and UNKNOWN for none."""
    if not isinstance(value, str):
        return None
    return next((url for url in value.split(", ") if url.strip() not in ("", "UNKNOWN")), None)


def _box(value: Any, form: str) -> list[float] | None:
    """Four numbers, in a list or written as text, as FaceCaption-15M has them."""
    numbers = _NUMBER.findall(value) if isinstance(value, str) else value
    try:
        x0, y0, x1, y1 = (float(number) for number in numbers)
    except (TypeError, ValueError):
        return None
    if form == "size":
        x1, y1 = x0 + x1, y0 + y1
    box = [x0, y0, x1, y1]
    return box if np.isfinite(box).all() and x0 < x1 and y0 < y1 else None
