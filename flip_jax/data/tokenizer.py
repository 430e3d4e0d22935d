"""Captions to token ids: the reference's cleaning and BERT's uncased WordPiece.

All vocabularies, shipped, local or from the hub, run through one Rust tokenizer that is built from
the list of entries alone. It holds no padding or truncation state, so one `Tokenizer` serves many
threads, and special tokens are never read from a text: a caption that spells "[MASK]" is the three
tokens "[", "mask", "]".
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

# Loader threads and processes supply the parallelism. Threads of the library's own on top of them
# oversubscribe the cores, and it warns at every fork once it has started them.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # every vocabulary has them
ADDED_TOKENS = ("[DEC]", "[ENC]")  # appended to a vocabulary in this order
NORMALIZER = normalizers.BertNormalizer(lowercase=True)
PRE_TOKENIZER = pre_tokenizers.BertPreTokenizer()

# Captions are made of few words. Limits are for those full of names and numbers, and for languages
# without spaces.
_KEPT_WORDS, _KEPT_LENGTH = 2**16, 32
_GRAMMAR_VOCAB = Path(__file__).with_name("vocab_grammar.txt")
_ALTERNATIVES = (
    "Without a network, use a vocabulary on this machine: 'grammar' (ships with flip_jax, covers "
    "its caption grammar), the path of a vocab.txt, or a folder with vocab.txt or tokenizer.json."
)
_PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
_SPACES = re.compile(r"\s{2,}")


def clean_caption(text: str, max_words: int = 65) -> str:
    """Cleans a caption to the letter as the reference does before tokenizing.

    Lower case; each of . ! " ( ) * # : ; ~ becomes a space; runs of white space become one space;
    newlines at the end and spaces at both ends go; the first `max_words` words stay.

    Source: ddw2AIGROUP2CQUPT/FaceCaption-15M:data/utils.py, pre_caption.
    """
    text = _SPACES.sub(" ", _PUNCTUATION.sub(" ", text.lower())).rstrip("\n").strip(" ")
    words = text.split(" ")
    return " ".join(words[:max_words]) if len(words) > max_words else text


class Tokenizer:
    """Uncased BERT WordPiece with [DEC] and [ENC] after the vocabulary. Thread-safe, pickles.

    Attributes:
        max_length: tokens of a row, [CLS] and [SEP] included.
        vocab_size: entries with [DEC] and [ENC].
        vocab_hash: sha256 over the entries in order, [DEC] and [ENC] included.
        pad_id, unk_id, cls_id, sep_id, mask_id, dec_id, enc_id: ids of the special tokens.
    """

    def __init__(self, vocab: Sequence[str], max_length: int):
        """Builds a tokenizer from the entries in order of their id.

        Args:
            vocab: WordPiece entries; [DEC] and [ENC] are appended where they are missing.
            max_length: 3 or larger.

        Raises:
            ValueError: If `max_length` is too small, a special token is missing or an entry is
                empty or there twice.
        """
        if max_length < 3:
            raise ValueError(
                f"max_length is {max_length}; it must be 3 or larger to hold [CLS], [SEP], a token."
            )
        self._vocab = [*vocab, *(token for token in ADDED_TOKENS if token not in vocab)]
        ids = {token: index for index, token in enumerate(self._vocab)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise ValueError(
                f"The vocabulary of {len(vocab)} entries lacks {', '.join(missing)}; it must be "
                "one of BERT's kind, an entry per line."
            )
        if len(ids) < len(self._vocab) or "" in ids:
            entry = next(t for i, t in enumerate(self._vocab) if ids[t] != i or not t)
            raise ValueError(
                f"The vocabulary has the entry {entry!r} twice or an empty line; ids follow from "
                "the line numbers, so every line must hold an entry of its own."
            )
        self.max_length = max_length
        self.vocab_size = len(self._vocab)
        self.vocab_hash = hashlib.sha256("\n".join(self._vocab).encode()).hexdigest()
        special = (ids[token] for token in SPECIAL_TOKENS)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = special
        self.dec_id, self.enc_id = (ids[t] for t in ADDED_TOKENS)
        self._tokenizer = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        self._tokenizer.normalizer = NORMALIZER
        self._tokenizer.pre_tokenizer = PRE_TOKENIZER
        self._tokenizer.decoder = decoders.WordPiece()
        self._words = _Words(self._tokenizer)

    @classmethod
    def load(cls, name: str, max_length: int) -> Tokenizer:
        """Loads a vocabulary.

        Args:
            name: `grammar` for the one that ships with the package; the path of a vocab.txt; a
                folder with tokenizer.json or vocab.txt; else a name on the Hugging Face hub.
            max_length: tokens of a row, [CLS] and [SEP] included; 3 or larger.

        Raises:
            FileNotFoundError: If a path does not exist or the folder holds neither file.
            OSError: If the hub cannot be reached, or has no such tokenizer, and none is cached.
            ValueError: If it is not an uncased BERT WordPiece vocabulary.
        """
        path = _GRAMMAR_VOCAB if name == "grammar" else Path(name)
        try:
            return cls(_read_vocab(path, name), max_length)
        except ValueError as error:
            raise ValueError(f"Tokenizer {name!r}: {error}") from error

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Cleans and tokenizes captions.

        Args:
            texts: N captions of any length.

        Returns:
            token_ids: int32 [N, max_length], [CLS] .. [SEP] and [PAD]; a caption that is too long
                is cut and keeps [SEP] at the end.
            token_mask: bool [N, max_length], True = real token.

        Raises:
            ValueError: If `texts` is a single string or holds anything but strings.
        """
        _check_texts(texts)
        return self.encode([clean_caption(text) for text in texts])

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Tokenizes texts as they are; like calling the tokenizer, without the cleaning."""
        _check_texts(texts)
        token_ids = np.full((len(texts), self.max_length), self.pad_id, np.int32)
        token_mask = np.zeros(token_ids.shape, bool)
        for row, mask, text in zip(token_ids, token_mask, texts, strict=True):
            ids = [self.cls_id]
            for word in text.split(" "):
                ids += self._words[word]
            ids[self.max_length - 1 :] = [self.sep_id]
            row[: len(ids)] = ids
            mask[: len(ids)] = True
        return token_ids, token_mask

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of token ids [S] without special tokens.

        Raises:
            ValueError: If an id is not in the vocabulary.
        """
        ids = np.asarray(ids).tolist()
        wrong = [index for index in ids if not 0 <= index < self.vocab_size]
        if wrong:
            raise ValueError(f"id {wrong[0]} is not in a vocabulary of {self.vocab_size} entries.")
        hidden = {*SPECIAL_TOKENS, *ADDED_TOKENS} - {"[UNK]"}
        tokens = (self._vocab[index] for index in ids)
        return self._tokenizer.decoder.decode([token for token in tokens if token not in hidden])

    def save_vocab(self, path: str | Path) -> None:
        """Writes the entries, [DEC] and [ENC] included, as a vocab.txt that `load` reads."""
        Path(path).write_bytes("".join(f"{token}\n" for token in self._vocab).encode())

    def __reduce__(self):
        return Tokenizer, (self._vocab, self.max_length)


class _Words(dict[str, list[int]]):
    """Ids of the words met so far, as a text has them between two spaces.

    A space ends a token, and no rule of the normalizer looks beyond it, so that the ids of a text
    are those of its words. Looking them up takes a tenth of the time that making them takes.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        ids = self._tokenizer.encode(word, add_special_tokens=False).ids
        if len(self) < _KEPT_WORDS and len(word) <= _KEPT_LENGTH:
            self[word] = ids
        return ids


def _check_texts(texts: Sequence[str]) -> None:
    if isinstance(texts, str):
        raise ValueError(f"texts must be a sequence of captions, got one string: {texts[:60]!r}.")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"caption {index} must be a string, got {type(text).__name__}.")


def _read_vocab(path: Path, name: str) -> list[str]:
    if path.is_dir():
        if (path / "tokenizer.json").is_file():  # unlike vocab.txt it has the added tokens
            return _vocab_of_json((path / "tokenizer.json").read_text("utf-8"))
        path = path / "vocab.txt"
        if not path.is_file():
            raise FileNotFoundError(
                f"Tokenizer folder {name!r} has neither tokenizer.json nor vocab.txt."
            )
    if path.is_file():
        _refuse_cased(path.with_name("tokenizer_config.json"))
        # Not splitlines: entries may be characters that it takes for line ends.
        return path.read_bytes().decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix in (".txt", ".json"):
        raise FileNotFoundError(f"There is no tokenizer file or folder {name!r}. {_ALTERNATIVES}")
    try:
        return _vocab_of_json(tokenizers.Tokenizer.from_pretrained(name).to_str())
    except (OSError, ValueError) as error:  # the latter: not a name a repository could have
        raise OSError(
            f"Tokenizer {name!r} is neither a local path nor could it be had from the Hugging "
            f"Face hub ({type(error).__name__}). {_ALTERNATIVES}"
        ) from error


def _refuse_cased(config: Path) -> None:
    """Reads the one place beside a vocab.txt that tells a cased vocabulary from an uncased one."""
    if config.is_file() and _fields(config.read_text("utf-8")).get("do_lower_case") is False:
        raise ValueError(
            f"{config} says do_lower_case false; only uncased WordPiece, as of bert-base-uncased, "
            "is supported."
        )


def _fields(text: str) -> dict[str, Any]:
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"its JSON is a {type(fields).__name__}, not an object.")
    return fields


def _vocab_of_json(text: str) -> list[str]:
    """Returns the entries of a tokenizer.json in order of their id."""
    try:
        return _vocab_of_fields(_fields(text))
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"its JSON has not the layout of a tokenizer.json: {error!r}.") from error


def _vocab_of_fields(fields: dict[str, Any]) -> list[str]:
    model, normalizer = fields.get("model") or {}, fields.get("normalizer") or {}
    if model.get("type") != "WordPiece" or not normalizer.get("lowercase"):
        raise ValueError(
            f"it is a {model.get('type')} tokenizer with the normalizer {normalizer}; only uncased "
            "WordPiece, as of bert-base-uncased, is supported."
        )
    added = {token["content"]: token["id"] for token in fields.get("added_tokens") or []}
    ids = (model.get("vocab") or {}) | added
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("the ids of its entries are not 0, 1, 2 ... without gaps.")
    return sorted(ids, key=ids.__getitem__)
