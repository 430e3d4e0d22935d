"""FaceCaption-15M and LAION-Face: tables of addresses and texts without pictures, row by row.

Curation fetches the pictures. Here the tables are brought to one schema, in batches: the memory
needed does not grow with their size.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

URL_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        ("url", pa.string()),  # null: no usable address
        ("caption", pa.string()),  # describes the face; null: the data set has none
        ("alt_text", pa.string()),  # what the web page says
        ("box", pa.list_(pa.float32())),  # x0, y0, x1, y1 of the face in pixels; null: none
        ("licence", pa.string()),
    ]
)
FACE_CAPTION_SOURCE = (
    "FaceCaption-v1.parquet or FaceCaption-v2.parquet of OpenFace-CQUPT/FaceCaption-15M."
)
LAION_FACE_SOURCE = (
    "laion_face_part_00000.parquet to laion_face_part_00031.parquet, which convert_parquet.py of "
    "FacePerceiver/LAION-Face makes from laion_face_ids.pth and LAION-400M's tables."
)


def face_caption_batches(
    path: str | os.PathLike, batch_rows: int = 65_536
) -> Iterator[pa.RecordBatch]:
    """Reads FaceCaption-15M.

    Its columns are `_id`, `url`, `caption` and `laion_caption` (lists of one text) and `box` (text
    such as `[10, 20, 110, 140]`). A few urls hold more than one value, parted by a comma and a
    space: the first is taken. A box that is not four numbers becomes null.

    Args:
      path: the file, or a folder with FaceCaption-v*.parquet.
      batch_rows: rows of a batch; the last one of a row group may be smaller.

    Yields:
      Batches of `URL_SCHEMA`; `licence` is null.

    Raises:
      FileNotFoundError: nothing there; says what to download.
      ValueError: damaged, or without one of the columns.
    """
    columns = ("_id", "url", "caption", "laion_caption", "box")
    for batch in _batches(path, "FaceCaption-v*.parquet", FACE_CAPTION_SOURCE, columns, batch_rows):
        rows = len(batch)
        boxes = [_box(value) for value in batch["box"].to_pylist()]
        yield pa.record_batch(
            [
                pc.cast(batch["_id"], pa.string()),
                _address(batch["url"]),
                _first_text(batch["caption"]),
                _first_text(batch["laion_caption"]),
                pa.array(boxes, URL_SCHEMA.field("box").type),
                pa.nulls(rows, pa.string()),
            ],
            schema=URL_SCHEMA,
        )


def laion_face_batches(
    path: str | os.PathLike, batch_rows: int = 65_536
) -> Iterator[pa.RecordBatch]:
    """Reads LAION-Face: LAION-400M's columns `SAMPLE_ID`, `URL`, `TEXT` and `LICENSE`.

    `SAMPLE_ID` may be stored as float64; its value is whole. A row without one is left out.

    Args:
      path: one part, or the folder with all of them.
      batch_rows: rows of a batch; the last one of a row group may be smaller.

    Yields:
      Batches of `URL_SCHEMA`; `caption` and `box` are null.

    Raises:
      FileNotFoundError: nothing there; says what to download.
      ValueError: damaged, or without one of the columns.
    """
    columns = ("SAMPLE_ID", "URL", "TEXT", "LICENSE")
    pattern = "laion_face_part_*.parquet"
    for batch in _batches(path, pattern, LAION_FACE_SOURCE, columns, batch_rows):
        batch = batch.filter(pc.is_valid(batch["SAMPLE_ID"]))
        rows = len(batch)
        yield pa.record_batch(
            [
                pc.cast(pc.cast(batch["SAMPLE_ID"], pa.int64()), pa.string()),
                _address(batch["URL"]),
                pa.nulls(rows, pa.string()),
                pc.cast(batch["TEXT"], pa.string()),
                pa.nulls(rows, URL_SCHEMA.field("box").type),
                pc.cast(batch["LICENSE"], pa.string()),
            ],
            schema=URL_SCHEMA,
        )


def _batches(
    path: str | os.PathLike, pattern: str, source: str, columns: tuple[str, ...], rows: int
) -> Iterator[pa.RecordBatch]:
    path = Path(path)
    files = sorted(path.glob(pattern)) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise FileNotFoundError(
            f"{path if not path.is_dir() else path / pattern} is missing. Needed is {source} "
            "Nothing is downloaded."
        )
    for file in files:
        try:
            # With `pre_buffer` all row groups would be held from the start.
            with pq.ParquetFile(file, pre_buffer=False) as table:
                if missing := set(columns) - set(table.schema_arrow.names):
                    raise ValueError(
                        f"{file} has no column {', '.join(sorted(missing))}; it has "
                        f"{', '.join(table.schema_arrow.names)}"
                    )
                yield from table.iter_batches(rows, columns=list(columns))
        except pa.ArrowException as error:
            raise ValueError(f"{file} cannot be read: {error}; download it again") from error


def _address(urls: pa.Array) -> pa.Array:
    first = pc.utf8_trim_whitespace(pc.list_element(pc.split_pattern(urls, ", "), 0))
    return pc.if_else(pc.is_in(first, pa.array(["", "UNKNOWN"])), None, first)


def _first_text(texts: pa.Array) -> pa.Array:
    """The first entry of lists of strings; strings stay as they are."""
    if not pa.types.is_list(texts.type) and not pa.types.is_large_list(texts.type):
        return pc.cast(texts, pa.string())
    return pa.array([entry[0] if entry else None for entry in texts.to_pylist()], pa.string())


def _box(value: str | list | None) -> list[float] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return None
    numbers = isinstance(value, list) and len(value) == 4
    if not numbers or not all(type(number) in (int, float) for number in value):
        return None
    x0, y0, x1, y1 = value
    return [x0, y0, x1, y1] if x0 < x1 and y0 < y1 else None
