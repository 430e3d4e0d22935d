"""Columns that results are broken down by: attributes of the records, or a table of one's own."""

from __future__ import annotations

import difflib
from pathlib import Path

import numpy as np

from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES
from flip_jax.data.tables import cell_text, read_table
from flip_jax.downstream.faces import Faces


def read_columns(by: str, faces: Faces) -> dict[str, np.ndarray]:
    """The columns that `by` names.

    Args:
      by: names with commas between: attributes (`Male,Young`), or `FILE:COLUMN` of a parquet, csv
        or jsonl table whose column `id` holds record ids (`tones.csv:skin_tone`).

    Returns:
      name -> text [N]: `yes` and `no` of an attribute, the value of a table; "" = unknown.

    Raises:
      ValueError: no such attribute, file or column, two columns of one name, or a table without a
        row for any record.
    """
    columns = {}
    for name in filter(None, (part.strip() for part in by.split(","))):
        if ":" in name:
            path, _, column = name.rpartition(":")
            found = _table_column(Path(path), column, faces)
        elif name in ATTRIBUTE_INDEX:
            column = name
            found = np.array(["no", "yes", ""])[faces.attributes[:, ATTRIBUTE_INDEX[name]]]
        else:
            near = difflib.get_close_matches(name, ATTRIBUTES, n=1, cutoff=0.5)
            guess = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(
                f"by={name}: is no attribute{guess} (flip_jax/data/attributes.py lists them); a "
                "column of a table is FILE:COLUMN"
            )
        if column in columns:
            raise ValueError(f"by={by}: two columns are called {column}; rename one of them")
        columns[column] = found
    return columns


def _table_column(path: Path, column: str, faces: Faces) -> np.ndarray:
    table = read_table(path, ("id", column))
    if missing := {"id", column} - set(table.column_names):
        raise ValueError(
            f"by={path}:{column}: the table has no column {', '.join(sorted(missing))}; it has "
            f"{', '.join(table.column_names)}"
        )
    ids, values = table["id"].to_pylist(), table[column].to_pylist()
    given = {cell_text(i): cell_text(v) for i, v in zip(ids, values, strict=True)}
    found = np.array([given.get(record, "") for record in faces.ids])
    if not (found != "").any():
        raise ValueError(
            f"by={path}:{column}: no value for any record; the column `id` must hold record ids, "
            f"such as {faces.ids[0]!r}"
        )
    return found
