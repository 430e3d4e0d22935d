"""Replies on disk: nothing is lost by a kill, and processes agree."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

pytest.importorskip("aiohttp", reason="rewriting needs the extra `curate`")

from chat_server import ChatServer
from conftest import ROOT
from rewrite_run import CFG, rewritten, run, texts

from flip_jax.curate.reply_cache import ReplyCache

_CLIENT = """
import dataclasses, sys
sys.path.insert(0, "tests")
from rewrite_run import CFG, RewriteStage, Sample, Tally, texts
stage = RewriteStage(dataclasses.replace(CFG, url=sys.argv[1]), sys.argv[2])
stage.setup()
print("ready", flush=True)
stage.process([Sample("a", captions=tuple(texts(60)))], Tally())
"""


def test_a_kill_loses_no_answer(tmp_path):
    with ChatServer(seconds=0.05) as server:
        client = subprocess.Popen(
            [sys.executable, "-c", _CLIENT, server.url, str(tmp_path / "replies")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert client.stdout.readline() == b"ready\n"
        deadline = time.monotonic() + 60
        while len(server.requests) < 30 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(client.pid, signal.SIGKILL)
        client.wait()
        asked = len(server.requests)
        rows = sqlite3.connect(tmp_path / "replies" / "replies.sqlite")
        assert rows.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        (stored,) = rows.execute("SELECT count(*) FROM replies").fetchone()
        rows.close()
        # All but those that were on their way.
        assert asked - 2 * CFG.concurrency <= stored <= asked < 60
        found, tally = run(server, tmp_path, texts(60))
        assert len(server.requests) == asked + 60 - stored
    assert found == [tuple(map(rewritten, texts(60)))]
    assert tally == {"captions": 60, "rewritten": 60}


def _write(folder, name, keys):
    cache = ReplyCache(folder)
    return [cache.add(key, f"{name} {number}") for number, key in enumerate(keys)]


def test_two_processes_agree(tmp_path):
    """They write the same keys at the same time; the first reply for a key is everybody's."""
    keys = [bytes([n]) * 32 for n in range(200)]
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        tasks = [(str(tmp_path), name, order) for name, order in (("a", keys), ("b", keys[::-1]))]
        first, second = pool.starmap(_write, tasks)
    stored = ReplyCache(str(tmp_path)).find(keys)
    assert [stored[key] for key in keys] == first == second[::-1]


def test_a_damaged_cache_says_so(tmp_path):
    (tmp_path / "replies.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(OSError, match=r"config.rewrite.cache: .*replies.sqlite cannot be used"):
        ReplyCache(str(tmp_path))
