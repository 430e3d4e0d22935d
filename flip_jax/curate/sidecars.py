"""Rows from tar shards and folders: pictures with .txt and .json files beside them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO

from flip_jax.curate.config import InputConfig
from flip_jax.curate.rows import Row, labels_of, row_of, texts_of
from flip_jax.curate.storage import open_file

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_MAX_TEXT = 2**20  # bytes of a .txt or .json file


def tar_rows(file: str, cfg: InputConfig) -> Iterator[Row]:
    """Samples of a tar file: members of one name, up to the first dot, that follow each other.

    Raises:
      ValueError: it is compressed or no tar file.
    """
    stem = PurePath(file).stem
    with open_file(file) as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        name, members = None, {}
        for member in _members(file, opened):
            folder, _, base = member.name.rpartition("/")
            key, _, kind = base.partition(".")
            if (folder, key) != name:
                if members:
                    yield _member_row(opened, f"{stem}/{name[1]}", members, size, cfg)
                name, members = (folder, key), {}
            members["." + kind.lower()] = member
        if members:
            yield _member_row(opened, f"{stem}/{name[1]}", members, size, cfg)


def _members(file: str, opened: BinaryIO) -> Iterator[tarfile.TarInfo]:
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            try:
                for member in tar:
                    if member.isreg():
                        yield member
                    tar.members = []  # else all of them are kept
            except tarfile.TarError:
                return  # the end is missing: what was killed while writing has no more
    except tarfile.TarError as error:
        raise ValueError(
            f"{file} is not a plain tar file ({error}); unpack compressed ones first"
        ) from error


def _member_row(opened: BinaryIO, id: str, members: dict, size: int, cfg: InputConfig) -> Row:
    def content(kind: str) -> bytes | None:
        member = members.get(kind)
        if member is None or member.size > _MAX_TEXT:
            return None
        place = opened.tell()
        opened.seek(member.offset_data)
        data = opened.read(member.size)
        opened.seek(place)
        return data

    row = _sidecar_row(id, content(".txt"), content(".json"), cfg)
    picture = next((members[kind] for kind in _PICTURES if kind in members), None)
    if picture is not None:
        row |= {"path": "", "offset": picture.offset_data, "size": picture.size}
        if picture.offset_data + picture.size > size:
            row["problem"] = "truncated"
    else:
        row["problem"] = "no picture"
    return row


def folder_rows(file: str, cfg: InputConfig) -> Iterator[Row]:
    """All pictures below a folder, in the order of their names."""
    root = Path(file)
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in _PICTURES and path.is_file():
            name = path.relative_to(root).as_posix()
            beside = {
                kind: _head(path.with_suffix(kind))
                for kind in (".txt", ".json")
                if path.with_suffix(kind).is_file()
            }
            row = _sidecar_row(name, beside.get(".txt"), beside.get(".json"), cfg)
            # With its size a row changes with the picture.
            yield row | {"path": name, "offset": 0, "size": path.stat().st_size}


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_MAX_TEXT)


def _sidecar_row(id: str, text: bytes | None, data: bytes | None, cfg: InputConfig) -> Row:
    """A row from what stands beside a picture."""
    try:
        cells = json.loads(data) if data else {}
    except ValueError:
        cells = None
    row = row_of(cells if isinstance(cells, dict) else {}, cfg)
    if not isinstance(cells, dict):
        row["problem"] = "bad json"
    else:
        try:
            row |= labels_of(cells)
        except ValueError:
            row["problem"] = "bad label"
    if not row["texts"] and text:
        row["texts"] = texts_of(text.decode("utf-8", "replace"))
    row["id"] = row["id"] or id
    return row
