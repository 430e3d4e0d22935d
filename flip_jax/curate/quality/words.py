"""Words of captions: how many, how varied; one pass, bounded memory."""

from __future__ import annotations

import string
from collections.abc import Sequence

import numpy as np

from flip_jax.curate.quality.distinct import Distinct, key_of

N = 4  # words of an n-gram, as in the plot of arXiv 2407.08515
TENTHS = 10
MAX_WORDS = 1024  # of a caption, in its histogram; longer ones count as this long
_CACHED_WORDS = 2**19
# Odd numbers with no pattern to their bits; one for each place of an n-gram.
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)


class WordCounts:
    """What there is to say of the words of a data set's captions.

    Words are what white space separates. For n-grams and the vocabulary they are lower case,
    without punctuation around them, and what is punctuation only is no word.
    """

    def __init__(self):
        self.lengths = np.zeros(MAX_WORDS + 1, np.int64)
        self.words = 0
        self._keys = _Keys()
        self._ngrams, self._vocabulary, self._captions = Distinct(), Distinct(), Distinct()

    def add(self, captions: Sequence[str], tenths: np.ndarray) -> None:
        """Takes in captions and the tenth of the data, 0 to 9, that each is in; int [N]."""
        if not captions:
            return
        texts = [text.split() for text in captions]
        lengths = np.array([len(text) for text in texts])
        self.lengths += np.bincount(np.minimum(lengths, MAX_WORDS), minlength=MAX_WORDS + 1)
        self.words += int(lengths.sum())
        cached = self._keys
        keys = np.array([cached[word] for text in texts for word in text], np.uint64)
        caption = np.repeat(np.arange(len(texts)), lengths)
        caption, keys = caption[keys != 0], keys[keys != 0]
        marks = np.uint64(1) << tenths.astype(np.uint64)
        self._vocabulary.add(*_distinct(keys, marks[caption]))
        inside = caption[N - 1 :] == caption[: max(len(caption) - N + 1, 0)]
        grams = _ngram_keys(keys)[inside]
        self._ngrams.add(*_distinct(grams, marks[caption[N - 1 :]][inside]))
        whole = np.array([key_of(" ".join(text).encode()) for text in texts], np.uint64)
        self._captions.add(whole, marks)

    def summary(self) -> dict[str, float | list[int]]:
        """Numbers of captions, words, distinct captions and words, and, for each n, the distinct
        4-grams of the first n tenths of the data."""
        ngrams = self._ngrams.found()
        first = [np.uint64((1 << n) - 1) for n in range(1, TENTHS + 1)]
        return {
            "captions": int(self.lengths.sum()),
            "words": self.words,
            "distinct_captions": _size(self._captions),
            "vocabulary": _size(self._vocabulary),
            "distinct_4grams": [ngrams.estimate((ngrams.marks & bits) != 0) for bits in first],
            "distinct_4grams_exact": ngrams.share == 1,
        }


class _Keys(dict):
    """The key of a word; 0 for what is none. Forgets all when full."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _CACHED_WORDS:
            self.clear()
        bare = word.lower().strip(string.punctuation)
        key = self[word] = key_of(bare.encode()) if bare else 0
        return key


def _ngram_keys(words: np.ndarray) -> np.ndarray:
    """uint64 [max(N - 3, 0)]: a key for every four words that follow each other."""
    count = max(len(words) - N + 1, 0)
    keys = np.zeros(count, np.uint64)
    for place, factor in enumerate(_FACTORS):
        keys = (keys ^ words[place : place + count]) * factor
        keys ^= keys >> np.uint64(32)
    return keys


def _distinct(keys: np.ndarray, marks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Leaves out repeats within a batch; captions by a grammar repeat themselves a lot."""
    if not len(keys):
        return keys, marks
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.bitwise_or.reduceat(marks[order], starts)


def _size(keys: Distinct) -> int:
    found = keys.found()
    return found.estimate(np.ones(len(found.marks), bool))
