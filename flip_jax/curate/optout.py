"""Who does not want to be in the data: lists of urls, domains and hashes."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from yarl import URL

from flip_jax.curate.config import OptOutConfig
from flip_jax.curate.stages import Sample, Stage, Tally, fingerprint
from flip_jax.curate.storage import read_bytes


class OptOut:
    """The lists of `opt_out`; pickles as their names, `load` reads them.

    Args:
      cfg: names of text files, one entry per line, `#` starts a comment.
    """

    def __init__(self, cfg: OptOutConfig):
        self.cfg = cfg
        self._lists: dict[str, set[str]] = {}

    def load(self) -> None:
        """Reads the lists, once.

        Raises:
          OSError: a list cannot be read.
          ValueError: a list that is not UTF-8, or a line that would leave nothing out.
        """
        if not self._lists:
            self._lists = {name: _entries(name, getattr(self.cfg, name)) for name in _KINDS}

    def url_reason(self, url: str) -> str | None:
        """Why a url is out, `url` or `domain ...`; None if it is not."""
        if self._lists["urls"] and _plain_url(url) in self._lists["urls"]:
            return "url"
        domains = self._lists["domains"]
        labels = _host(url).split(".") if domains else []
        for start in range(len(labels)):
            if (domain := ".".join(labels[start:])) in domains:
                return f"domain {domain}"
        return None

    def has_file(self, data: bytes) -> bool:
        """Whether a file is on the list of hashes."""
        return bool(self._lists["hashes"]) and digest(data) in self._lists["hashes"]

    def has_hash(self, digest: bytes) -> bool:
        """Whether a SHA-256 is on the list."""
        return digest.hex() in self._lists["hashes"]

    def fingerprint(self) -> str:
        self.load()
        texts = ["\n".join(sorted(self._lists[name])) for name in _KINDS]
        return fingerprint([digest(text.encode()) if text else None for text in texts])

    def __getstate__(self) -> dict:
        return {"cfg": self.cfg, "_lists": {}}


class ListedStage(Stage):
    """A stage that looks samples up in the lists."""

    def __init__(self, cfg: Any, opt_out: OptOut):
        super().__init__(cfg)
        self.opt_out = opt_out

    def setup(self) -> None:
        self.opt_out.load()


class OptOutStage(ListedStage):
    """Drops samples whose url is on a list, before anything of them is read: `opted out`."""

    name = "opt-out"

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        kept = []
        for sample in batch:
            reason = self.opt_out.url_reason(sample.url) if sample.url else None
            if reason is None:
                kept.append(sample)
            else:
                tally.drop(self.name, sample, "opted out", reason)
        return kept

    def fingerprint(self) -> str:
        return fingerprint(self.name, self.version, self.opt_out.fingerprint())


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _entries(name: str, file: str | None) -> set[str]:
    """Reads one list."""
    if file is None:
        return set()
    entry_of, wanted = _KINDS[name]
    try:
        text = read_bytes(file).decode("utf-8-sig")  # Windows puts a mark before the first line
    except UnicodeDecodeError as error:
        raise ValueError(f"config.opt_out.{name}: {file} is not UTF-8; save it as UTF-8") from error
    except OSError as error:
        raise OSError(
            f"config.opt_out.{name}: {file} cannot be read ({error}); give a text file, or None"
        ) from error
    found = set()
    for number, line in enumerate(text.splitlines(), 1):
        if line := line.partition("#")[0].strip():
            entry = entry_of(line)
            if entry is None:
                raise ValueError(
                    f"config.opt_out.{name}: {file}, line {number}, holds {line!r}; a line must be "
                    f"{wanted}"
                )
            found.add(entry)
    return found


def _plain_url(text: str) -> str | None:
    """A url as it is asked for, without what does not matter: whether it is http or https, its
    usual port, and the fragment, which is not sent. None where it is no such url."""
    try:
        url = URL(text.strip())
        port = "" if url.is_default_port() else f":{url.port}"
    except ValueError:
        return None
    if url.scheme not in ("http", "https") or not url.raw_host:
        return None
    return url.raw_host.rstrip(".") + port + url.raw_path_qs


def _domain(line: str) -> str | None:
    name = _ascii(line.removeprefix("*.").strip(".")) or ""
    return name if _HOST_NAME.fullmatch(name) else None


def _hash(line: str) -> str | None:
    return line.lower() if _SHA256.fullmatch(line) else None


def _host(url: str) -> str:
    """Without the dot that may be at its end; empty where the url has none."""
    try:
        host = urlsplit(url).hostname or ""
    except ValueError:  # such as half of an IPv6 address
        return ""
    return (_ascii(host) or host).strip(".")


def _ascii(host: str) -> str | None:
    """A host name as it is looked up, `xn--...` for letters beyond a to z; None if it is none."""
    try:
        return URL.build(scheme="http", host=host).raw_host
    except ValueError:
        return None


_HOST_NAME = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*")
_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
# For each list what a line becomes, None = it would leave nothing out, and what it must be.
_KINDS = {
    "urls": (_plain_url, "a whole url such as https://example.com/a.jpg"),
    "domains": (_domain, "a bare host name such as example.com"),
    "hashes": (_hash, "a SHA-256 of 64 hexadecimal digits"),
}
