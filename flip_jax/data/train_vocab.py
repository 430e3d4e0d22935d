"""Trains the WordPiece vocabulary that ships with the package on captions of the grammar.

    python -m flip_jax.data.train_vocab --out flip_jax/data/vocab_grammar.txt --size 800

Every word of the grammar becomes one token if `size` allows; letters, digits and punctuation are
tokens too, so that any printable ASCII text can be written. Words are split by the tokenizer's own
normalizer; the merging is done here, because the trainers of the `tokenizers` library break ties
by the order of a hash table and give another vocabulary in every process.
"""

from __future__ import annotations

import argparse
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from flip_jax.data.attributes import ATTRIBUTES
from flip_jax.data.captions import caption
from flip_jax.data.tokenizer import NORMALIZER, PRE_TOKENIZER, SPECIAL_TOKENS, clean_caption

_CHARACTERS = string.ascii_lowercase + string.digits
_BASE = (
    *SPECIAL_TOKENS,
    *string.punctuation,
    *_CHARACTERS,
    *(f"##{character}" for character in _CHARACTERS),
)


def train_vocab(texts: Iterable[str], size: int) -> list[str]:
    """Trains a WordPiece vocabulary: the most frequent pair of neighbours is merged, repeatedly.

    Args:
        texts: the corpus. Words with other characters than a-z and 0-9 are not learnt from.
        size: the most entries the vocabulary may have; it has fewer once every word is one entry.

    Returns:
        The entries in order of their id, without [DEC] and [ENC], which `Tokenizer` appends.

    Raises:
        ValueError: If `size` does not hold the special tokens and characters.
    """
    if size < len(_BASE):
        raise ValueError(f"size is {size}; special tokens and characters alone are {len(_BASE)}.")
    counts: Counter[str] = Counter()
    for text in texts:
        words = PRE_TOKENIZER.pre_tokenize_str(NORMALIZER.normalize_str(clean_caption(text)))
        counts.update(word for word, _ in words)
    parts = {
        word: [word[0], *(f"##{character}" for character in word[1:])]
        for word in sorted(counts)
        if set(word) <= set(_CHARACTERS)
    }
    vocab = dict.fromkeys(_BASE)  # a set in order
    while len(vocab) < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, pieces in parts.items():
            for pair in pairwise(pieces):
                pairs[pair] += counts[word]
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merged = best[0] + best[1].removeprefix("##")
        vocab[merged] = None
        for pieces in parts.values():
            for index in range(len(pieces) - 2, -1, -1):
                if tuple(pieces[index : index + 2]) == best:
                    pieces[index : index + 2] = [merged]
    return list(vocab)


def grammar_texts(count: int) -> Iterator[str]:
    """Yields captions of random faces, every third of them with unknown attributes."""
    rng = np.random.default_rng(0)
    for index in range(count):
        attributes = (rng.random(len(ATTRIBUTES)) < 0.3).astype(np.int8)
        if index % 3 == 0:
            attributes[rng.random(len(ATTRIBUTES)) < 0.3] = -1
        yield caption(attributes, rng)


def main() -> None:
    """Trains on captions of the grammar and writes the vocabulary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the vocab.txt to write")
    parser.add_argument("--size", type=int, default=800, help="most entries")
    parser.add_argument("--captions", type=int, default=10_000, help="size of the corpus")
    arguments = parser.parse_args()
    vocab = train_vocab(grammar_texts(arguments.captions), arguments.size)
    arguments.out.write_text("".join(f"{entry}\n" for entry in vocab), "ascii", newline="\n")
    print(f"{arguments.out}: {len(vocab)} entries")


if __name__ == "__main__":
    main()
