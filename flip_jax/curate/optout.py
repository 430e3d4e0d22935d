"""Who does not want to be in the data: lists of urls, domains and hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

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
          ValueError: a line of the list of hashes that is none.
        """
        if self._lists:
            return
        urls = {_plain_url(line) for line in _lines(self.cfg.urls)}
        domains = {line.lower().removeprefix("*.").strip(".") for line in _lines(self.cfg.domains)}
        hashes = {line.lower() for line in _lines(self.cfg.hashes)}
        for line in hashes:
            if len(line) != 64 or set(line) - set("0123456789abcdef"):
                raise ValueError(
                    f"config.opt_out.hashes: {self.cfg.hashes} holds {line!r}; a line must be a "
                    "SHA-256 of 64 hexadecimal digits"
                )
        self._lists = {"urls": urls, "domains": domains, "hashes": hashes}

    def url_reason(self, url: str) -> str | None:
        """Why a url is out, `url` or `domain ...`; None if it is not."""
        if _plain_url(url) in self._lists["urls"]:
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
        files = (self.cfg.urls, self.cfg.domains, self.cfg.hashes)
        return fingerprint([file and digest(read_bytes(file)) for file in files])

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


def _lines(file: str | None) -> list[str]:
    if file is None:
        return []
    lines = (line.partition("#")[0].strip() for line in read_bytes(file).decode().splitlines())
    return [line for line in lines if line]


def _host(url: str) -> str:
    """Without the dot that may be at its end; empty where the url has none."""
    try:
        return (urlsplit(url).hostname or "").strip(".")
    except ValueError:  # such as half of an IPv6 address
        return ""


def _plain_url(url: str) -> str:
    """A url without what does not matter: whether it is http or https, the case of the host, its
    usual port, and the fragment, which is not sent."""
    scheme, _, rest = url.strip().partition("#")[0].partition("://")
    host, slash, path = rest.partition("/")
    port = {"http": ":80", "https": ":443"}.get(scheme.lower(), "")
    return host.lower().removesuffix(port) + slash + path
