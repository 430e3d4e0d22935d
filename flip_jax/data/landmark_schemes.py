"""What the points of a landmark scheme are: known by their number; no jax.

`left` and `right` are those of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Scheme:
    """A way to place P points on a face.

    Attributes:
      points: P.
      name: for messages.
      pairs: points that change places in a mirrored picture; all others stay what they are.
      corners: the outer corners of the left and right eye; None where there are none.
      pupils: points whose means are the pupils, left and right; None where there are none.
    """

    points: int
    name: str
    pairs: tuple[tuple[int, int], ...]
    corners: tuple[int, int] | None = None
    pupils: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @cached_property
    def mirror(self) -> np.ndarray:
        """int [P]: point p of the mirrored picture is point mirror[p] of the picture, mirrored."""
        order = np.arange(self.points)
        for left, right in self.pairs:
            order[[left, right]] = right, left
        return order


def _pairs(lefts: str, rights: str) -> tuple[tuple[int, int], ...]:
    """Pairs of two lists of ranges: `"0-2 5"` and `"8-6 3"` are 0-8, 1-7, 2-6, 5-3."""
    return tuple(zip(_numbers(lefts), _numbers(rights), strict=True))


def _numbers(ranges: str) -> list[int]:
    found = []
    for part in ranges.split():
        first, _, last = part.partition("-")
        first, last = int(first), int(last or first)
        step = 1 if last >= first else -1
        found += range(first, last + step, step)
    return found


# Sources: CelebA's list of five landmarks; AFLW without the ears (eyes 6-11 with their pupils 7 and
# 10, as in farl/experiments/face_alignment/scorers); iBUG's 68 points of 300-W; WFLW's 98.
SCHEMES = {
    scheme.points: scheme
    for scheme in (
        Scheme(5, "eyes, nose and corners of the mouth", _pairs("0 3", "1 4"), None, ((0,), (1,))),
        Scheme(
            19,
            "AFLW-19",
            _pairs("0-2 6-8 12 15", "5-3 11-9 14 17"),
            (6, 11),
            ((7,), (10,)),
        ),
        Scheme(
            68,
            "iBUG",
            _pairs(
                "0-7 17-21 31 32 36-39 40 41 48-50 58 59 60 61 67",
                "16-9 26-22 35 34 45-42 47 46 54-52 56 55 64 63 65",
            ),
            (36, 45),
            (tuple(range(36, 42)), tuple(range(42, 48))),
        ),
        Scheme(
            98,
            "WFLW",
            _pairs(
                "0-15 33-37 38-41 55 56 60-64 65-67 76-78 86 87 88 89 95 96",
                "32-17 46-42 50-47 59 58 72-68 75-73 82-80 84 83 92 91 93 97",
            ),
            (60, 72),
            ((96,), (97,)),
        ),
    )
}


def scheme_of(points: int) -> Scheme | None:
    """The scheme with so many points; None where it is not known."""
    return SCHEMES.get(points)
