"""Reads captions of faces: from English sentences back to attributes.

The inverse of the caption grammar, wide enough for other wordings of the same. It knows the words
of `caption_lexicon.txt` and no others, and does not guess: what it does not understand it says.

Adjectives speak of nouns, so that black hair and black glasses differ: those before a noun of that
noun, those after one, as in "her hair is wavy and black", of the one before them. A negation
reaches to the next verb, "with", "but", comma or "and"; over "or" and "nor", over a list that ends
in them, and after "without" and "not" from noun to noun over "and" ("without glasses and a hat",
but not "no beard and black hair").
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from flip_jax.data.attributes import ATTRIBUTE_INDEX
from flip_jax.data.records import file_sha256

_LEXICON = Path(__file__).with_name("caption_lexicon.txt")
_RULE = re.compile(r"(\S+)(?: ([a-z]+))?((?: [+-]\S+)*): (.*)")
_NAMED = ("noun", "bare", "adjective")
_TOKEN = re.compile(r"[^\W_]+(?:'[^\W_]+)*|[.,;:!?()\"&]|\S")
_PUNCTUATION = {",": "comma", "(": "comma", ")": "comma", '"': "quiet", "&": "and"}
_PUNCTUATION |= dict.fromkeys(".;:!", "stop")  # a question says nothing
_TRANSPARENT = ("quiet", "strange", "no", "not")  # do not part a noun from what is said of it

Claim = tuple[str, bool]  # attribute, and whether it is present


@dataclass(frozen=True)
class Reading:
    """What a caption says.

    Attributes:
      claims: attributes that it says are present or absent. "Older" is `("Young", False)`, a
        beard `("No_Beard", False)`, a woman `("Male", False)`.
      strange: words and pairs of words that are not understood, in order.
    """

    claims: frozenset[Claim]
    strange: tuple[str, ...]


class _Entry(NamedTuple):
    """What words may be: one role, and what they say in it."""

    role: str
    name: str  # of a noun
    claims: tuple[Claim, ...]


class _Lexicon:
    """The rules of the file.

    Attributes:
      entries: by words, without the claims of adjectives.
      adjectives: by words and the noun's name, what they say together.
      longest: number of words of the longest entry, by first word.
    """

    def __init__(self, text: str):
        self.entries: dict[tuple[str, ...], _Entry] = {}
        self.adjectives: dict[tuple[str, str], tuple[Claim, ...]] = {}
        self.longest: dict[str, int] = {}
        for line in re.sub(r"\n +", " ", text).split("\n"):
            if line and line[0] != "#":
                rule = _RULE.fullmatch(line)
                if rule is None or (rule[2] is not None) != (rule[1] in _NAMED):
                    raise ValueError(f"{_LEXICON.name}: {line!r} is no rule")
                role, name, signed, entries = rule.groups()
                claims = tuple((claim[1:], claim[0] == "+") for claim in signed.split())
                for entry in entries.split("|"):
                    self._add(entry.strip(), _Entry(role, name or "", claims))

    def _add(self, words: str, entry: _Entry) -> None:
        if any(attribute not in ATTRIBUTE_INDEX for attribute, _ in entry.claims):
            raise ValueError(f"{_LEXICON.name}: {words!r} claims {entry.claims}")
        if entry.role == "adjective":
            key = (words, entry.name)
            self.adjectives[key] = entry.claims
            entry = _Entry("adjective", "", ())
        parts = tuple(words.split())
        if self.entries.setdefault(parts, entry) != entry:
            raise ValueError(f"{_LEXICON.name}: {words!r} has two rules")
        self.longest[parts[0]] = max(self.longest.get(parts[0], 0), len(parts))


@cache
def _lexicon() -> _Lexicon:
    return _Lexicon(_LEXICON.read_text("ascii"))


class Token(NamedTuple):
    text: str
    role: str
    name: str = ""
    claims: tuple[Claim, ...] = ()


@lru_cache(4096)  # a source is read for each of its rewrites
def read_caption(text: str) -> Reading:
    """Reads one caption, of any number of sentences."""
    return _Reader(list(_tokens(text))).reading()


def lexicon_fingerprint() -> str:
    """Identifies the words that are understood."""
    return file_sha256(_LEXICON)


def _tokens(text: str) -> Iterator[Token]:
    """Splits a text into the longest entries of the lexicon and punctuation."""
    text = unicodedata.normalize("NFKC", text).lower().replace("\u2019", "'")
    text = re.sub("[\u201c\u201d]", '"', re.sub("[\u2013\u2014]", ",", text))
    text = re.sub(r"(?<=[a-z])n't\b", " not", text).replace("'s ", " ").replace("-", " ")
    words = _TOKEN.findall(text)
    lexicon, position = _lexicon(), 0
    while position < len(words):
        word = words[position]
        for length in range(lexicon.longest.get(word, 0), 0, -1):
            entry = lexicon.entries.get(tuple(words[position : position + length]))
            if entry is not None:
                yield Token(" ".join(words[position : position + length]), *entry)
                position += length
                break
        else:
            yield Token(word, _PUNCTUATION.get(word, "strange"))
            position += 1


class _Adjective(NamedTuple):
    token: Token
    present: bool  # False in the reach of a negation
    start: str  # role of the word before the list of adjectives it stands in
    part: int  # of the sentence; commas and "and" begin another


class _Noun:
    def __init__(self, token: Token, present: bool, part: int):
        self.token, self.present, self.part = token, present, part
        self.described = False


class _Reader:
    """One walk over the tokens. The state is what may still be spoken of."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.claims: set[Claim] = set()
        self.strange: list[str] = []
        self.nouns: list[_Noun] = []  # of the sentence, in order
        self.waiting: list[_Adjective] = []  # for a noun
        self.part = 0
        self.before = "stop"  # role of the last word that counts
        self.negation: str | None = None  # role of the word
        self.negated: str | None = None  # role of the last word in its reach

    def reading(self) -> Reading:
        for position, token in enumerate(self.tokens):
            getattr(self, f"_{token.role}")(token, position)
            if token.role not in _TRANSPARENT:
                self.before = token.role
        self._stop(None, 0)
        return Reading(frozenset(self.claims), tuple(self.strange))

    # One method for each role.

    def _strange(self, token: Token, position: int) -> None:
        self.strange.append(token.text)

    def _quiet(self, token: Token, position: int) -> None:
        pass

    def _word(self, token: Token, position: int) -> None:
        self._claim(token.claims, self._present(token))

    def _adjective(self, token: Token, position: int) -> None:
        start = self.waiting[-1].start if self.waiting else self.before
        self.waiting.append(_Adjective(token, self._present(token), start, self.part))

    def _noun(self, token: Token, position: int) -> None:
        present = token.name == "person" or self._present(token)
        noun = _Noun(token, present, self.part)
        for adjective in self.waiting:
            predicate = adjective.start in ("noun", "bare", "be") and adjective.part < self.part
            self._describe(adjective, [*self._subjects(), noun] if predicate else [noun])
        self.waiting.clear()
        self.nouns.append(noun)
        self._claim(token.claims, noun.present)

    _bare = _noun

    def _det(self, token: Token, position: int) -> None:
        self._settle()
        self._claim(token.claims, True)

    def _be(self, token: Token, position: int) -> None:
        self._settle()
        self._end_negation()
        self.part += 1

    _verb = _be

    def _or(self, token: Token, position: int) -> None:
        self.part += 1
        if self.negation is None:  # one of two, but which?
            self.strange.append(token.text)

    def _and(self, token: Token, position: int) -> None:
        self.part += 1
        noun_to_noun = self.negated == "noun" and self._noun_follows(position)
        if not (self.negation == "not" and noun_to_noun):
            self._end_negation()

    def _noun_follows(self, position: int) -> bool:
        """Whether a noun comes next that is not the subject of another clause."""
        following = [token for token in self.tokens[position + 1 :] if token.role != "quiet"]
        for index, token in enumerate(following):
            if token.role in ("noun", "bare"):
                then = following[index + 1] if index + 1 < len(following) else None
                return then is None or then.role not in ("be", "verb") or then.text == "with"
            if token.role not in ("det", "adjective"):
                break
        return False

    def _but(self, token: Token, position: int) -> None:
        self._settle()
        self.negation = None

    def _comma(self, token: Token, position: int) -> None:
        self.part += 1
        for later in self.tokens[position + 1 :]:
            if later.role == "or" or later.text == "nor":
                return
            if later.role in ("verb", "be", "but", "and", "stop"):
                break
        self._end_negation()

    def _no(self, token: Token, position: int) -> None:
        if self.negation is not None and self.negated is None:  # not without
            self.strange.append(token.text)
        self.negation, self.negated = token.role, None

    _not = _no

    def _stop(self, token: Token | None, position: int) -> None:
        self._settle()
        self.negation = None
        for noun in self.nouns:
            if noun.token.role == "bare" and not noun.described:
                self._undescribed(noun)
        self.nouns.clear()

    def _undescribed(self, noun: _Noun) -> None:
        """None at all, as in "no makeup", is none of the kind that the adjectives tell."""
        kinds = [
            claims for (_, name), claims in _lexicon().adjectives.items() if name == noun.token.name
        ]
        if noun.present or not kinds:
            self.strange.append(noun.token.text)
            return
        for claims in kinds:
            self._claim(claims, False)

    # What they share.

    def _present(self, token: Token) -> bool:
        self.negated = token.role
        return self.negation is None

    def _end_negation(self) -> None:
        """Ends a negation that was about something: "not wearing a hat" is one, "not" is none."""
        if self.negated is not None:
            self.negation = None

    def _settle(self) -> None:
        """Lets the waiting adjectives speak of what is before them; "a blonde" is a person."""
        person = _Noun(Token("", "noun", "person"), True, self.part)
        for adjective in self.waiting:
            bare = adjective.start in ("det", "verb", "but", "stop")
            self._describe(adjective, [person] if bare else self._subjects() or [person])
        self.waiting.clear()

    def _subjects(self) -> list[_Noun]:
        """The last noun and those it belongs to, as in "the hair on his head"; nearest first."""
        return [noun for noun in reversed(self.nouns) if noun.part == self.nouns[-1].part]

    def _describe(self, adjective: _Adjective, nouns: list[_Noun]) -> None:
        for noun in nouns:
            claims = _lexicon().adjectives.get((adjective.token.text, noun.token.name))
            if claims is not None:
                noun.described = True
                self._claim(claims, adjective.present and noun.present)
                return
        self.strange.append(f"{adjective.token.text} {nouns[0].token.text}".strip())

    def _claim(self, claims: tuple[Claim, ...], present: bool) -> None:
        if not present:
            claims = claims[:1]  # not clean-shaven: a beard, but who knows which
        self.claims.update((attribute, value == present) for attribute, value in claims)
