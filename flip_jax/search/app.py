"""The web application: pages, pictures and searches over HTTP, with bounds on everything.

Searches are JSON in a POST body: a page of another site cannot send one without asking the browser
first, which is refused. Every error is JSON, `{"error": {"code", "message"}}`, and says nothing of
the machine.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

import msgspec
import numpy as np
from aiohttp import web

from flip_jax.data.jpeg import jpeg_size
from flip_jax.search import pictures
from flip_jax.search.engine import MAX_COUNT, MAX_TEXT, Answer, BadQuery, Engine, Query

_log = logging.getLogger(__name__)
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "Server": "flip_jax",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_SMALL_BODY = 64 * 2**10  # bytes; larger ones hold a picture
# A picture in base64, its text and filters.
_MAX_BODY = pictures.MAX_BYTES * 4 // 3 + _SMALL_BODY
_T = TypeVar("_T")


@dataclass(frozen=True)
class Limits:
    """What the server does at a time; more waits, and much more is refused."""

    searches: int = 64  # waiting or running; more are refused
    uploads: int = 6  # large bodies at a time, 11 MB each at most; the others wait
    thumbnails: int = 1024  # waiting or running; more are refused
    seconds: float = 60.0  # for one request, its waiting included
    cached_thumbnails: int = 2048  # about 20 KB each


class Refused(Exception):
    """An answer other than what was asked for."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class _Line:
    """Threads with a bounded line of work before them."""

    def __init__(self, threads: int, length: int):
        self._pool, self._length = ThreadPoolExecutor(threads), length
        self.waiting = 0  # or running

    async def run(self, work: Callable[[], _T]) -> _T:
        """Runs `work` in a thread; work whose caller is gone before it began is dropped.

        Raises:
          Refused: too much is waiting.
        """
        if self.waiting >= self._length:
            raise Refused(503, "busy", "too many requests at a time; try again in a moment")
        self.waiting += 1
        try:
            return await asyncio.wrap_future(self._pool.submit(work))
        finally:
            self.waiting -= 1

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class SearchApp:
    """The handlers and what they share.

    Args:
      engine: answers queries.
      host_names: the names by which it may be called; a page of another site could reach a server
        on this machine by a name of its own (DNS rebinding). None = any.
      limits: see `Limits`.
    """

    def __init__(
        self, engine: Engine, host_names: Collection[str] | None, limits: Limits | None = None
    ):
        self._engine, self._host_names, self.limits = engine, host_names, limits or Limits()
        # One thread: a call of the model uses all cores.
        self._model = _Line(1, self.limits.searches)
        self._images = _Line(2, self.limits.thumbnails)
        self._uploads = asyncio.Semaphore(self.limits.uploads)
        self._version = engine.index.manifest.files["vectors.faiss"].sha256[:12]
        self._thumbnail = functools.lru_cache(self.limits.cached_thumbnails)(self._make_thumbnail)
        folder = resources.files("flip_jax.search") / "page"
        self._page = {file.name: file.read_bytes() for file in folder.iterdir() if _kind(file.name)}

    @property
    def waiting(self) -> int:
        """Searches that wait or run."""
        return self._model.waiting

    def application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=_MAX_BODY)
        app.router.add_get("/", self._index)
        app.router.add_get("/assets/{name}", self._asset)
        app.router.add_get("/api/info", self._info)
        app.router.add_post("/api/search", self._search)
        app.router.add_get(r"/api/strokes/{face:\d{1,12}}", self._strokes)
        app.router.add_get(r"/pictures/{face:\d{1,12}}", self._picture)
        app.on_response_prepare.append(_add_headers)
        app.on_cleanup.append(self._close)
        return app

    async def _close(self, _: web.Application) -> None:
        self._model.close()
        self._images.close()

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            name = re.sub(r":\d+$", "", request.headers.get("Host", ""))
            if self._host_names is not None and name.lower() not in self._host_names:
                raise Refused(403, "host", "this server does not answer to that host name")
            async with asyncio.timeout(self.limits.seconds):
                return await handler(request)
        except Refused as error:
            return _error(error.status, error.code, str(error))
        except TimeoutError:
            return _error(503, "timeout", "this took too long; try again in a moment")
        except web.HTTPException as error:
            return _http_error(error)
        except Exception:
            _log.exception("%s %s failed", request.method, request.path)
            return _error(500, "internal", "something went wrong here; the server's log says what")

    async def _index(self, _: web.Request) -> web.Response:
        return self._file("index.html")

    async def _asset(self, request: web.Request) -> web.Response:
        return self._file(request.match_info["name"])

    def _file(self, name: str) -> web.Response:
        if name not in self._page:
            raise web.HTTPNotFound
        headers = {"Cache-Control": "no-cache"}
        return web.Response(
            body=self._page[name], content_type=_kind(name), charset="utf-8", headers=headers
        )

    async def _info(self, _: web.Request) -> web.Response:
        manifest = self._engine.index.manifest
        return _json(
            {
                "faces": manifest.faces,
                "step": manifest.checkpoint_step,
                "version": self._version,
                "attributes": self._engine.counts,
                "examples": manifest.examples,
                "limits": {
                    "text": MAX_TEXT,
                    "count": MAX_COUNT,
                    "picture_bytes": pictures.MAX_BYTES,
                    "picture_pixels": pictures.MAX_PIXELS,
                },
            }
        )

    async def _search(self, request: web.Request) -> web.Response:
        if request.content_type != "application/json":
            raise Refused(415, "bad_request", "a search is a JSON body")
        if "Content-Encoding" in request.headers:  # its length would say nothing about its size
            raise Refused(415, "bad_request", "a search is not compressed")
        length = request.content_length
        if length is not None and length > _MAX_BODY:
            raise web.HTTPRequestEntityTooLarge(_MAX_BODY, length)
        if length is not None and length <= _SMALL_BODY:
            return _json(await self._answer(request))
        async with self._uploads:
            return _json(await self._answer(request))

    async def _answer(self, request: web.Request) -> Answer:
        query, image = _query(await request.read()), None
        if query.picture is not None:
            try:
                image = await self._images.run(functools.partial(self._decode, query.picture))
            except pictures.RefusedPicture as error:
                raise Refused(422, error.code, str(error)) from error
        try:
            return await self._model.run(functools.partial(self._engine.search, query, image))
        except BadQuery as error:
            raise Refused(422, "bad_request", str(error)) from error

    def _decode(self, data: bytes) -> np.ndarray:
        """At the model's size: many can wait in line."""
        return self._engine.model.preprocess(pictures.decode_upload(data))[0]

    async def _strokes(self, request: web.Request) -> web.Response:
        def strokes() -> dict[str, Any]:
            record = self._engine.record(int(request.match_info["face"]))
            size = max(jpeg_size(record.image))
            return {"size": size, "strokes": [line.round(1).tolist() for line in record.strokes]}

        return _json(await self._of_face(strokes), cached=True)

    async def _picture(self, request: web.Request) -> web.Response:
        face = int(request.match_info["face"])
        data = await self._of_face(functools.partial(self._thumbnail, face))
        return web.Response(body=data, content_type="image/jpeg", headers=_cache(True))

    async def _of_face(self, work: Callable[[], _T]) -> _T:
        try:
            return await self._images.run(work)
        except IndexError as error:
            raise web.HTTPNotFound from error

    def _make_thumbnail(self, face: int) -> bytes:
        return pictures.thumbnail(self._engine.record(face).image)


def _kind(name: str) -> str | None:
    return _TYPES.get(name[name.rfind(".") :])


def _query(body: bytes) -> Query:
    try:
        return msgspec.json.decode(body, type=Query)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        code = "text_length" if "$.text" in str(error) else "bad_request"
        raise Refused(422, code, f"not a search: {error}") from error


def _json(value: Any, status: int = 200, *, cached: bool = False) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value),
        status=status,
        content_type="application/json",
        headers=_cache(cached),
    )


def _cache(is_long: bool) -> dict[str, str]:
    """The address of pictures and sketches has the version of the index, so they can be kept."""
    return {"Cache-Control": "private, max-age=86400" if is_long else "no-store"}


def _error(status: int, code: str, message: str) -> web.Response:
    response = _json({"error": {"code": code, "message": message}}, status)
    if status == 503:
        response.headers["Retry-After"] = "2"
    return response


def _http_error(error: web.HTTPException) -> web.Response:
    codes = {404: "not_found", 405: "method", 413: "picture_bytes"}
    messages = {
        404: "there is nothing here",
        405: "this address does not take that kind of request",
        413: f"more than {pictures.MAX_BYTES >> 20} MB",
    }
    code, message = codes.get(error.status, "http"), messages.get(error.status, error.reason)
    response = _error(error.status, code, message)
    if "Allow" in error.headers:
        response.headers["Allow"] = error.headers["Allow"]
    return response


async def _add_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(_HEADERS)
