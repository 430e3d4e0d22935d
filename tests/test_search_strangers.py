"""Nothing that a stranger sends stops the server, and every error is clear and tells nothing."""

import base64
import contextlib
import gzip
import io
import json
import resource
import socket
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss", reason="search needs the extra `search`")
pytest.importorskip("aiohttp", reason="search needs the extra `search`")

from search_world import TEXT, Served, encoded, error, photo

from flip_jax.search import pictures
from flip_jax.search.server import host_names


def bomb(width: int, height: int) -> bytes:
    """A valid grey PNG of few bytes that is large when decoded."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = name + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(width + 1)) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    "path",
    [
        "/pictures/40",
        "/pictures/999999999999",
        "/pictures/-1",
        "/pictures/..%2f..%2fetc%2fpasswd",
        "/pictures/../../../../etc/passwd",
        "/assets/../app.py",
        "/assets/..%2fapp.py",
        "/assets/%2e%2e/%2e%2e/server.py",
        "/assets//etc/passwd",
        "/assets/",
        "/api/strokes/40",
        "/manifest.json",
        "/%00",
    ],
)
def test_addresses_lead_nowhere_else(served, path):
    """Sent as they are: a client library would tidy them up."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        answer = b"".join(iter(lambda: line.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 404") and json.loads(body)["error"]["code"] == "not_found"
    assert b"nosniff" in head


def test_bad_pictures_are_named(served, world):
    whole = world.engine.record(0).image
    png = base64.b64decode(encoded(photo(world, 0)))
    gif = io.BytesIO()
    Image.new("RGB", (40, 40)).save(gif, "GIF")
    cases = {
        b"no picture": "picture_format",
        b"": "picture_format",
        b"\xff\xd8\xff": "picture_format",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>": "picture_format",
        gif.getvalue(): "picture_format",
        whole[: len(whole) // 2]: "picture_damaged",
        png[: len(png) // 2]: "picture_damaged",
        base64.b64decode(encoded(np.zeros((4, 99, 3), np.uint8))): "picture_small",
        bomb(6000, 6000): "picture_pixels",
        bomb(60_000_000, 1): "picture_pixels",
    }
    for data, code in cases.items():
        found = served.search(picture=base64.b64encode(data).decode())
        assert error(found) == (422, code), data[:40]
    assert served.search(text=TEXT)[0] == 200


def test_a_bomb_is_not_decoded(served):
    """20,000 x 20,000 pixels in 400 KB; decoded they would be 1.2 GB."""
    data = bomb(20_000, 20_000)
    assert len(data) < 500_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    found = served.search(picture=base64.b64encode(data).decode())
    assert error(found) == (422, "picture_pixels")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before  # KB
    assert grown < 100_000 and time.monotonic() - started < 20


def test_a_body_that_is_too_large_is_refused(served):
    body = b'{"picture": "' + b"A" * (12 * 2**20) + b'"}'
    status, _, answer = served.ask("POST", "/api/search", body, Content_Type="application/json")
    assert (status, json.loads(answer)["error"]["code"]) == (413, "picture_bytes")
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(
            b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        answer = b""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(16):
                line.sendall(b"100000\r\n" + b"A" * 0x100000 + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            answer = line.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")
    # Base64 of a file just above the limit, in a body below it.
    large = base64.b64encode(bytes(pictures.MAX_BYTES + 1)).decode()
    assert error(served.search(picture=large)) == (422, "picture_bytes")


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "bad_request"),
        (b"[]", "bad_request"),
        (b"{", "bad_request"),
        (b"\xff\xfe", "bad_request"),
        (b"[" * 50_000, "bad_request"),
        (json.dumps({"text": "a" * 501}).encode(), "text_length"),
        (b'{"text": 5}', "text_length"),
        (b'{"text": "\\ud800"}', None),
        (b'{"count": 0}', "bad_request"),
        (b'{"count": 1000000}', "bad_request"),
        (b'{"face": -1}', "bad_request"),
        (b'{"face": 40}', "bad_request"),
        (b'{"face": 1e30}', "bad_request"),
        (b'{"filters": {"Tall": "yes"}}', "bad_request"),
        (b'{"filters": {"Male": "perhaps"}}', "bad_request"),
        (b'{"picture": "***"}', "bad_request"),
        (b'{"path": "/etc/passwd"}', "bad_request"),
    ],
)
def test_bad_searches_are_named(served, body, code):
    status, headers, answer = served.ask(
        "POST", "/api/search", body, Content_Type="application/json"
    )
    found = json.loads(answer)
    if code is None:  # half a character: refused or searched for, but answered
        assert status in (200, 422)
        return
    assert (status, found["error"]["code"]) == (422, code)
    assert "Traceback" not in answer.decode() and "/flip_jax" not in answer.decode()
    assert headers["Content-Type"] == "application/json"


def test_a_compressed_search_is_refused(served):
    """10 KB would pass for a small body and come out as 10 MB."""
    body = gzip.compress(json.dumps({"text": TEXT, "picture": "A" * 10_000_000}).encode())
    assert len(body) < 20_000
    headers = {"Content_Type": "application/json", "Content_Encoding": "gzip"}
    status, _, answer = served.ask("POST", "/api/search", body, **headers)
    assert (status, json.loads(answer)["error"]["message"]) == (415, "a search is not compressed")


def test_only_json_and_only_post_search(served):
    """What a form of another site could send without asking the browser first is refused."""
    for kind in (
        "text/plain",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
    ):
        status, _, body = served.ask("POST", "/api/search", b'{"text": "a"}', Content_Type=kind)
        assert status == 415 and json.loads(body)["error"]["code"] == "bad_request"
    status, headers, body = served.ask("GET", "/api/search")
    assert status == 405 and headers["Allow"] == "POST"
    assert json.loads(body)["error"]["code"] == "method"
    status, headers, _ = served.ask("OPTIONS", "/api/search", Origin="http://evil.example")
    assert status == 405 and "Access-Control-Allow-Origin" not in headers


def test_host_names_of_others_are_refused(served):
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "", "127.0.0.1:x"):
        status, _, body = served.ask("GET", "/api/info", Host=host)
        assert status == 403 and json.loads(body)["error"]["code"] == "host", host
    for host in ("localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]:8000"):
        assert served.ask("GET", "/api/info", Host=host)[0] == 200, host
    assert host_names("0.0.0.0") is None and host_names("192.0.2.1") is None
    assert "127.0.0.2" in host_names("127.0.0.2") and host_names("localhost")


def test_a_server_for_others_answers_to_any_name(world):
    with Served(world.engine, host="0.0.0.0") as server:
        assert server.ask("GET", "/api/info", Host="faces.example")[0] == 200


def test_every_answer_carries_the_headers(served):
    for method, path in (("GET", "/"), ("GET", "/pictures/0"), ("GET", "/nowhere"), ("PUT", "/")):
        headers = served.ask(method, path)[1]
        assert headers["Content-Security-Policy"].startswith(
            "default-src 'none'; script-src 'self'"
        )
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["Server"] == "flip_jax"


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 99_999 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"a: b\r\n" * 9_999 + b"\r\n",
    ],
    ids=["TLS", "version", "address", "headers"],
)
def test_garbage_instead_of_http(served, garbage):
    answer = b""
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            line.sendall(garbage)
        with contextlib.suppress(ConnectionResetError):
            answer = line.recv(65536)
    assert answer.startswith((b"HTTP/1.0 400", b"HTTP/1.1 400")) or not answer
    assert b"Traceback" not in answer and b"flip_jax/" not in answer
    assert served.search(text=TEXT)[0] == 200


def test_an_error_of_ours_says_nothing_of_the_machine(world, caplog):
    class Failing:
        index, model, rerank, counts = (
            getattr(world.engine, name) for name in ("index", "model", "rerank", "counts")
        )

        def search(self, query, picture):
            raise RuntimeError("secret of /root/place")

    with Served(Failing()) as server:
        status, body = server.search(text=TEXT)
    assert status == 500 and body["error"]["code"] == "internal"
    assert "secret" not in json.dumps(body) and "secret of /root/place" in caplog.text
