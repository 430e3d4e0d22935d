"""What captions say of the 40 attributes, as the curation's reader takes it, against the labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flip_jax.curate.caption_reader import read_caption
from flip_jax.data.attributes import ATTRIBUTE_INDEX
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.intervals import Interval, mean_of, measure

# Of each picture's known labels, in percent; how much of what is stated is right; captions that
# hold a word which is not understood; length.
METRICS = ("stated rightly", "stated wrongly", "right of stated", "not understood", "words")

Scores = dict[str, list[Interval]]  # row -> METRICS


def compare(captions: Sequence[str], faces: Faces, tokenizer: Tokenizer, seed: int = 0) -> Scores:
    """The captions beside two others of the same faces.

    `own`: a stored caption of the picture, as the tokenizer leaves it: what the reader makes of a
    caption that is right. `another's`: such a one of somebody else, drawn at random, which says
    what is true of most.

    Args:
      captions: one per face; faces: with labels.
    """
    rng = np.random.default_rng(seed)
    rows = {"captions": list(captions)}
    if all(faces.captions):
        own = [tokenizer.decode(ids) for ids in tokenizer([c[0] for c in faces.captions])[0]]
        rows |= {"own": own, "another's": [own[i] for i in _others(faces.groups, rng)]}
    return {name: _measure(texts, faces) for name, texts in rows.items()}


def _others(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each row a random one of another group; itself where there is none."""
    found = np.arange(len(groups))
    for row, group in enumerate(groups):
        others = np.flatnonzero(groups != group)
        if len(others):
            found[row] = rng.choice(others)
    return found


def _measure(captions: Sequence[str], faces: Faces) -> list[Interval]:
    counts = np.array([count(c, a) for c, a in zip(captions, faces.attributes, strict=True)])
    right, wrong, known, strange, words = counts.T.astype(np.float64)
    per_picture = mean_of(np.stack([right / known, wrong / known, strange, words], axis=1))

    def statistic(weights: np.ndarray) -> np.ndarray:
        rightly, wrongly, odd, length = per_picture(weights).T
        with np.errstate(invalid="ignore", divide="ignore"):
            precision = (weights @ right) / (weights @ (right + wrong))
        shares = [rightly, wrongly, precision, odd]
        return np.stack([*(100 * share for share in shares), length], axis=1)

    return measure(statistic, faces.groups)


def count(caption: str, labels: np.ndarray) -> tuple[int, int, int, bool, int]:
    """(labels stated rightly, wrongly, labels known, a word not understood, words)

    An attribute that is stated both ways counts once each way.

    Args:
      labels: int8 [40], 1 present, 0 absent, -1 unknown.
    """
    reading = read_caption(caption)
    stated = [(labels[ATTRIBUTE_INDEX[name]], value) for name, value in reading.claims]
    right = sum(label == value for label, value in stated if label >= 0)
    wrong = sum(label != value for label, value in stated if label >= 0)
    known = int(np.sum(labels >= 0))
    return int(right), int(wrong), known, bool(reading.strange), len(caption.split())


def table(scores: Mapping[str, Sequence[Interval]]) -> str:
    """Markdown."""
    lines = [["", *METRICS], ["---"] * (len(METRICS) + 1)]
    lines += [[name, *map(str, numbers)] for name, numbers in scores.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plain(scores: Mapping[str, Sequence[Interval]]) -> dict[str, Any]:
    """JSON types."""
    return {
        row: {name: number.to_dict() for name, number in zip(METRICS, numbers, strict=True)}
        for row, numbers in scores.items()
    }
