"""A small collection of drawn faces with a model and an index, and a server of it in a thread."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import functools
import http.client
import io
import json
import threading
from pathlib import Path

import jax
import numpy as np
from aiohttp import web
from conftest import ROOT
from PIL import Image

from flip_jax import config
from flip_jax.checkpoint import save_weights
from flip_jax.config import Config, DrawnConfig
from flip_jax.data.record_writer import RecordWriter
from flip_jax.data.records import Record, RecordSource
from flip_jax.data.sources import write_drawn
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip
from flip_jax.search.app import SearchApp
from flip_jax.search.builder import build_index
from flip_jax.search.server import host_names, load_engine

RERANK = 8
TEXT = "a young man with a beard and a hat"


@functools.cache
def small_config() -> Config:
    return config.load(str(ROOT / "configs" / "debug.py"))


@functools.cache
def _start():
    model = small_config().model
    return jax.jit(lambda key: flip.init_params(model, 0.07, key))


def write_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Random weights of the smallest model."""
    cfg, params = small_config(), _start()(jax.random.key(seed))
    tokenizer = Tokenizer.load("grammar", cfg.model.text.max_length)
    described = {"config": config.to_dict(cfg), "vocab_hash": tokenizer.vocab_hash}
    save_weights(folder, params, described | {"data_hash": "none"})
    return folder


def write_faces(folder: Path) -> Path:
    """40 drawn faces; of every fifth the attribute `Male` is unknown, the last has no caption."""
    drawn = DrawnConfig(train_identities=1, test_identities=20, pictures=2, captions=2, size=64)
    faces = RecordSource(write_drawn(drawn, folder.with_name("drawn")), "test")
    with RecordWriter(folder, "drawn faces with gaps") as writer:
        for number in range(len(faces)):
            record: Record = faces[number]
            attributes = record.attributes.copy()
            attributes[20] = -1 if number % 5 == 0 else attributes[20]
            captions = [] if number == len(faces) - 1 else record.captions
            kept = {n: getattr(record, n) for n in ("id", "group_id", "image", "polylines")}
            writer.write("test", Record(**kept, captions=captions, attributes=attributes))
    return folder


@dataclasses.dataclass(frozen=True)
class World:
    data: Path
    checkpoint: Path
    index: Path

    @functools.cached_property
    def engine(self):
        engine = load_engine(self.index, self.checkpoint, rerank=RERANK)
        engine.warm_up()
        return engine


def make_world(tmp_path_factory) -> World:
    """One for all test files of a session."""
    return _world(tmp_path_factory.getbasetemp() / "search")


@functools.cache
def _world(folder: Path) -> World:
    folder.mkdir()
    data = write_faces(folder / "faces")
    checkpoint = write_checkpoint(folder / "model")
    build_index(checkpoint, data, "test", folder / "index")
    return World(data, checkpoint, folder / "index")


class Served:
    """The application on a free port of this machine, in a thread; a context manager."""

    def __init__(self, engine, host: str = "127.0.0.1", limits=None):
        self._engine, self._names, self._limits = engine, host_names(host), limits
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Served:
        self._thread.start()
        self.port = self._do(self._start())
        self.address = f"http://127.0.0.1:{self.port}/"
        return self

    def __exit__(self, *_) -> None:
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    async def _start(self) -> int:
        self.app = SearchApp(self._engine, self._names, self._limits)
        self._runner = web.AppRunner(
            self.app.application(), access_log=None, handler_cancellation=True
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self._runner.addresses[0][1]

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str):
        """(status, headers, body) of one request; names of headers with _ for -."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, sent)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    def search(self, **query):
        """(status, parsed answer) of a search."""
        body = json.dumps(query).encode()
        status, _, found = self.ask("POST", "/api/search", body, Content_Type="application/json")
        return status, json.loads(found)


def cosines(engine, vector: np.ndarray) -> np.ndarray:
    """Cosine of `vector` to every face, float64 [N], without the index's search."""
    vectors = np.stack([engine.index.vector(face) for face in range(len(engine.index))])
    return vectors.astype(np.float64) @ vector.astype(np.float64)


def encoded(image: np.ndarray, kind: str = "PNG") -> str:
    """A picture as a search carries it."""
    memory = io.BytesIO()
    Image.fromarray(image).save(memory, kind)
    return base64.b64encode(memory.getvalue()).decode()


def photo(world: World, face: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(world.engine.record(face).image)).convert("RGB"))


def error(found) -> tuple[int, str]:
    """(status, code) of an answer that is an error."""
    status, body = found
    assert body.keys() == {"error"} and body["error"]["message"]
    return status, body["error"]["code"]
