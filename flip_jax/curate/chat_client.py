"""A client of the OpenAI-compatible chat API, as vLLM, llama.cpp and hosted services speak it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import aiohttp
import msgspec

from flip_jax.curate.config import RewriteConfig
from flip_jax.curate.retries import retry_after

_MAX_BYTES = 2**20  # of an answer
_AGAIN = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # may go well later
_BACKOFF_SECONDS = 1.0  # before the first retry, doubled each time
_MAX_WAIT_SECONDS = 60.0  # a longer Retry-After is not waited for
_GIVE_UP = 20  # requests in a row that came to nothing


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Answer(msgspec.Struct):
    choices: list[_Choice]


class Question(NamedTuple):
    messages: list[dict[str, str]]  # `role` and `content`, in the order of the conversation
    max_tokens: int  # of the answer


class Unanswered(Exception):
    """A question without an answer; args: reason, detail.

    Reasons: `no connection`, `timeout`, `http status`, `refused`, `bad answer`, `empty answer`,
    `cut off`, `too long`.
    """


class _TryAgain(Unanswered):
    """What may go well later; `wait` is what the server asked for, in seconds."""

    def __init__(self, reason: str, detail: str, wait: float = 0.0):
        super().__init__(reason, detail)
        self.wait = wait


class ChatClient:
    """Asks questions that do not depend on each other.

    The API key is read from the environment and goes nowhere but into the header of requests.

    Raises:
      ValueError: the environment variable is not set, or holds what no key is.
    """

    def __init__(self, cfg: RewriteConfig):
        self.cfg = cfg
        self.url = f"{cfg.url.rstrip('/')}/chat/completions"
        self._key = _read_key(cfg.key_variable)
        self._failures = 0  # in a row

    def ask(
        self,
        questions: Sequence[Question],
        seed: int,
        answered: Callable[[int, str], None],
    ) -> dict[int, Unanswered]:
        """Asks all questions, `cfg.concurrency` at a time.

        Args:
          seed: for the sampling of the server.
          answered: called with the number of a question and its answer, as soon as it is there.

        Returns:
          The questions that were not answered, by number.

        Raises:
          ValueError: the server refuses the key, the model or the address.
          OSError: 20 requests in a row came to nothing, retries included.
        """
        return asyncio.run(self._ask(questions, seed, answered)) if questions else {}

    async def _ask(
        self,
        questions: Sequence[Question],
        seed: int,
        answered: Callable[[int, str], None],
    ) -> dict[int, Unanswered]:
        free, failed = asyncio.Semaphore(self.cfg.concurrency), {}
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}

        async def one(number: int, question: Question) -> None:
            async with free:
                try:
                    answer = await self._persist(session, self._payload(question, seed))
                except Unanswered as error:
                    failed[number] = error
                else:
                    answered(number, answer)

        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self.cfg.timeout_seconds),
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
        ) as session:
            await asyncio.gather(*(one(*item) for item in enumerate(questions)))
        return failed

    def _payload(self, question: Question, seed: int) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "model": cfg.model,
            "messages": question.messages,
            "temperature": cfg.temperature,
            "top_p": cfg.top_p,
            "max_tokens": question.max_tokens,
            "seed": seed,
        }

    async def _persist(self, session: aiohttp.ClientSession, payload: dict[str, Any]) -> str:
        """One question with its retries."""
        attempt = 0
        while True:
            try:
                answer = await self._request(session, payload)
            except _TryAgain as error:
                # Spread out, lest all requests come back at the same moment.
                backoff = _BACKOFF_SECONDS * 2**attempt * random.uniform(0.5, 1)
                wait = max(error.wait, min(backoff, _MAX_WAIT_SECONDS))
                if attempt == self.cfg.retries or wait > _MAX_WAIT_SECONDS:
                    self._count_failure(error)
                    raise
            else:
                self._failures = 0
                return answer
            await asyncio.sleep(wait)
            attempt += 1

    def _count_failure(self, error: Unanswered) -> None:
        self._failures += 1
        if self._failures >= _GIVE_UP:
            reason, detail = error.args
            raise OSError(
                f"config.rewrite.url={self.cfg.url!r}: {self._failures} requests in a row came to "
                f"nothing, the last: {reason} ({detail}). Mend the server and build again: what is "
                "done stays done"
            ) from error

    async def _request(self, session: aiohttp.ClientSession, payload: dict[str, Any]) -> str:
        try:
            async with session.post(self.url, json=payload, allow_redirects=False) as response:
                body = bytearray()
                async for data in response.content.iter_any():
                    body += data
                    if len(body) > _MAX_BYTES:
                        raise Unanswered("too long", f"more than {_MAX_BYTES} bytes")
                if response.status != 200:
                    self._refuse(response.status, response.headers, bytes(body))
                return _content(bytes(body), self._shown(bytes(body)))
        except TimeoutError as error:  # aiohttp's are of this type too
            raise _TryAgain("timeout", f"{self.cfg.timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise _TryAgain("no connection", f"{type(error).__name__}: {error}") from error

    def _refuse(self, status: int, headers: Any, body: bytes) -> None:
        detail = f"{status}: {self._shown(body)}"
        if status in _AGAIN:
            raise _TryAgain("http status", detail, retry_after(headers.get("Retry-After", "")))
        if status in (401, 403):
            raise ValueError(
                f"config.rewrite.url={self.cfg.url!r} refuses the API key, {detail}. "
                f"config.rewrite.key_variable={self.cfg.key_variable!r} names the environment "
                "variable that must hold it"
            )
        if status in (404, 405):
            raise ValueError(
                f"config.rewrite.url={self.cfg.url!r} has no {self.url}, or config.rewrite.model="
                f"{self.cfg.model!r} is none of its models, {detail}"
            )
        # Of this question only, such as one that is too long for the model; or of all.
        error = Unanswered("refused", detail)
        self._count_failure(error)
        raise error

    def _shown(self, body: bytes) -> str:
        """The start of an answer for a message, without the key, which some servers repeat."""
        text = " ".join(body.decode(errors="replace").split())
        if self._key is not None:
            text = text.replace(self._key, "***")
        return text[:200]


def _content(body: bytes, shown: str) -> str:
    try:
        choices = msgspec.json.decode(body, type=_Answer).choices
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _TryAgain("bad answer", f"{error}: {shown}") from error
    if len(choices) != 1:
        raise _TryAgain("bad answer", f"{len(choices)} choices, must be 1")
    if choices[0].finish_reason == "length":
        raise Unanswered("cut off", "raise config.rewrite.max_tokens")
    text = choices[0].message.content
    if text is None or not text.strip():
        raise _TryAgain("empty answer", shown)
    return text


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise ValueError(
            f"config.rewrite.key_variable={variable!r}: that environment variable of the worker is "
            "empty or holds more than printable ASCII; set it to the API key"
        )
    return key
