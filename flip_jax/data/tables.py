"""Tables that name pictures and say what they show: .parquet, .csv and .jsonl files."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet

from flip_jax.data.attributes import ATTRIBUTES, UNKNOWN

# A sentence between quotes may hold the end of a line.
_CSV = pyarrow.csv.ParseOptions(newlines_in_values=True)
_READERS = {
    ".parquet": lambda path, texts: pyarrow.parquet.read_table(path),
    ".csv": lambda path, texts: pyarrow.csv.read_csv(
        path,
        parse_options=_CSV,
        convert_options=pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(texts, pa.string())),
    ),
    ".jsonl": lambda path, texts: pyarrow.json.read_json(path),
}


def read_table(path: Path, texts: Sequence[str] = ()) -> pa.Table:
    """Reads a .parquet, .csv or .jsonl file.

    Args:
      texts: columns of a .csv file that stay as they are written: `007` is not 7.

    Raises:
      FileNotFoundError: no such file.
      ValueError: another kind of file, one that cannot be parsed or is not UTF-8, or a column that
        is there twice.
    """
    reader = _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(f"table {path} must be one of {', '.join(_READERS)}")
    with naming_table(path):
        table = reader(str(path), texts)
        check_text(table)
    names = table.column_names
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"table {path} has columns twice: {', '.join(twice)}; rename one of each")
    return table


@contextmanager
def naming_table(path: str | Path) -> Iterator[None]:
    """Puts the name of a table before what pyarrow says of it.

    Raises:
      ValueError, OSError: as pyarrow, which does not name the file.
    """
    try:
        yield
    except FileNotFoundError:  # names it
        raise
    except (pa.ArrowException, OSError) as error:
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(f"table {path} cannot be read: {error}") from error


def check_text(table: pa.Table | pa.RecordBatch) -> None:
    """Refuses text that is not UTF-8, which pyarrow reads from .jsonl and .parquet files unseen.

    Raises:
      pa.ArrowInvalid: naming the column.
    """
    try:
        names = table.column_names
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(
            "the name of a column is not UTF-8; save the table as UTF-8"
        ) from error
    for name, column in zip(names, table.columns, strict=True):
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            if "UTF8" not in str(error):
                raise
            told = f"column {name} is not UTF-8; save the table as UTF-8"
            raise pa.ArrowInvalid(told) from error


def cell_text(value: Any) -> str:
    """A cell as text, "" where there is none; numbers that pandas made float are whole again."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)


def attribute_labels(table: pa.Table, zeros: bool | None = None) -> np.ndarray:
    """Reads the columns that are named like attributes; see `sources.build` for their coding.

    Args:
      zeros: where `table` is a piece of a larger one, whether there is any 0 in that.

    Returns:
      int8 [rows, 40]: 1 present, 0 absent, -1 unknown or no such column.

    Raises:
      ValueError: a value other than -1, 0, 1, true, false and null.
    """
    labels = np.full((len(table), len(ATTRIBUTES)), UNKNOWN, np.int8)
    known = np.zeros(labels.shape, bool)
    for index, name in enumerate(ATTRIBUTES):
        if name not in table.column_names:
            continue
        column = table[name]
        try:
            values = pc.fill_null(pc.cast(column, pa.int64()), UNKNOWN).to_numpy()
        except pa.ArrowException as error:
            raise ValueError(f"column {name}: labels must be -1, 0 or 1: {error}") from error
        strange = values[(values < -1) | (values > 1)]
        if len(strange):
            raise ValueError(f"column {name}: label {strange[0]} must be -1, 0 or 1")
        labels[:, index] = values
        known[:, index] = pc.is_valid(column).to_numpy()
    if not (np.any(labels == 0) if zeros is None else zeros):
        labels[known & (labels == -1)] = 0
    return labels
