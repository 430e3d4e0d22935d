"""From the command line to a listening server."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import signal
import socket
from pathlib import Path

from aiohttp import web

from flip_jax.api import FlipModel
from flip_jax.data.records import RecordSource
from flip_jax.search.app import SearchApp
from flip_jax.search.engine import Engine
from flip_jax.search.identity import check_same_model, weights_digest
from flip_jax.search.index import FaceIndex
from flip_jax.weights import read_tokenizer, read_weights


def load_engine(
    index: Path, checkpoint: Path, data: Path | None = None, rerank: int = 32
) -> Engine:
    """An index with the model and the pictures it was made from.

    Args:
      index: folder of the index.
      checkpoint: the one it was made with.
      data: the data set it was made from; None = where it was then.
      rerank: how many of the best faces ITM looks at, 1 to 64.

    Raises:
      ValueError: `rerank` is out of range, or checkpoint or data are not those of the index.
      OSError: something is missing or damaged.
    """
    if not 1 <= rerank <= 64:
        raise ValueError(f"--rerank is {rerank}; allowed are 1 to 64")
    faces = FaceIndex(index)
    manifest = faces.manifest
    data = Path(manifest.data) if data is None else data
    try:
        source = RecordSource(data, manifest.split)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}. If the data set of index {index} was moved, give its folder as --data"
        ) from error
    if source.manifest_hash != manifest.data_hash:
        raise ValueError(
            f"index {index} was made from another data set than {data}: manifest hash "
            f"{manifest.data_hash[:16]}, not {source.manifest_hash[:16]}; give that data set as "
            "--data, or build the index again with `python -m flip_jax.search index`"
        )
    weights = read_weights(checkpoint)
    check_same_model(manifest, weights_digest(weights), str(index), str(checkpoint))
    model = FlipModel(weights, read_tokenizer(checkpoint, weights))
    return Engine(faces, source, model, rerank)


def serve(
    index: Path, checkpoint: Path, data: Path | None, host: str, port: int, rerank: int
) -> None:
    """Serves the page until the process is told to stop; arguments as `load_engine` takes them.

    Raises:
      ValueError, OSError: as `load_engine`; or the address is taken or not this machine's.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(name)s: %(message)s", force=True
    )
    with _bind(host, port) as line:  # before the slow part: the address may be taken
        engine = load_engine(index, checkpoint, data, rerank)
        print(f"{index}: {len(engine.index):,} faces; compiling the model ...", flush=True)
        engine.warm_up()
        asyncio.run(_listen(engine, host, line))


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ValueError(f"--port is {port}; allowed are 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=128)


def host_names(host: str) -> frozenset[str] | None:
    """The names that lead to the address `host` if only this machine reaches it, else None."""
    try:
        is_local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_local = host == "localhost"
    return frozenset({"localhost", "127.0.0.1", "[::1]", host}) if is_local else None


async def _listen(engine: Engine, host: str, line: socket.socket) -> None:
    names = host_names(host)
    app = SearchApp(engine, names).application()
    # No access log: what people look for is theirs. A search whose page was closed is dropped.
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
    await runner.setup()
    # Before the address is said: whoever reads it may stop the server at once.
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        await web.SockSite(runner, line).start()
        name = f"[{host}]" if ":" in host else host
        print(f"http://{name}:{line.getsockname()[1]}/   (Ctrl-C stops it)", flush=True)
        if names is None:
            print(
                f"Anybody who reaches {host} can search these faces and see them: there is no "
                "password and no encryption.",
                flush=True,
            )
        await stop.wait()
    finally:
        await runner.cleanup()
