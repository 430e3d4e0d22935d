"""Whether a rewritten caption says what the caption it was made from says: no more, no less."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

from flip_jax.curate.caption_reader import Claim, Reading, read_caption
from flip_jax.data.attributes import ATTRIBUTES

# What one face cannot have at a time.
_COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
_TEXTURES = ("Straight_Hair", "Wavy_Hair")
_OPPOSITES = {
    *combinations(_COLOURS, 2),
    _TEXTURES,
    ("Bangs", "Receding_Hairline"),
    *(("Bald", name) for name in (*_COLOURS, *_TEXTURES, "Bangs", "Receding_Hairline")),
    ("Goatee", "No_Beard"),
    ("5_o_Clock_Shadow", "No_Beard"),
}


@dataclass(frozen=True)
class Verdict:
    """How a rewritten caption differs from its source.

    Attributes:
      contradicted: attributes of which the rewrite says the opposite of the source, or two things
        that cannot both be.
      lost: attributes of which only the source says something.
      invented: attributes of which only the rewrite says something.
      strange: what is not understood, which may be anything.
    """

    contradicted: tuple[str, ...]
    lost: tuple[str, ...]
    invented: tuple[str, ...]
    strange: tuple[str, ...]

    @property
    def accepted(self) -> bool:
        return not (self.contradicted or self.lost or self.invented or self.strange)

    @property
    def reason(self) -> str:
        """The gravest difference in a few words, e.g. `lost Eyeglasses`; empty if accepted."""
        for name in ("contradicted", "lost", "invented"):
            if found := getattr(self, name):
                return f"{name} {found[0]}"
        return "words not understood" if self.strange else ""


def check_rewrite(source: str, rewrite: str) -> Verdict:
    """Compares a rewritten caption with its source.

    Args:
      source: a caption that is understood whole, such as one of the grammar's; see
        `can_be_checked`.
      rewrite: any text.
    """
    return compare(read_caption(source).claims, read_caption(rewrite))


def can_be_checked(source: str) -> bool:
    """Whether a caption is understood whole and says something that can be so."""
    reading = read_caption(source)
    return not reading.strange and bool(reading.claims) and not _contradictions(reading.claims)


def compare(wanted: frozenset[Claim], reading: Reading) -> Verdict:
    """Compares what a caption says with what it should say."""
    expected, said = dict(wanted), {attribute for attribute, _ in reading.claims}
    opposite = {name for name, value in reading.claims if expected.get(name, value) != value}
    contradicted = opposite | _contradictions(reading.claims)
    return Verdict(
        contradicted=_in_order(contradicted),
        lost=_in_order(expected.keys() - said),
        invented=_in_order(said - expected.keys()),
        strange=reading.strange,
    )


def _contradictions(claims: frozenset[Claim]) -> set[str]:
    """Attributes that are claimed both ways, or together with what excludes them."""
    present = {attribute for attribute, value in claims if value}
    absent = {attribute for attribute, value in claims if not value}
    pairs = [pair for pair in _OPPOSITES if present.issuperset(pair)]
    return (present & absent).union(*pairs)


def _in_order(names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in ATTRIBUTES if name in names)
