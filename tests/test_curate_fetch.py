"""Fetching from a real local server that misbehaves on purpose."""

import asyncio
import http.server
import io
import socket
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate import fetch
from flip_jax.curate.config import FetchConfig, OptOutConfig
from flip_jax.curate.fetch import Fetcher, Refused, fetch_chunk, is_public
from flip_jax.curate.optout import OptOut
from flip_jax.curate.stages import Place
from flip_jax.curate.storage import RangeReader, Work

CFG = FetchConfig(
    allow_private=True,
    host_delay_seconds=0.0,
    per_host=8,
    connect_seconds=20.0,
    read_seconds=20.0,
    total_seconds=40.0,
    retries=1,
    backoff_seconds=0.01,
    max_bytes=50_000,
    max_redirects=3,
)


def _jpeg() -> bytes:
    sink = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(sink, "JPEG")
    return sink.getvalue()


PICTURE = _jpeg()


class Handler(http.server.BaseHTTPRequestHandler):
    """One path per way of misbehaving."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            server.requests.append((time.monotonic(), self.path, dict(self.headers)))
            server.running += 1
            server.most = max(server.most, server.running)
            first = sum(path == self.path for _, path, _ in server.requests) == 1
        try:
            self.answer(self.path.split("?")[0].strip("/"), first)
        except (BrokenPipeError, ConnectionResetError):
            pass
        finally:
            with server.lock:
                server.running -= 1

    def send(self, body=PICTURE, status=200, kind="image/jpeg", length=None, **headers):
        self.send_response(status)
        if kind:
            self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)
        self.wfile.flush()

    def answer(self, name, first):
        port = self.server.server_address[1]
        moved = {
            "moved": "/ok.jpg",
            "loop": "/loop",
            "metadata": "http://169.254.169.254/latest/meta-data/",
            "neighbour": f"http://127.0.0.2:{port}/ok.jpg",
            "number": f"http://2130706434:{port}/ok.jpg",  # 127.0.0.2
            "file": "file:///etc/passwd",
        }
        if name in moved:
            self.send(b"", 302, Location=moved[name])
        elif name == "slow":
            self.server.closing.wait(30)
        elif name == "drip":
            self.send(b"", length=1000)
            while not self.server.closing.wait(0.02):
                self.wfile.write(b"x")
        elif name == "huge":
            self.send(b"x" * 60_000)
        elif name == "endless":
            self.send_response(200)
            self.send_header("Content-Type", "image/jpeg")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            while not self.server.closing.is_set():
                self.wfile.write(b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
        elif name == "short":
            self.send(PICTURE, length=len(PICTURE) + 100)
            self.close_connection = True
        elif name == "busy":
            status = {"status": 429, "Retry_After": "1"} if first else {}
            self.send(**status)
        elif name == "flaky":
            self.send(status=503 if first else 200)
        else:
            answers = {
                "ok.jpg": {},
                "bytes": {"kind": "application/octet-stream"},
                "html": {"kind": "text/html; charset=utf-8"},
                "vector": {"kind": "image/svg+xml"},
                "gone": {"status": 404},
                "closed": {"status": 429, "Retry_After": "3600"},
                "away": {"status": 429, "Retry_After": "9"},
                "noai": {"X_Robots_Tag": "noarchive, NoAI"},
                "noai-ours": {"X_Robots_Tag": "flip_jax: noai"},
                "noai-other": {"X_Robots_Tag": "otherbot: noai"},
                "reserved": {"TDM_Reservation": "1"},
                "packed": {"Content_Encoding": "gzip"},
                "empty": {"body": b""},
            }
            self.send(**answers[name])

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("0.0.0.0", 0), Handler)
        self.lock, self.closing = threading.Lock(), threading.Event()
        self.requests, self.running, self.most = [], 0, 0

    def handle_error(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()


def get(urls, cfg=CFG, opt_out=None):
    """Fetches urls at once; bodies, or (reason, detail)."""
    opt_out = OptOut(opt_out or OptOutConfig())
    opt_out.load()

    async def one(fetcher, url):
        try:
            return await fetcher.fetch(url)
        except Refused as refused:
            return refused.args

    async def every():
        fetcher = Fetcher(cfg, opt_out)
        try:
            return await asyncio.gather(*(one(fetcher, url) for url in urls))
        finally:
            await fetcher.close()

    return asyncio.run(every())


def test_pictures_come_whole(server):
    names = ("ok.jpg", "moved", "bytes", "flaky", "noai-other")
    assert get([f"{server.url}/{name}" for name in names]) == [PICTURE] * 5
    assert all(headers["User-Agent"] == "flip_jax" for _, _, headers in server.requests)
    assert not any("Cookie" in headers for _, _, headers in server.requests)


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("gone", "http status", "404"),
        ("html", "wrong type", "text/html"),
        ("vector", "wrong type", "image/svg"),
        ("packed", "wrong type", "gzip"),
        ("huge", "too large", "60000"),
        ("endless", "too large", "more than 50000"),
        ("short", "truncated", ""),
        ("empty", "empty", ""),
        ("loop", "too many redirects", "/loop"),
        ("file", "bad url", "http"),
        ("noai", "opted out", "noai"),
        ("noai-ours", "opted out", "noai"),
        ("reserved", "opted out", "tdm-reservation"),
        ("closed", "http status", "429"),
    ],
)
def test_what_is_refused_and_why(server, name, reason, detail):
    (found,) = get([f"{server.url}/{name}"])
    assert found[0] == reason
    assert detail in found[1]


def test_a_host_that_asks_to_wait_is_asked_again_after_that(server):
    assert get([f"{server.url}/busy"]) == [PICTURE]
    (first, _, _), (second, _, _) = server.requests
    assert second - first >= 0.99


def test_long_waits_and_dead_statuses_are_not_tried_again(server):
    get([f"{server.url}/closed", f"{server.url}/gone"])
    assert len(server.requests) == 2


def test_a_host_that_sends_us_away_does_not_hold_its_other_pictures(server):
    """Else each of them would wait for as long as it asks."""
    names = ("away", "ok.jpg", "gone")
    cfg = replace(CFG, per_host=1, max_wait_seconds=5.0)
    found = get([f"{server.url}/{name}" for name in names], cfg)
    assert [reason for reason, _ in found] == ["http status"] * 3
    assert all("the host said: not for" in detail for _, detail in found[1:])
    assert [path for _, path, _ in server.requests] == ["/away"]


@pytest.mark.parametrize("name", ["slow", "drip"])
def test_no_host_holds_us_for_ever(server, name):
    limits = {"read_seconds": 0.5} if name == "slow" else {"total_seconds": 0.5}
    (found,) = get([f"{server.url}/{name}"], replace(CFG, retries=0, **limits))
    assert found[0] == "timeout"


def test_dead_links_and_bad_urls_are_told():
    with socket.socket() as closed:  # bound, and not listening
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        urls = [f"http://127.0.0.1:{port}/a.jpg", "ftp://example.org/a", "http://", "no url", ""]
        urls += ["http://user:secret@127.0.0.1/a.jpg", "http://[::1/a.jpg", "http://h:99999/"]
        found = get(urls, replace(CFG, retries=0))
    assert [reason for reason, _ in found] == ["no connection"] + ["bad url"] * 7


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "[::1]", "localhost", "0.0.0.0", "2130706433", "127.1", "0x7f.1", "017700000001",
     "[::ffff:127.0.0.1]", "169.254.169.254", "10.0.0.1", "[fe80::1]", "[fd00::1]"],
)  # fmt: skip
def test_private_addresses_are_never_asked(server, host):
    port = server.server_address[1]
    cfg = replace(CFG, allow_private=False, retries=0)
    (found,) = get([f"http://{host}:{port}/ok.jpg"], cfg)
    assert found[0] == "private address"
    assert not server.requests


@pytest.fixture
def loopback_is_public(monkeypatch):
    """The server's own address counts as public, its neighbours do not."""
    monkeypatch.setattr(fetch, "is_public", lambda host: host == "127.0.0.1" or is_public(host))
    return replace(CFG, allow_private=False, retries=0)


@pytest.mark.parametrize("name", ["metadata", "neighbour", "number"])
def test_a_redirect_to_a_private_address_is_not_followed(server, loopback_is_public, name):
    (found,) = get([f"{server.url}/{name}"], loopback_is_public)
    assert found[0] == "private address"
    assert [path for _, path, _ in server.requests] == [f"/{name}"]


def test_the_address_that_was_checked_is_the_one_connected_to(
    server, loopback_is_public, monkeypatch
):
    """A name that is public when looked up first and private after that (DNS rebinding)."""
    real, answers = socket.getaddrinfo, iter(["127.0.0.1", "127.0.0.2", "127.0.0.2"])

    def rebinding(host, *args, **kwargs):
        return real(next(answers) if host == "rebind.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    port = server.server_address[1]
    url = f"http://rebind.test:{port}/ok.jpg"
    assert get([url], loopback_is_public) == [PICTURE]
    (found,) = get([url], loopback_is_public)
    assert found == ("private address", "rebind.test is 127.0.0.2")


def test_the_socket_is_the_last_check(server, monkeypatch):
    """Even if nothing before it looked."""

    async def unchecked(self, host, port=0, family=socket.AF_UNSPEC):
        return await self._resolver.resolve(host, port, family)

    monkeypatch.setattr(fetch._PublicResolver, "resolve", unchecked)
    monkeypatch.setattr(fetch, "_looks_like_address", lambda host: False)
    for host in ("localhost", "127.0.0.2", "2130706434"):
        url = f"http://{host}:{server.server_address[1]}/ok.jpg"
        (found,) = get([url], replace(CFG, allow_private=False, retries=0))
        assert found[0] in ("private address", "no connection")
    assert not server.requests


@pytest.mark.parametrize(
    ("host", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("192.168.1.1", False),
        ("100.64.0.1", False),  # carrier-grade NAT
        ("224.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("2002:0a00:0001::1", False),  # 6to4 of 10.0.0.1
        ("64:ff9b::7f00:1", False),  # NAT64 of 127.0.0.1
        ("64:ff9b::808:808", True),
        ("64:ff9b:1::7f00:1", False),  # NAT64 of a network's own
        ("::127.0.0.1", False),
        ("::ffff:0:127.0.0.1", False),
        ("fec0::1", False),  # site-local
        ("192.0.0.8", False),
        ("fe80::1%eth0", False),
        ("example.org", False),
    ],
)
def test_public_addresses(host, public):
    assert is_public(host) is public


def test_hosts_are_asked_politely(server):
    cfg = replace(CFG, per_host=2, host_delay_seconds=0.05)
    assert get([f"{server.url}/ok.jpg?{number}" for number in range(8)], cfg) == [PICTURE] * 8
    starts = sorted(start for start, _, _ in server.requests)
    assert server.most <= 2
    assert starts[-1] - starts[0] >= 7 * 0.05 * 0.9


def test_opted_out_sites_are_not_asked(server, tmp_path):
    (tmp_path / "domains").write_text("# sites\n*.0.0.1\n")
    (tmp_path / "urls").write_text(f"{server.url.upper()}/ok.jpg  # me\n")
    domains, urls = (
        OptOutConfig(domains=f"{tmp_path}/domains"),
        OptOutConfig(urls=f"{tmp_path}/urls"),
    )
    assert get([f"{server.url}/ok.jpg"], opt_out=domains) == [("opted out", "domain 0.0.1")]
    assert get([f"{server.url}/ok.jpg"], opt_out=urls) == [("opted out", "url")]
    assert get([f"{server.url}/moved"], opt_out=urls) == [("opted out", "url")]
    assert [path for _, path, _ in server.requests] == ["/moved"]


def test_a_chunk_is_fetched_once(server, tmp_path):
    work = Work(str(tmp_path / "work"))
    urls = {3: f"{server.url}/ok.jpg", 5: f"{server.url}/gone", 6: f"{server.url}/moved"}
    found = fetch_chunk(work, "key", urls, CFG, OptOut(OptOutConfig()))
    assert found[5] == ("http status", "404")
    with RangeReader() as files:
        for row in (3, 6):
            assert isinstance(found[row], Place)
            assert files.read(*found[row]) == PICTURE
    assert found[3].offset < found[6].offset  # in the order in which they are read
    asked = len(server.requests)
    assert fetch_chunk(work, "key", urls, CFG, OptOut(OptOutConfig())) == found
    assert len(server.requests) == asked
