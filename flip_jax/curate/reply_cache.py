"""Replies of a language model on disk, so that none is asked for twice."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_FILE = "replies.sqlite"
_WAIT_SECONDS = 60.0  # for other processes that write


class ReplyCache:
    """A table of replies. Several processes of one machine may share it; a kill loses nothing.

    Args:
      folder: on a local disk, since SQLite's locks do not work on network disks; made if missing.

    Raises:
      OSError: the folder or the file in it cannot be used; also from every method.
    """

    def __init__(self, folder: str):
        self.path = Path(folder, _FILE)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._plain_errors():
            self._rows = sqlite3.connect(self.path, timeout=_WAIT_SECONDS, isolation_level=None)
            self._rows.execute("PRAGMA journal_mode = WAL")
            self._rows.execute("PRAGMA synchronous = NORMAL")
            self._rows.execute(
                "CREATE TABLE IF NOT EXISTS replies (key BLOB PRIMARY KEY, reply TEXT NOT NULL) "
                "WITHOUT ROWID"
            )

    def find(self, keys: Iterable[bytes]) -> dict[bytes, str]:
        """The replies that are there, by key."""
        found, query = {}, "SELECT reply FROM replies WHERE key = ?"
        with self._plain_errors():
            for key in keys:
                if row := self._rows.execute(query, [key]).fetchone():
                    found[key] = row[0]
        return found

    def add(self, key: bytes, reply: str) -> str:
        """Stores a reply at once. Returns the one that is stored: the first for a key stays, so
        that all processes go on with the same."""
        with self._plain_errors():
            self._rows.execute("INSERT OR IGNORE INTO replies VALUES (?, ?)", [key, reply])
        return self.find([key])[key]

    def close(self) -> None:
        self._rows.close()

    @contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise OSError(
                f"config.rewrite.cache: {self.path} cannot be used: {error}; if it is damaged, "
                "delete it, and its replies are asked for again"
            ) from error
