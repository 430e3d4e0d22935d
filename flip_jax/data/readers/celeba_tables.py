"""The text tables of CelebA, which CelebA-HQ and the caption data sets on them also use."""

from __future__ import annotations

from collections.abc import Container, Sequence
from pathlib import Path

import numpy as np

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.readers.reader import table_lines

_PARTITION = {"0": "train", "1": "val", "2": "test"}


def read_partition(path: Path) -> dict[str, str]:
    """Reads `list_eval_partition.txt`: the split, `train`, `val` or `test`, by picture."""
    splits = _read_pairs(path)
    for name, value in splits.items():
        if value not in _PARTITION:
            raise ValueError(f"{path}: partition {value!r} of {name} must be 0, 1 or 2")
    return {name: _PARTITION[value] for name, value in splits.items()}


def read_identities(path: Path) -> dict[str, str]:
    """Reads `identity_CelebA.txt`: the group id, such as `celeba:2880`, by picture."""
    return {name: f"celeba:{identity}" for name, identity in _read_pairs(path).items()}


def read_attributes(path: Path, wanted: Container[str]) -> dict[str, np.ndarray]:
    """Reads `list_attr_celeba.txt` or `CelebAMask-HQ-attribute-anno.txt`.

    Returns:
      int8 [40] by picture: 1 present, 0 absent (the file has -1).
    """
    labels = read_numbers(path, ATTRIBUTES, wanted)
    for name, row in labels.items():
        if (strange := row[np.abs(row) != 1]).size:
            raise ValueError(f"{path}: label {strange[0]} of {name} must be -1 or 1")
    return {name: (row == 1).astype(np.int8) for name, row in labels.items()}


def read_numbers(
    path: Path, columns: Sequence[str], wanted: Container[str]
) -> dict[str, np.ndarray]:
    """Reads a table that begins with the number of rows and the names of its columns.

    Args:
      path: e.g. `list_bbox_celeba.txt`.
      columns: names the second line must end with; some files name the picture's column too.
      wanted: pictures whose rows are returned.

    Returns:
      int32 [len(columns)] by picture.

    Raises:
      ValueError: cut off, other columns, or a row of another length or with something else than
        whole numbers; names the line.
    """
    lines = table_lines(path)
    _, (count, *_) = next(lines, (1, ["nothing"]))
    _, header = next(lines, (2, []))
    if not count.isdecimal() or header[-len(columns) :] != list(columns):
        raise ValueError(
            f"{path} must begin with the number of its rows and the columns "
            f"{' '.join(columns)}; it begins with {count!r} and {' '.join(header)!r}"
        )
    rows, found = 0, {}
    for line, (name, *values) in lines:
        rows += 1
        if len(values) != len(columns):
            raise ValueError(f"{path} line {line}: {len(values)} values, not {len(columns)}")
        if name in wanted:
            try:
                found[name] = np.array([int(value) for value in values], np.int32)
            except ValueError as error:
                raise ValueError(f"{path} line {line}: {error}") from error
    if rows != int(count):
        raise ValueError(f"{path} has {rows} rows and says it has {count}; download it again")
    return found


def read_hq_mapping(path: Path) -> dict[int, str]:
    """Reads `CelebA-HQ-to-CelebA-mapping.txt`: CelebA's picture by number in CelebA-HQ."""
    mapping = {}
    for line, words in table_lines(path):
        if line == 1:  # idx orig_idx orig_file
            continue
        if len(words) != 3 or not words[0].isdecimal():
            raise ValueError(f"{path} line {line}: must be idx, orig_idx and orig_file")
        mapping[int(words[0])] = words[2]
    return mapping


def pick(table: dict, names: Sequence, path: Path) -> list:
    """Returns the rows of `names`.

    Raises:
      ValueError: one is not in the table.
    """
    try:
        return [table[name] for name in names]
    except KeyError as error:
        raise ValueError(f"{path} has no row for {error.args[0]}; download it again") from None


def _read_pairs(path: Path) -> dict[str, str]:
    pairs = {}
    for line, words in table_lines(path):
        if len(words) != 2:
            raise ValueError(f"{path} line {line}: {len(words)} words, must be picture and value")
        pairs[words[0]] = words[1]
    return pairs
