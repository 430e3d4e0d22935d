"""Rewriting by a language model, against a server that misbehaves."""

import dataclasses
import email.utils
import json
import logging
import pickle
import time

import pytest

pytest.importorskip("aiohttp", reason="rewriting needs the extra `curate`")

from chat_server import ChatServer, good, said
from rewrite_run import CFG, MAN, WOMAN, rewritten, run, texts

from flip_jax.curate import chat_client
from flip_jax.curate.retries import retry_after
from flip_jax.curate.rewrite import RewriteStage
from flip_jax.curate.stages import Sample, Tally


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(chat_client, "_BACKOFF_SECONDS", 0.01)


RATE = (429, {"Retry-After": "1"}, b'{"error": "slow down"}')


def test_429_with_retry_after(tmp_path):
    with ChatServer(lambda n, payload: RATE if n == 0 else good(payload)) as server:
        start = time.monotonic()
        found, tally = run(server, tmp_path, [MAN])
    assert time.monotonic() - start >= 1
    assert found == [(rewritten(MAN),)] and len(server.requests) == 2
    assert tally == {"captions": 1, "rewritten": 1}


def test_a_longer_wait_than_allowed_is_not_waited_for(tmp_path):
    late = (503, {"Retry-After": "3600"}, b"")
    with ChatServer(lambda n, payload: late) as server:
        found, tally = run(server, tmp_path, [MAN])
    assert found == [(MAN,)] and len(server.requests) == 1
    assert tally == {"captions": 1, "kept": 1, "unanswered: http status": 1}


def test_retry_after_is_a_number_or_a_date():
    assert retry_after(" 7 ") == 7 and retry_after("soon") == retry_after("") == 0
    date = email.utils.formatdate(time.time() + 90, usegmt=True)
    assert 80 < retry_after(date) <= 90
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0


@pytest.mark.parametrize(
    "bad",
    [
        (500, {}, b"<html>oops</html>"),
        (502, {}, b""),
        b"not json",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"choices": {}}',
        b'{"choices": []}',
        b'{"choices": [{"text": "completions, not chat"}]}',
        b'{"choices": [{"message": {"content": 3}}]}',
        said(None),
        said(" \n"),
        json.dumps({"choices": json.loads(good({"messages": [{"content": MAN}]}))["choices"] * 2}),
        "reset",
    ],
)
def test_faults_that_pass(tmp_path, bad):
    bad = bad.encode() if isinstance(bad, str) and bad.startswith("{") else bad
    with ChatServer(lambda n, payload: bad if n < 2 else good(payload)) as server:
        found, tally = run(server, tmp_path, [MAN])
    assert found == [(rewritten(MAN),)] and len(server.requests) == 3
    assert tally == {"captions": 1, "rewritten": 1}


@pytest.mark.parametrize(
    ("bad", "reason", "requests"),
    [
        ((500, {}, b"oops"), "http status", 4),
        (b"not json", "bad answer", 4),
        (b'{"choices": []}', "bad answer", 4),
        (said(""), "empty answer", 4),
        ("reset", "no connection", 4),
        ((400, {}, b'{"error": "too many tokens"}'), "refused", 1),
        ((302, {"Location": "http://127.0.0.1:9/"}, b""), "refused", 1),
        (said(MAN, "length"), "cut off", 1),
        (said("x" * 2**21), "too long", 1),
    ],
)
def test_faults_that_stay(tmp_path, bad, reason, requests):
    """The caption of the grammar stays, the reason is counted, other captions are rewritten."""

    def behave(number, payload):
        return bad if payload["messages"][-1]["content"] == MAN else good(payload)

    with ChatServer(behave) as server:
        found, tally = run(server, tmp_path, [MAN, WOMAN], [MAN])
    assert found == [(MAN, rewritten(WOMAN)), (MAN,)]
    assert server.texts().count(MAN) == requests
    assert tally == {"captions": 3, "kept": 2, "rewritten": 1, f"unanswered: {reason}": 2}
    with ChatServer() as server:  # what failed is not remembered
        found, _ = run(server, tmp_path, [MAN])
    assert found == [(rewritten(MAN),)]


@pytest.mark.parametrize("silence", ["drip", None])
def test_timeouts(tmp_path, silence):
    """Also of an answer that keeps coming, a byte at a time."""

    def behave(number, payload):
        if silence is None:
            time.sleep(2)
        return silence

    with ChatServer(behave) as server:
        start = time.monotonic()
        found, tally = run(server, tmp_path, [MAN], timeout_seconds=0.5, retries=1)
    assert 1 <= time.monotonic() - start < 20
    assert found == [(MAN,)] and len(server.requests) == 2
    assert tally == {"captions": 1, "kept": 1, "unanswered: timeout": 1}


def test_a_server_that_is_down_stops_the_build(tmp_path):
    with ChatServer() as server:
        url = server.url
    stage = RewriteStage(dataclasses.replace(CFG, url=url, retries=0), str(tmp_path / "replies"))
    stage.setup()
    batch = [Sample("a", captions=tuple(texts(30)))]
    with pytest.raises(OSError, match=r"20 requests in a row came to nothing.*no connection"):
        stage.process(batch, Tally())


def test_few_failures_in_a_row_do_not_stop_the_build(tmp_path):
    """Counted over batches, from the last success on."""
    with ChatServer(lambda n, p: (500, {}, b"") if n % 19 else good(p)) as server:
        cfg = dataclasses.replace(CFG, url=server.url, retries=0, concurrency=1)
        stage = RewriteStage(cfg, str(tmp_path / "replies"))
        stage.setup()
        for n in range(0, 60, 6):
            stage.process([Sample("a", captions=tuple(texts(60)[n : n + 6]))], Tally())
        server.behave = lambda n, p: (500, {}, b"")
        with pytest.raises(OSError, match="20 requests in a row"):
            for n in range(0, 60, 6):
                stage.process([Sample("a", captions=tuple(texts(60, 1)[n : n + 6]))], Tally())


@pytest.mark.parametrize(("status", "field"), [(401, "key_variable='SOME_KEY'"), (404, "model=")])
def test_what_no_retry_mends_stops_the_build(tmp_path, monkeypatch, status, field, caplog):
    """And the key is in no message, though the server repeats it."""
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    caplog.set_level(logging.DEBUG)
    body = b'{"error": "Incorrect API key: Bearer sk-secret"}'
    with (
        ChatServer(lambda n, payload: (status, {}, body)) as server,
        pytest.raises(ValueError, match=field) as info,
    ):
        run(server, tmp_path, [MAN], key_variable="SOME_KEY")
    assert len(server.requests) == 1
    assert "Bearer ***" in str(info.value)
    assert "sk-secret" not in str(info.value)
    assert "sk-secret" not in caplog.text


def test_the_key_goes_nowhere_else(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "sk-secret")
    with ChatServer(lambda n, p: (500, {}, b"sk-secret") if n == 0 else good(p)) as server:
        cfg = dataclasses.replace(CFG, url=server.url, key_variable="SOME_KEY")
        stage = RewriteStage(cfg, str(tmp_path / "replies"))
        stage.setup()
        stage.process([Sample("a", captions=(MAN,))], Tally())
        stage.teardown()
    stored = b"".join(path.read_bytes() for path in (tmp_path / "replies").iterdir())
    assert MAN.encode() in stored
    for place in (stored, pickle.dumps(stage), stage.fingerprint().encode(), repr(stage).encode()):
        assert b"sk-secret" not in place


@pytest.mark.parametrize("value", [None, "", "sk\nX-Header: 1", "schlüssel"])
def test_a_key_that_is_none(tmp_path, monkeypatch, value):
    monkeypatch.delenv("SOME_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEY", value)
    stage = RewriteStage(
        dataclasses.replace(CFG, url="http://127.0.0.1:1", key_variable="SOME_KEY"), str(tmp_path)
    )
    with pytest.raises(ValueError, match="key_variable='SOME_KEY'") as info:
        stage.setup()
    assert not value or value not in str(info.value)
