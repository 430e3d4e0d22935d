"""Many at a time: answers stay right, too much is refused, and nothing waits for the slow."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("faiss", reason="search needs the extra `search`")
pytest.importorskip("aiohttp", reason="search needs the extra `search`")

from search_world import TEXT, Served, encoded, error

from flip_jax.search.app import Limits


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
