"""Rows from tar shards and folders: pictures with .txt and .json files beside them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from flip_jax.curate.config import InputConfig
from flip_jax.curate.rows import Row, Zeros, has_zero_label, labels_of, row_of, texts_of
from flip_jax.curate.storage import open_file

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
_MAX_TEXT = 2**20  # bytes of a .txt or .json file


def tar_rows(file: str, cfg: InputConfig, name: str) -> Iterator[Row]:
    """Samples of a tar file: members of one name, up to the first dot, that follow each other.

    Args:
      name: of the file; ids begin with it.

    Raises:
      ValueError: it is compressed or no tar file.
    """
    zeros = cache(lambda: any(map(has_zero_label, _tar_cells(file))))
    with open_file(file) as opened:
        size = opened.seek(0, 2)
        opened.seek(0)
        key, members = None, {}
        for member in _members(file, opened):
            found, kind = _key_and_kind(member)
            if found != key:
                if members:
                    yield _member_row(opened, f"{name}/{key}", members, size, cfg, zeros)
                key, members = found, {}
            members[kind] = member
        if members:
            yield _member_row(opened, f"{name}/{key}", members, size, cfg, zeros)


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


def _key_and_kind(member: tarfile.TarInfo) -> tuple[str, str]:
    """Name of the sample with its folder, and what of it the member is, as `.json`."""
    path = PurePosixPath(member.name)
    stem, _, kind = path.name.partition(".")
    return (path.parent / stem).as_posix(), "." + kind.lower()


def _tar_cells(file: str) -> Iterator[Any]:
    """What the .json members hold."""
    with open_file(file) as opened:
        for member in _members(file, opened):
            if _key_and_kind(member)[1] == ".json":
                yield _cells(_content(opened, member))


def _content(opened: BinaryIO, member: tarfile.TarInfo | None) -> bytes | None:
    if member is None or member.size > _MAX_TEXT:
        return None
    place = opened.tell()
    opened.seek(member.offset_data)
    data = opened.read(member.size)
    opened.seek(place)
    return data


def _member_row(
    opened: BinaryIO, id: str, members: dict, size: int, cfg: InputConfig, zeros: Zeros
) -> Row:
    text, data = (_content(opened, members.get(kind)) for kind in (".txt", ".json"))
    row = _sidecar_row(id, text, data, cfg, zeros)
    picture = next((members[kind] for kind in _PICTURES if kind in members), None)
    if picture is not None:
        row |= {"path": "", "offset": picture.offset_data, "size": picture.size}
        if picture.offset_data + picture.size > size:
            row["problem"] = "truncated"
    else:
        row["problem"] = "no picture"
    return row


def folder_rows(file: str, cfg: InputConfig, name: str) -> Iterator[Row]:
    """All pictures below a folder, in the order of their names.

    Args:
      name: of the folder; ids begin with it. Empty where there is one folder only.
    """
    root = Path(file)
    pictures = [
        path
        for path in sorted(root.rglob("*"))
        if path.suffix.lower() in _PICTURES and path.is_file()
    ]
    zeros = cache(lambda: any(has_zero_label(_cells(_beside(one, ".json"))) for one in pictures))
    for path in pictures:
        below = path.relative_to(root).as_posix()
        text, data = (_beside(path, kind) for kind in (".txt", ".json"))
        row = _sidecar_row(f"{name}/{below}" if name else below, text, data, cfg, zeros)
        # With its size a row changes with the picture.
        yield row | {"path": below, "offset": 0, "size": path.stat().st_size}


def _beside(picture: Path, kind: str) -> bytes | None:
    path = picture.with_suffix(kind)
    if not path.is_file():
        return None
    with open(path, "rb") as file:
        return file.read(_MAX_TEXT)


def _cells(data: bytes | None) -> Any:
    """What a .json file holds; None where it is none."""
    try:
        return json.loads(data) if data else {}
    except ValueError:
        return None


def _sidecar_row(
    id: str, text: bytes | None, data: bytes | None, cfg: InputConfig, zeros: Zeros
) -> Row:
    """A row from what stands beside a picture."""
    cells = _cells(data)
    row = row_of(cells if isinstance(cells, dict) else {}, cfg)
    if not isinstance(cells, dict):
        row["problem"] = "bad json"
    else:
        try:
            row |= labels_of(cells, zeros)
        except ValueError:
            row["problem"] = "bad label"
    if not row["texts"] and text:
        row["texts"] = texts_of(text.decode("utf-8", "replace"))
    row["id"] = row["id"] or id
    return row
