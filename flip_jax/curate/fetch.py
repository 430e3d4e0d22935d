"""Fetching pictures of the web: polite to hosts, closed to private addresses, never fatal."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, BinaryIO

import aiohttp
import pyarrow as pa
import pyarrow.parquet as pq
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from flip_jax.curate.config import FetchConfig
from flip_jax.curate.optout import OptOut
from flip_jax.curate.retries import retry_after
from flip_jax.curate.stages import Place, fingerprint
from flip_jax.curate.storage import Work

_REDIRECTS = (301, 302, 303, 307, 308)
_AGAIN = (429, 500, 502, 503, 504)  # may go well later
# Many hosts call every file that; what the bytes are is seen when the picture is read.
_UNNAMED_TYPES = ("application/octet-stream", "binary/octet-stream", "")
_HOSTS = 10_000  # whose last visit is remembered
# Directives of X-Robots-Tag that have a value; any other word before a colon names a robot.
_WITH_VALUE = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")

STAGE = "fetch"
_VERSION = 1  # of what is in the work folder
_TABLE = pa.schema(
    [
        ("row", pa.int64()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("reason", pa.string()),  # null where the picture was fetched
        ("detail", pa.string()),
    ]
)
# By number of the row in its chunk: where the picture is, or (reason, detail).
Fetched = dict[int, Place | tuple[str, str]]


def fetch_fingerprint(cfg: FetchConfig, opt_out: OptOut) -> str:
    """Identifies the settings that decide which pictures are had."""
    parts = (cfg.max_bytes, cfg.opt_out_tags, opt_out.fingerprint())
    return fingerprint(STAGE, _VERSION, *parts)


def fetch_chunk(
    work: Work, key: str, urls: dict[int, str], cfg: FetchConfig, opt_out: OptOut
) -> Fetched:
    """Fetches the pictures of a chunk to the work folder, once.

    Args:
      key: names the result.
      urls: by row.
    """
    pictures, table = f"fetched/{key}.pictures", f"fetched/{key}.parquet"
    if not (work.exists(table) and work.exists(pictures)):
        opt_out.load()
        with work.scratch() as folder:
            with open(folder / "spool", "w+b") as spool, open(folder / "pictures", "wb") as ordered:
                rows = asyncio.run(_fetch_all(urls, spool, cfg, opt_out))
                _put_in_order(rows, spool, ordered)
            pq.write_table(pa.Table.from_pylist(rows, _TABLE), folder / "table")
            work.publish(folder / "pictures", pictures)
            work.publish(folder / "table", table)  # last: with it the chunk is done
    return {
        row["row"]: (row["reason"], row["detail"])
        if row["reason"]
        else Place(work.path(pictures), row["offset"], row["size"])
        for row in work.table(table).to_pylist()
    }


def _put_in_order(rows: list[dict[str, Any]], spool: BinaryIO, ordered: BinaryIO) -> None:
    """Copies pictures, which came in any order, in that of their rows, in which they are read: a
    file on a far disk is then read from one end to the other."""
    for row in rows:
        if "size" in row:
            spool.seek(row["offset"])
            row["offset"] = ordered.tell()
            ordered.write(spool.read(row["size"]))


def forget_chunk(work: Work, key: str) -> None:
    """Removes the pictures that `fetch_chunk` left."""
    work.remove(f"fetched/{key}.pictures")


async def _fetch_all(
    urls: dict[int, str], spool: BinaryIO, cfg: FetchConfig, opt_out: OptOut
) -> list[dict[str, Any]]:
    # Names are looked up in threads, of which asyncio has next to none.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(cfg.concurrency))
    fetcher = Fetcher(cfg, opt_out)

    async def one(row: int, url: str) -> dict[str, Any]:
        try:
            data = await fetcher.fetch(url)
        except Refused as refused:
            reason, detail = refused.args
            return {"row": row, "reason": reason, "detail": detail[:200]}
        offset = spool.tell()
        spool.write(data)
        return {"row": row, "offset": offset, "size": len(data)}

    try:
        return await asyncio.gather(*(one(row, url) for row, url in urls.items()))
    finally:
        await fetcher.close()


class Refused(Exception):
    """A picture that cannot be had; args: reason, detail."""


class _TryAgain(Refused):
    """What may go well later; `wait` is what the host asked for, in seconds."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0):
        super().__init__(reason, detail)
        self.wait = wait


class Fetcher:
    """One HTTP client for all requests of a process; made and used in one event loop.

    A request goes to the very address that was checked, at every redirect: nothing is looked up
    a second time.
    """

    def __init__(self, cfg: FetchConfig, opt_out: OptOut):
        self.cfg, self.opt_out = cfg, opt_out
        self._robot = cfg.user_agent.replace("/", " ").split()[0].lower()
        self._tags = cfg.opt_out_tags.lower().split()
        self._free = asyncio.Semaphore(cfg.concurrency)
        self._hosts: OrderedDict[str, _Host] = OrderedDict()
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=cfg.concurrency,
                resolver=None if cfg.allow_private else _PublicResolver(),
                socket_factory=None if cfg.allow_private else _public_socket,
            ),
            timeout=aiohttp.ClientTimeout(
                total=None, sock_connect=cfg.connect_seconds, sock_read=cfg.read_seconds
            ),
            headers={"User-Agent": cfg.user_agent, "Accept": "image/*"},
            skip_auto_headers=("Accept-Encoding",),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a small body could become a huge one
        )

    async def close(self) -> None:
        await self._session.close()

    async def fetch(self, url: str) -> bytes:
        """Returns the body behind a url, after redirects and retries.

        Raises:
          Refused: it cannot be had. Reasons: `bad url`, `opted out`, `no such host`, `private
            address`, `no connection`, `timeout`, `http status`, `too many redirects`,
            `wrong type`, `too large`, `truncated`, `empty`.
        """
        attempt = 0
        while True:
            try:
                return await self._follow(url)
            except _TryAgain as error:
                wait = max(error.wait, self.cfg.backoff_seconds * 2**attempt)
                if attempt == self.cfg.retries or wait > self.cfg.max_wait_seconds:
                    raise Refused(*error.args) from error
            await asyncio.sleep(wait)
            attempt += 1

    async def _follow(self, text: str) -> bytes:
        for _ in range(self.cfg.max_redirects + 1):
            url = self._checked(text)
            async with self._turn(url.host), self._free:
                found = await self._request(url)
            if isinstance(found, bytes):
                return found
            text = found
        raise Refused("too many redirects", text)

    def _checked(self, text: str) -> URL:
        try:
            url = URL(text)
            host, port = url.host, url.port
        except ValueError as error:
            raise Refused("bad url", str(error)) from error
        if url.scheme not in ("http", "https") or not host or not port or url.user is not None:
            raise Refused("bad url", "must be http(s)://host/..., without user name")
        if reason := self.opt_out.url_reason(text):
            raise Refused("opted out", reason)
        # Names are checked when they are looked up.
        if not self.cfg.allow_private and _looks_like_address(host) and not is_public(host):
            raise Refused("private address", host)
        return url

    async def _request(self, url: URL) -> bytes | str:
        """One request; returns the body, or where the host sends us."""
        try:
            async with (
                asyncio.timeout(self.cfg.total_seconds),
                self._session.get(url, allow_redirects=False) as response,
            ):
                return await self._read(response)
        except TimeoutError as error:  # aiohttp's are of this type too
            raise _TryAgain("timeout", str(error) or "of the whole request") from error
        except aiohttp.ClientConnectorDNSError as error:
            kind = _TryAgain if error.os_error.errno == socket.EAI_AGAIN else Refused
            raise kind("no such host", str(url.host)) from error
        except aiohttp.ClientPayloadError as error:
            raise _TryAgain("truncated", str(error)) from error
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise _TryAgain("no connection", f"{type(error).__name__}: {error}") from error

    async def _read(self, response: aiohttp.ClientResponse) -> bytes | str:
        headers, status = response.headers, response.status
        if status in _REDIRECTS and "Location" in headers:
            try:
                return str(response.url.join(URL(headers["Location"])))
            except ValueError as error:
                raise Refused("bad url", str(error)) from error
        if status in _AGAIN:
            wait = retry_after(headers.get("Retry-After", ""))
            self._hosts[response.url.host].retry_after(wait, self.cfg.max_wait_seconds)
            raise _TryAgain("http status", str(status), wait)
        if status != 200:
            raise Refused("http status", str(status))
        if tag := self._opted_out(headers):
            raise Refused("opted out", tag)
        kind = headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if not (kind.startswith("image/") or kind in _UNNAMED_TYPES) or kind == "image/svg+xml":
            raise Refused("wrong type", kind)
        if (coding := headers.get("Content-Encoding", "identity").lower()) != "identity":
            raise Refused("wrong type", f"{kind} in {coding}, which was not asked for")
        if (response.content_length or 0) > self.cfg.max_bytes:
            raise Refused("too large", f"{response.content_length} bytes")
        body = bytearray()
        async for data in response.content.iter_any():
            body += data
            if len(body) > self.cfg.max_bytes:
                raise Refused("too large", f"more than {self.cfg.max_bytes} bytes")
        if not body:
            raise Refused("empty", "")
        return bytes(body)

    def _opted_out(self, headers: Any) -> str | None:
        """The first wish of the host to be left out, if any."""
        if headers.get("tdm-reservation", "").strip() == "1":
            return "tdm-reservation"
        for value in headers.getall("X-Robots-Tag", ()):
            robot, colon, rest = value.partition(":")
            if colon and "," not in robot and robot.strip().lower() not in _WITH_VALUE:
                if robot.strip().lower() != self._robot:
                    continue
                value = rest
            for tag in value.split(","):
                if tag.strip().lower() in self._tags:
                    return tag.strip().lower()
        return None

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """Waits until a request to the host may start, holds its place until it is done."""
        host = self._hosts.setdefault(name, _Host(self.cfg.per_host))
        self._hosts.move_to_end(name)
        host.users += 1
        try:
            async with host.free:
                while (wait := host.next_start - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                if (wait := host.closed_until - time.monotonic()) > 0:
                    raise Refused("http status", f"the host said: not for another {wait:.0f} s")
                host.pause(self.cfg.host_delay_seconds)
                yield
        finally:
            host.users -= 1
            if len(self._hosts) > _HOSTS and not next(iter(self._hosts.values())).users:
                self._hosts.popitem(last=False)


class _Host:
    """How often one host is asked."""

    def __init__(self, at_a_time: int):
        self.free = asyncio.Semaphore(at_a_time)
        self.next_start = 0.0  # of time.monotonic(), as the next
        self.closed_until = 0.0  # it asked for a longer wait than we are ready for
        self.users = 0  # requests that wait or run

    def pause(self, seconds: float) -> None:
        self.next_start = max(self.next_start, time.monotonic() + seconds)

    def retry_after(self, seconds: float, longest: float) -> None:
        """Stays away for what the host asks for; where that is too long, from all its pictures,
        lest each of them waits for it."""
        if seconds <= longest:
            self.pause(seconds)
        else:
            self.closed_until = max(self.closed_until, time.monotonic() + seconds)


class _PublicResolver(AbstractResolver):
    """Looks names up; refuses one that has any address that is not public."""

    def __init__(self) -> None:
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        for address in found:
            if not is_public(address["host"]):
                raise Refused("private address", f"{host} is {address['host']}")
        return found

    async def close(self) -> None:
        await self._resolver.close()


def _public_socket(info: tuple) -> socket.socket:
    """The last check, of the very address that is connected to."""
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise Refused("private address", str(address[0]))
    return socket.socket(family, kind, protocol)


def is_public(host: str) -> bool:
    """Whether an IP address is one of the public internet; what is no address is not."""
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if not address.is_global or address.is_multicast:
        return False
    if isinstance(address, ipaddress.IPv4Address):
        return address not in _PROTOCOLS
    if address in _NAT64:  # leads on to an IPv4 address, as 6to4 does
        return is_public(str(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)))
    if address not in _UNICAST:  # site-local, IPv4 in one of its other disguises
        return False
    return address.sixtofour is None or is_public(str(address.sixtofour))


# Python counts some of what lies outside of these, and of the first, as global.
_PROTOCOLS = ipaddress.IPv4Network("192.0.0.0/24")
_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")


def _looks_like_address(host: str) -> bool:
    """Whether it may be connected to without being looked up, `2130706433` and `127.1` included."""
    return ":" in host or host.replace(".", "").isdigit()
