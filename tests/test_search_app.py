"""Searching over HTTP: right answers, clear errors, and nothing that a stranger sends stops it."""

import base64
import contextlib
import io
import json
import re
import resource
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from importlib import resources

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("faiss", reason="search needs the extra `search`")
pytest.importorskip("aiohttp", reason="search needs the extra `search`")

from conftest import ROOT
from search_world import RERANK, Served, cosines, make_world

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.records import BadRecord
from flip_jax.search import pictures
from flip_jax.search.app import Limits
from flip_jax.search.engine import Engine
from flip_jax.search.server import host_names

PAGE = resources.files("flip_jax.search") / "page"
TEXT = "a young man with a beard and a hat"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def served(world):
    with Served(world.engine) as server:
        yield server


def encoded(image: np.ndarray, kind: str = "PNG") -> str:
    memory = io.BytesIO()
    Image.fromarray(image).save(memory, kind)
    return base64.b64encode(memory.getvalue()).decode()


def error(found) -> tuple[int, str]:
    status, body = found
    assert body.keys() == {"error"} and body["error"]["message"]
    return status, body["error"]["code"]


def photo(world, face: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(world.engine.record(face).image)).convert("RGB"))


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


# Answers


def test_text_finds_what_comparing_with_all_finds(served, world):
    status, found = served.search(text=TEXT, count=10)
    scores = cosines(world.engine, world.engine.model.encode_text([TEXT])[0])
    assert status == 200 and (found["matching"], found["total"]) == (40, 40)
    assert [f["face"] for f in found["faces"]] == np.argsort(-scores, kind="stable")[:10].tolist()
    np.testing.assert_allclose(
        [f["cosine"] for f in found["faces"]], np.sort(-scores)[:10] * -1, atol=6e-5
    )
    assert all(face["match"] is None for face in found["faces"])
    record = world.engine.record(found["faces"][0]["face"])
    first = found["faces"][0]
    assert (first["id"], first["captions"]) == (record.id, record.captions)
    present = [
        name for name, label in zip(ATTRIBUTES, record.attributes, strict=True) if label == 1
    ]
    assert first["attributes"] == present


def test_a_photo_finds_itself(served, world):
    data = base64.b64encode(world.engine.record(7).image).decode()
    for query in ({"picture": data}, {"face": 7}, {"picture": encoded(photo(world, 7), "WEBP")}):
        status, found = served.search(**query)
        assert status == 200 and found["faces"][0]["face"] == 7
        assert found["faces"][0]["cosine"] > 0.99


def test_words_and_a_picture_together(served, world):
    model = world.engine.model
    both = model.encode_text([TEXT])[0] + model.encode_image(photo(world, 7))[0]
    scores = cosines(world.engine, both / np.linalg.norm(both))
    _, found = served.search(text=TEXT, picture=encoded(photo(world, 7)), count=40)
    given = {face["face"]: face["cosine"] for face in found["faces"]}
    np.testing.assert_allclose([given[face] for face in range(40)], scores, atol=6e-5)


@pytest.mark.parametrize(
    "filters", [{"Male": "yes"}, {"Male": "unknown"}, {"Male": "no", "Young": "yes"}]
)
def test_filters(served, world, filters):
    values = {"yes": 1, "no": 0, "unknown": -1}
    wanted = {
        face
        for face in range(40)
        if all(
            world.engine.record(face).attributes[ATTRIBUTES.index(name)] == values[state]
            for name, state in filters.items()
        )
    }
    assert 0 < len(wanted) < 40
    for query in ({"text": TEXT}, {}):
        _, found = served.search(**query, filters=filters, count=40)
        assert {face["face"] for face in found["faces"]} == wanted
        assert found["matching"] == len(wanted)


def test_filters_that_nobody_meets(served):
    status, found = served.search(
        text=TEXT, filters={"Male": "yes", "No_Beard": "unknown"}, rerank=True
    )
    assert status == 200 and found["faces"] == [] and found["matching"] == 0


def test_nothing_asked_lists_the_first(served):
    _, found = served.search(count=5)
    assert [face["face"] for face in found["faces"]] == [0, 1, 2, 3, 4]
    assert all(face["cosine"] is None for face in found["faces"])


def test_itm_puts_the_best_in_order(served, world):
    _, plain = served.search(text=TEXT, count=40)
    _, found = served.search(text=TEXT, count=40, rerank=True)
    best = [face["face"] for face in plain["faces"][:RERANK]]
    images = [world.engine.record(face).image for face in best]
    chances = dict(zip(best, world.engine.model.match(images, [TEXT] * RERANK), strict=True))
    faces = found["faces"]
    assert [f["face"] for f in faces[:RERANK]] == sorted(chances, key=chances.get, reverse=True)
    for face in faces[:RERANK]:
        assert face["match"] == pytest.approx(chances[face["face"]], abs=6e-5)
    # Behind them, as by cosine.
    assert faces[RERANK:] == plain["faces"][RERANK:]
    _, few = served.search(text=TEXT, count=2, rerank=True)
    assert few["faces"] == faces[:2]


def test_itm_of_a_picture_looks_at_captions(served, world):
    picture = photo(world, 3)
    _, found = served.search(picture=encoded(picture), rerank=True, count=RERANK)
    captions = [face["captions"][0] for face in found["faces"]]
    chances = world.engine.model.match(picture, captions)
    np.testing.assert_allclose([f["match"] for f in found["faces"]], chances, atol=6e-5)
    assert np.all(np.diff(chances) <= 1e-6)
    # The last face has no caption: it comes behind those that have one.
    _, found = served.search(face=39, rerank=True, count=RERANK)
    assert (found["faces"][-1]["face"], found["faces"][-1]["match"]) == (39, None)
    assert all(face["match"] is not None for face in found["faces"][:-1])


def test_the_page_is_told_what_the_model_does_not_see(served, world):
    _, found = served.search(text="a zyxwvut woman 微笑")
    assert found["notes"] == [{"code": "unknown_words", "words": ["zyxwvut", "微笑"]}]
    _, found = served.search(text="a woman with a hat " * 20)
    tokens = world.engine.model.tokenizer.max_length - 2
    assert found["notes"] == [{"code": "cut", "tokens": tokens}]
    assert served.search(text=TEXT)[1]["notes"] == []


def test_a_record_that_was_damaged_since_is_left_out(world, caplog):
    class Damaged:
        def __getitem__(self, number):
            if number == 2:
                raise BadRecord("/place/test-00000.array_record record 2: damaged")
            return world.engine.source[number]

    engine = Engine(world.engine.index, Damaged(), world.engine.model, RERANK)
    with Served(engine) as server:
        _, found = server.search(count=5)
        assert [face["face"] for face in found["faces"]] == [0, 1, 3, 4]
        _, found = server.search(face=2, count=40)
        assert len(found["faces"]) == 39
        status, _, body = server.ask("GET", "/pictures/2")
    assert status == 500 and b"place" not in body and "record 2: damaged" in caplog.text


def test_the_python_of_the_docs_runs(world, capsys):
    page = (ROOT / "docs" / "search.md").read_text()
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name, path in (("runs/demo/index", world.index), ("runs/demo", world.checkpoint)):
        script = script.replace(f'Path("{name}")', f'Path("{path}")')
    exec(compile(script, "search.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    chances = [float(line.split()[2]) for line in lines]
    assert len(lines) == 5 and chances == sorted(chances, reverse=True)


# Pages and pictures


def test_the_page_and_its_files(served):
    status, headers, page = served.ask("GET", "/")
    assert status == 200 and headers["Content-Type"] == "text/html; charset=utf-8"
    names = set(re.findall(rb'(?:src|href)="(/assets/[^"]+)"', page))
    assert len(names) == 3
    for name in names:
        assert served.ask("GET", name.decode())[0] == 200
    script = served.ask("GET", "/assets/app.js")[2].decode()
    for name in re.findall(r'from "\./(\w+\.js)"', script):
        status, headers, _ = served.ask("GET", f"/assets/{name}")
        assert status == 200 and headers["Content-Type"] == "text/javascript; charset=utf-8"


def test_the_page_asks_nobody_else():
    """Not one address of another host in what the server sends."""
    sent = "".join(file.read_text() for file in PAGE.iterdir())
    assert set(re.findall(r"(?:https?:)?//[\w.]+[^\s\"'<)]*", sent)) == {
        "http://www.w3.org/2000/svg"
    }


def test_all_words_are_there_in_both_languages():
    words = (PAGE / "words.js").read_text()
    english, chinese = re.search(
        r"en: \{(.*)\n  zh: \{(.*)\n\};\n\n// Group", words, re.DOTALL
    ).groups()
    keys = [re.findall(r"^ {4,6}(\w+):", part, re.MULTILINE) for part in (english, chinese)]
    assert keys[0] == keys[1] and len(keys[0]) > 50
    assert sorted(re.findall(r'^    \["(\w+)", "', words, re.MULTILINE)) == sorted(ATTRIBUTES)
    used = set(re.findall(r'data-word="(\w+)"', (PAGE / "index.html").read_text()))
    used |= set(
        re.findall(
            r"words\.(\w+)",
            "".join((PAGE / f"{name}.js").read_text() for name in ("app", "filters", "results")),
        )
    )
    assert used - set(keys[0]) == {"js"}  # of "./words.js"


def test_info_tells_the_limits_and_the_counts(served, world):
    status, _, body = served.ask("GET", "/api/info")
    info = json.loads(body)
    assert status == 200 and info["faces"] == 40 and info["limits"]["picture_bytes"] == 8 * 2**20
    assert info["attributes"]["Male"]["unknown"] == 8
    assert all(sum(counts.values()) == 40 for counts in info["attributes"].values())
    for path in (world.data, world.checkpoint, world.index):
        assert str(path) not in body.decode()


def test_pictures_are_small_jpegs_without_metadata(served, world):
    status, headers, body = served.ask("GET", "/pictures/3?v=1")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert "max-age" in headers["Cache-Control"]
    shown, kept = Image.open(io.BytesIO(body)), photo(world, 3)
    assert shown.size == (64, 64) and not shown.getexif()
    assert np.abs(np.array(shown).astype(int) - kept).mean() < 6
    large = Image.new("RGB", (900, 300), "red")
    large.getexif()[0x010F] = "a camera"
    memory = io.BytesIO()
    large.save(memory, "JPEG", exif=large.getexif())
    small = Image.open(io.BytesIO(pictures.thumbnail(memory.getvalue())))
    assert small.size == (320, 107) and not small.getexif()


def test_strokes(served, world):
    status, _, body = served.ask("GET", "/api/strokes/5")
    found, strokes = json.loads(body), world.engine.record(5).strokes
    assert status == 200 and found["size"] == 64 and len(found["strokes"]) == len(strokes) > 10
    np.testing.assert_allclose(found["strokes"][3], strokes[3], atol=0.051)


# What strangers send


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


# Many at a time


def test_fifty_at_a_time(served, world):
    texts = [
        f"a {age} {who}"
        for age in ("young", "old", "happy", "bald", "blond")
        for who in ("man", "woman")
    ]
    alone = {text: served.search(text=text, count=5)[1]["faces"] for text in texts}
    given = [texts[number % len(texts)] for number in range(200)]
    with ThreadPoolExecutor(50) as pool:
        found = list(pool.map(lambda text: served.search(text=text, count=5), given))
    assert {status for status, _ in found} == {200}
    for text, (_, answer) in zip(given, found, strict=True):
        assert answer["faces"] == alone[text]


class Held:
    """The engine, whose searches wait until they are let go."""

    def __init__(self, engine):
        self._engine, self.go, self.calls = engine, threading.Event(), []
        self.index, self.model, self.rerank = engine.index, engine.model, engine.rerank
        self.counts, self.record = engine.counts, engine.record

    def search(self, query, picture):
        self.calls.append(query.text)
        self.go.wait(30)
        return self._engine.search(query, picture)


def wait_for(condition, seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def test_too_many_are_refused_and_the_page_still_answers(world):
    held = Held(world.engine)
    with Served(held, limits=Limits(searches=3)) as server, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(server.search, text=TEXT) for _ in range(3)]
        assert wait_for(lambda: server.app.waiting == 3)
        assert error(server.search(text=TEXT)) == (503, "busy")
        body = json.dumps({"text": TEXT}).encode()
        headers = server.ask("POST", "/api/search", body, Content_Type="application/json")[1]
        assert headers["Retry-After"] == "2"
        assert server.ask("GET", "/")[0] == server.ask("GET", "/pictures/1")[0] == 200
        held.go.set()
        assert [work.result()[0] for work in waiting] == [200] * 3
        assert server.search(text=TEXT)[0] == 200


def test_what_takes_too_long_ends_and_what_waits_is_dropped(world):
    held = Held(world.engine)
    with Served(held, limits=Limits(seconds=0.5)) as server:
        with ThreadPoolExecutor(2) as pool:
            found = [
                work.result() for work in [pool.submit(server.search, text=TEXT) for _ in "12"]
            ]
        assert [error(answer) for answer in found] == [(503, "timeout")] * 2
        held.go.set()
        assert wait_for(lambda: server.search(text="next")[0] == 200)
    # One was running; the other was dropped before its turn.
    assert held.calls[0] == TEXT and set(held.calls[1:]) == {"next"}


def test_a_search_whose_page_was_closed_is_dropped(world):
    held = Held(world.engine)
    body = json.dumps({"text": "gone"}).encode()
    request = (
        b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n" % len(body)
    ) + body
    with Served(held) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.search, text=TEXT)
        assert wait_for(lambda: held.calls == [TEXT])
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as line:
            line.sendall(request)
            assert wait_for(lambda: server.app.waiting == 2)
        assert wait_for(lambda: server.app.waiting == 1)
        held.go.set()
        assert first.result()[0] == 200
        assert server.search(text="next")[0] == 200
    assert held.calls == [TEXT, "next"]


def test_slow_uploads_do_not_hold_up_searches(world):
    limits = Limits(uploads=2, seconds=20)
    head = (
        b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 1000000\r\n\r\n{"
    )
    with Served(world.engine, limits=limits) as server:
        lines = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(8)]
        for line in lines:
            line.sendall(head)
        assert server.search(text=TEXT)[0] == 200
        for line in lines:
            line.close()
        assert server.search(picture=encoded(np.zeros((300, 300, 3), np.uint8)))[0] == 200
