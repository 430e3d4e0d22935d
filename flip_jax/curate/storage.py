"""Files of a build, on a local disk or wherever Beam can write (gs://, s3://, hdfs://).

Whatever other processes may read appears whole: it is written elsewhere and published in one step.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

from flip_jax.data.tables import naming_table

_ROWS_AT_A_TIME = 2**16
_RAW = {"compression_type": CompressionTypes.UNCOMPRESSED}  # else a name in .gz is unpacked


def is_local(path: str) -> bool:
    return FileSystems.get_scheme(path) is None


def open_file(path: str) -> BinaryIO:
    """Opens a file for reading; it can seek.

    Raises:
      OSError: it is not there or cannot be read.
    """
    if is_local(path):
        return open(path, "rb")
    try:
        return FileSystems.open(path, **_RAW)
    except Exception as error:  # every file system of Beam's raises its own
        raise OSError(f"cannot open {path}: {error}") from error


@contextmanager
def open_table(path: str) -> Iterator[pq.ParquetFile]:
    """Opens a parquet file to read it in batches.

    Raises:
      OSError: it is not there or cannot be read.
      ValueError: it is no parquet file, or a damaged one.
    """
    with (
        open_file(path) as file,
        naming_table(path),
        # With `pre_buffer` all row groups that have been read would be held to the end.
        pq.ParquetFile(file, pre_buffer=False) as table,
    ):
        yield table


def read_bytes(path: str) -> bytes:
    with open_file(path) as file:
        return file.read()


class RangeReader(ExitStack):
    """Reads parts of files. The last file stays open: parts that follow each other in one file on
    a far disk come in large pieces, which each `open` would fetch anew."""

    def __init__(self) -> None:
        super().__init__()
        self._path: str | None = None
        self._file: BinaryIO | None = None

    def read(self, path: str, offset: int, size: int) -> bytes:
        """Reads `size` bytes from `offset` on; -1 = to the end.

        Raises:
          OSError: the file is not there or cannot be read.
        """
        if path != self._path:
            self.close()
            self._path = None
            self._file = self.enter_context(open_file(path))
            self._path = path
        self._file.seek(offset)
        return self._file.read(size)


def expand(pattern: str) -> list[str]:
    """The files that a path or pattern names, sorted."""
    (match,) = FileSystems.match([pattern])
    return sorted(item.path for item in match.metadata_list)


class Work:
    """The folder of a build's intermediate results.

    Attributes:
      root: folder; created when something is published.
    """

    def __init__(self, root: str):
        self.root = root

    def path(self, name: str) -> str:
        """The place of a result; `name` may contain slashes."""
        return FileSystems.join(self.root, *name.split("/"))

    def exists(self, name: str) -> bool:
        return FileSystems.exists(self.path(name))

    def read(self, name: str) -> bytes:
        return read_bytes(self.path(name))

    def table(self, name: str, columns: list[str] | None = None) -> pa.Table:
        """Reads a parquet file."""
        with open_file(self.path(name)) as file, naming_table(self.path(name)):
            return pq.read_table(file, columns=columns)

    def rows(self, name: str, columns: int) -> Iterator[np.ndarray]:
        """Yields what `write_rows` wrote, in blocks of uint64 [N, columns]."""
        with open_file(self.path(name)) as file:
            while data := file.read(8 * columns * _ROWS_AT_A_TIME):
                yield np.frombuffer(data, np.uint64).reshape(-1, columns)

    def write_rows(self, name: str, blocks: Iterable[np.ndarray]) -> None:
        """Writes blocks of uint64 [N, columns], of any number."""
        with self.scratch() as folder:
            with open(folder / "rows", "wb") as file:
                for rows in blocks:
                    file.write(np.ascontiguousarray(rows, np.uint64))
            self.publish(folder / "rows", name)

    def schema(self, name: str) -> pa.Schema:
        with open_file(self.path(name)) as file, naming_table(self.path(name)):
            return pq.read_schema(file)

    def remove(self, name: str) -> None:
        if self.exists(name):
            FileSystems.delete([self.path(name)])

    def remove_folder(self, name: str) -> None:
        if files := expand(self.path(name) + "/*"):
            FileSystems.delete(files)

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new local folder, removed at the end; what a kill leaves goes with `clear_scratch`."""
        parent = self._scratch()
        if parent is not None:
            parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def clear_scratch(self) -> None:
        if (parent := self._scratch()) is not None:
            shutil.rmtree(parent, ignore_errors=True)

    def _scratch(self) -> Path | None:
        """On the same disk as the results, so that publishing is a rename."""
        return Path(self.root, "scratch") if is_local(self.root) else None

    def publish(self, file: Path, name: str) -> None:
        """Moves a finished file from `scratch` to its place; replaces what is there."""
        target = self.path(name)
        if is_local(target):
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            with open(file, "rb") as written:  # or a crash of the machine leaves an empty file
                os.fsync(written.fileno())
            os.replace(file, target)
            return
        with open(file, "rb") as source, FileSystems.create(target, **_RAW) as sink:
            shutil.copyfileobj(source, sink, 16 * 2**20)

    def write(self, name: str, data: bytes) -> None:
        with self.scratch() as folder:
            (folder / "data").write_bytes(data)
            self.publish(folder / "data", name)
