"""Captions in a language model's words, each checked against the caption it was made from."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flip_jax.curate.caption_check import can_be_checked, check_rewrite
from flip_jax.curate.caption_reader import lexicon_fingerprint
from flip_jax.curate.chat_client import ChatClient, Question, Unanswered
from flip_jax.curate.config import RewriteConfig
from flip_jax.curate.reply_cache import ReplyCache
from flip_jax.curate.stages import Sample, Stage, Tally, fingerprint

_PROMPT = Path(__file__).with_name("rewrite_prompt.txt")
_THOUGHTS = re.compile(r"^\s*<think>.*?</think>", re.S)  # of models that reason aloud
_NUMBERED = re.compile(r"\s*(\d+)[.):]\s*(.*\S)\s*")
_GROWTH, _ALLOWANCE = 2, 20  # a rewrite has at most so many times the words, and so many more
_SHOWN_WORDS, _COUNTED_WORDS = 20, 10_000

log = logging.getLogger(__name__)


class RewriteStage(Stage):
    """Replaces captions by rewrites that say the same; where there is none, the caption stays.

    Counts: `captions`, `rewritten`, `kept` (of them), `not understood` (captions that cannot be
    checked, and are therefore kept), `rejected: REASON` and `unanswered: REASON` (of rewrites that
    were asked for). They and the captions are the same however often the build was stopped.

    Args:
      cfg: settings, with a url.
      cache: folder for replies, on a local disk.

    Raises:
      ValueError: a url or a folder that cannot be used, or no such prompt.
    """

    name = "rewrite"

    def __init__(self, cfg: RewriteConfig, cache: str):
        super().__init__(cfg)
        if not cfg.url.startswith(("http://", "https://")):
            raise ValueError(f"config.rewrite.url={cfg.url!r} must start with http:// or https://")
        if "://" in cache:
            raise ValueError(
                f"config.rewrite.cache={cache!r} must be a folder on a local disk of the workers"
            )
        self.cache_folder = cache
        self.prompt = _read_prompt(cfg.prompt)
        self._client: ChatClient | None = None
        self._cache: ReplyCache | None = None
        self._strange: Counter[str] = Counter()

    def setup(self) -> None:
        self._client = ChatClient(self.cfg)
        self._cache = ReplyCache(self.cache_folder)

    def teardown(self) -> None:
        if self._cache is not None:
            self._cache.close()
        if self._strange:
            most = ", ".join(f"{word} {n}" for word, n in self._strange.most_common(_SHOWN_WORDS))
            log.info("words of rewrites that were not understood: %s", most)
            self._strange.clear()

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        # Each text once: the same words get the same rewrite, whoever asks.
        times = Counter(text for sample in batch for text in sample.captions)
        rewrites = self._rewrite(times, tally)
        for text, number in times.items():
            tally.count(self.name, "captions", number)
            tally.count(self.name, "rewritten" if text in rewrites else "kept", number)
        return [
            dataclasses.replace(
                sample, captions=tuple(rewrites.get(text, text) for text in sample.captions)
            )
            for sample in batch
        ]

    def _rewrite(self, times: Counter[str], tally: Tally) -> dict[str, str]:
        """Returns the texts that have a good rewrite, with it."""
        open_texts = []
        for text, number in times.items():
            if self.cfg.check and not can_be_checked(text):
                tally.count(self.name, "not understood", number)
            else:
                open_texts.append(text)
        good: dict[str, str] = {}
        for attempt in range(self.cfg.attempts):
            rejected = []
            for text, reply in self._replies(open_texts, attempt, times, tally).items():
                rewrite = _clean(reply)
                if reason := self._fault(text, rewrite):
                    tally.count(self.name, f"rejected: {reason}", times[text])
                    rejected.append(text)
                else:
                    good[text] = rewrite
            open_texts = rejected
        return good

    def _fault(self, text: str, rewrite: str) -> str:
        """Why a rewrite is not used; empty if it is."""
        if not rewrite:
            return "empty"
        if len(rewrite.split()) > _GROWTH * len(text.split()) + _ALLOWANCE:
            return "too long"
        if not self.cfg.check:
            return ""
        verdict = check_rewrite(text, rewrite)
        if len(self._strange) < _COUNTED_WORDS:
            self._strange.update(verdict.strange)
        return verdict.reason

    def _replies(
        self, texts: Sequence[str], attempt: int, times: Counter[str], tally: Tally
    ) -> dict[str, str]:
        """Returns the replies for those texts that have one, in the order of `texts`."""
        keys = {text: self._key(text, attempt) for text in texts}
        cached = self._cache.find(keys.values())
        found = {text: cached[key] for text, key in keys.items() if key in cached}
        missing = [text for text in texts if text not in found]
        size = self.cfg.texts_per_request
        groups = [missing[start : start + size] for start in range(0, len(missing), size)]
        failed = self._ask(groups, attempt, found)
        # A model may lose count of several texts, but not of one.
        apart = [[text] for group, _ in failed if len(group) > 1 for text in group]
        failed = [each for each in failed if len(each[0]) == 1] + self._ask(apart, attempt, found)
        for (text,), error in failed:
            tally.count(self.name, f"unanswered: {error.args[0]}", times[text])
        return {text: found[text] for text in texts if text in found}

    def _ask(
        self, groups: list[list[str]], attempt: int, found: dict[str, str]
    ) -> list[tuple[list[str], Unanswered]]:
        """Puts the replies for groups of texts into `found` and on disk, returns the failures."""
        failed: list[tuple[list[str], Unanswered]] = []

        def answered(number: int, answer: str) -> None:
            replies = _split(answer, len(groups[number]))
            if replies is None:
                failed.append((groups[number], Unanswered("bad answer", "other lines than asked")))
                return
            for text, reply in zip(groups[number], replies, strict=True):
                found[text] = self._cache.add(self._key(text, attempt), reply)

        questions = [self._question(group) for group in groups]
        errors = self._client.ask(questions, self.cfg.seed + attempt, answered)
        return failed + [(groups[number], error) for number, error in errors.items()]

    def _question(self, texts: list[str]) -> Question:
        content = texts[0]
        if len(texts) > 1:
            content = "\n".join(f"{number}. {text}" for number, text in enumerate(texts, 1))
        messages = [
            {"role": "system", "content": self.prompt},
            {"role": "user", "content": content},
        ]
        return Question(messages, self.cfg.max_tokens * len(texts))

    def _settings(self) -> list[Any]:
        """What replies depend on."""
        cfg = self.cfg
        return [cfg.model, self.prompt, cfg.temperature, cfg.top_p, cfg.max_tokens]

    def _key(self, text: str, attempt: int) -> bytes:
        parts = [*self._settings(), self.cfg.seed + attempt, text]
        return hashlib.sha256(json.dumps(parts).encode()).digest()

    def fingerprint(self) -> str:
        cfg = self.cfg
        checks = [cfg.attempts, cfg.check, lexicon_fingerprint()]
        settings = [*self._settings(), cfg.seed, cfg.texts_per_request, *checks]
        return fingerprint(self.name, self.version, *settings)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_client": None, "_cache": None}


def _read_prompt(path: str | None) -> str:
    try:
        text = (_PROMPT if path is None else Path(path)).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"config.rewrite.prompt={path!r} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"config.rewrite.prompt={path!r} is empty; write what the model shall do")
    return text


def _split(answer: str, count: int) -> list[str] | None:
    """The replies in an answer to `count` numbered lines; None if they are not these."""
    if count == 1:
        return [answer]
    lines = _THOUGHTS.sub("", answer).strip().split("\n")
    matches = [_NUMBERED.fullmatch(line) for line in lines if line.strip()]
    if None in matches or [int(match[1]) for match in matches] != list(range(1, count + 1)):
        return None
    return [match[2] for match in matches]


def _clean(reply: str) -> str:
    """One line without quotation marks around it."""
    text = " ".join(_THOUGHTS.sub("", reply).split())
    if len(text) > 1 and (text[0], text[-1]) in (('"', '"'), ("\u201c", "\u201d"), ("'", "'")):
        text = text[1:-1].strip()
    return text
