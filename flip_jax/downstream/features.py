"""Outputs of a frozen encoder, computed once and kept on disk.

A feature is two files in the cache folder: `<key>.npy`, and `<key>.json` with what the key stands
for and the SHA-256 of the array, written last. The key is a digest of the weights, the compute
dtype, the pictures (manifest, split, records, size) and the name of the output. A feature whose
array is not that of its JSON is made again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from flip_jax.data.records import file_sha256
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.faces import Faces

_VERSION = 1  # of what is stored; raise it when the same key would mean other numbers


class FeatureCache:
    """Features by key, in a folder that is made on first use; None keeps nothing."""

    def __init__(self, folder: Path | str | None, log: Callable[[str], None] = print):
        self.folder = None if folder is None else Path(folder)
        self._log = log

    def get(
        self, what: dict[str, Any], rows: int, parts: Callable[[], Iterable[np.ndarray]]
    ) -> np.ndarray:
        """The array of a key, computed if it is not there.

        Args:
          what: identifies the array; JSON types, e.g. {"output": "embed", "digest": ...}.
          rows: its length.
          parts: makes it, in pieces along the first axis; called only if needed.

        Returns:
          A read-only array [rows, ...], mapped from disk where there is a folder.

        Raises:
          OSError: the folder cannot be written.
          ValueError: `parts` gives another number of rows, or values that are not finite.
        """
        if self.folder is None:
            return _joined(parts(), rows, what)
        what = what | {"version": _VERSION}
        key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
        array, about = self.folder / f"{key}.npy", self.folder / f"{key}.json"
        if (found := self._read(array, about, rows)) is not None:
            return found
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{key}.{os.getpid()}.partial"
        try:
            _write(partial, parts(), rows, what)
            described = {"what": what, "sha256": file_sha256(partial)}
            os.replace(partial, array)
            partial.write_text(json.dumps(described, indent=1), encoding="utf-8")
            os.replace(partial, about)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                partial.unlink()
            raise
        return np.load(array, mmap_mode="r", allow_pickle=False)

    def of_images(
        self,
        backbone: Backbone,
        faces: Faces,
        output: str,
        function: Callable[..., Any],
        finish: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> np.ndarray:
        """An output of the image tower for all pictures of `faces`, [N, ...], read-only.

        Args:
          output: names `function` and `finish` in the key.
          function: see `Backbone.map_rows`.
          finish: what is done to each batch on the host before it is stored.
        """
        what = backbone.identity | {"pictures": faces.digest, "output": output}
        return self.get(
            what, len(faces), lambda: map(finish, backbone.stream_rows(function, faces.images))
        )

    def _read(self, array: Path, about: Path, rows: int) -> np.ndarray | None:
        if not (array.is_file() and about.is_file()):
            return None
        try:
            described = json.loads(about.read_text(encoding="utf-8"))
            if described["sha256"] == file_sha256(array):
                found = np.load(array, mmap_mode="r", allow_pickle=False)
                if len(found) == rows:
                    return found
        except (ValueError, KeyError, TypeError):
            pass
        self._log(f"cached feature {array} is damaged and is made again")
        return None


def _write(path: Path, parts: Iterable[np.ndarray], rows: int, what: dict[str, Any]) -> None:
    """The array of `parts` as an .npy file, with no more in memory than one part."""
    done = 0
    with open(path, "wb") as file:
        for part in _checked(parts, what):
            if not done:
                header = {
                    "descr": np.lib.format.dtype_to_descr(part.dtype),
                    "fortran_order": False,
                    "shape": (rows, *part.shape[1:]),
                }
                np.lib.format.write_array_header_2_0(file, header)
            file.write(np.ascontiguousarray(part).data)
            done += len(part)
        file.flush()
        os.fsync(file.fileno())
    _check_rows(done, rows, what)


def _joined(parts: Iterable[np.ndarray], rows: int, what: dict[str, Any]) -> np.ndarray:
    joined = np.concatenate(list(_checked(parts, what)))
    _check_rows(len(joined), rows, what)
    joined.flags.writeable = False
    return joined


def _checked(parts: Iterable[np.ndarray], what: dict[str, Any]) -> Iterable[np.ndarray]:
    for part in parts:
        if not np.isfinite(part).all():
            raise ValueError(
                f"{what}: the encoder gives values that are not finite; are its weights, or is "
                "the compute dtype too narrow for them?"
            )
        yield part


def _check_rows(found: int, rows: int, what: dict[str, Any]) -> None:
    if found != rows:
        raise ValueError(f"{what}: {found} rows were made, not {rows}")
