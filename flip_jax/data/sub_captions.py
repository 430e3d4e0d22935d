"""A part of a caption for the contrastive loss, which learns little from the end of a long one.

Source: CLIPS, arXiv 2411.16828: a short part of a long caption beats the caption cut off.
"""

from __future__ import annotations

import re
from typing import Literal

import numpy as np

_BETWEEN_SENTENCES = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*(?=\S)")


def sentences(caption: str) -> list[str]:
    """The sentences of a caption in order, at least one."""
    return _BETWEEN_SENTENCES.split(caption.strip())


def draw_part(caption: str, kind: Literal["sentence", "block"], rng: np.random.Generator) -> str:
    """One sentence; or a block of them, one or more in a row. Every choice is equally likely."""
    found = sentences(caption)
    spans = [(i, i + 1) for i in range(len(found))]
    if kind == "block":
        spans = [(i, j) for i in range(len(found)) for j in range(i + 1, len(found) + 1)]
    first, end = spans[rng.integers(len(spans))]
    return " ".join(found[first:end])
