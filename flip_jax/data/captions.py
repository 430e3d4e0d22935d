"""A probabilistic context-free grammar from the 40 attributes to a few English sentences.

FaceCaption-15M builds its raw texts the same way: sentences of a noun phrase and a verb phrase of
the kinds "wear", "are" and "have", several short ones per face, about 30 words together.

Three steps make a caption: `_facts` settles what may be said at all, `_plan` draws what is said in
which sentence, and the grammar, the table `caption_grammar.txt`, says it. Labels that contradict
each other are settled as follows, so that no caption does:

- Two hair colours, straight and wavy hair, or bangs and a receding hairline: neither is said.
- `Bald` silences every other label of the hair; a goatee or stubble silences `No_Beard`.
- A beard of any kind on a woman, lipstick or heavy make-up on a man are nearly always wrong labels
  (0.1 % and 0.3 % of CelebA) and are not said; the gender is.

Absent attributes are said only where a caption would say them: an older face, a beard
(`No_Beard` 0), a clean-shaven man, a face that does not smile, no glasses, no hat. An unknown
attribute is never said; a face of unknown gender is "this person" and "they".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np

from flip_jax.data.attributes import ATTRIBUTES, UNKNOWN

# Unit: (group, facts). Units of a group stay together in a caption, a unit stays in one sentence.
_COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
_TEXTURES = ("Straight_Hair", "Wavy_Hair")
_KINDS = {"colour": _COLOURS, "texture": _TEXTURES, "age": ("Young", "Older")}
_UNITS = {
    "hair": ("hair", (*_COLOURS, *_TEXTURES)),
    "bangs": ("hair", ("Bangs",)),
    "hairline": ("hair", ("Receding_Hairline",)),
    "bald": ("hair", ("Bald",)),
    "face": ("face", ("Oval_Face", "Chubby")),
    "chin": ("face", ("Double_Chin",)),
    "cheekbones": ("face", ("High_Cheekbones",)),
    "cheeks": ("face", ("Rosy_Cheeks",)),
    "skin": ("face", ("Pale_Skin",)),
    "brows": ("eyes", ("Arched_Eyebrows", "Bushy_Eyebrows")),
    "eyes": ("eyes", ("Narrow_Eyes", "Bags_Under_Eyes")),
    "nose": ("nose and mouth", ("Big_Nose", "Pointy_Nose")),
    "lips": ("nose and mouth", ("Big_Lips",)),
    "mustache": ("beard", ("Mustache",)),
    "goatee": ("beard", ("Goatee",)),
    "stubble": ("beard", ("5_o_Clock_Shadow",)),
    "beard": ("beard", ("Beard", "No_Beard", "Clean_Shaven")),
    "sideburns": ("beard", ("Sideburns",)),
    "glasses": ("accessories", ("Eyeglasses",)),
    "hat": ("accessories", ("Wearing_Hat",)),
    "earrings": ("accessories", ("Wearing_Earrings",)),
    "necklace": ("accessories", ("Wearing_Necklace",)),
    "necktie": ("accessories", ("Wearing_Necktie",)),
    "lipstick": ("make-up", ("Wearing_Lipstick",)),
    "makeup": ("make-up", ("Heavy_Makeup",)),
    "smile": ("expression", ("Smiling", "Mouth_Slightly_Open", "Not_Smiling")),
    "without": ("absence", ("No_Eyeglasses", "No_Hat")),
    "impression": ("impression", ("Attractive", "Young", "Older")),
}
_UNIT_FACTS = [fact for _, facts in _UNITS.values() for fact in facts]
_FRAMES = {"have": 4.0, "wear": 4.0, "be": 4.0, "clause": 1.0}  # how often, where possible

# See the module's docstring for what these three settle.
_EXCLUSIVE = (_COLOURS, _TEXTURES, ("Bangs", "Receding_Hairline"))
_SILENCES = {
    "Bald": (*_COLOURS, *_TEXTURES, "Bangs", "Receding_Hairline"),
    "Goatee": ("No_Beard",),
    "5_o_Clock_Shadow": ("No_Beard",),
    "Male": ("Wearing_Lipstick", "Heavy_Makeup"),
}
_MALE_ONLY = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns", "No_Beard")
_NEGATIVES = {
    "Young": "Older",
    "Smiling": "Not_Smiling",
    "Eyeglasses": "No_Eyeglasses",
    "Wearing_Hat": "No_Hat",
}
_RARE = ("Not_Smiling", "No_Eyeglasses", "No_Hat", "No_Beard", "Clean_Shaven")

# How strongly a fact is preferred when there are more than fit; 1 if not named. What tells faces
# apart at a glance leads.
_PROMINENCE = dict.fromkeys((*_COLOURS, "Bald", "Eyeglasses", "Wearing_Hat"), 5.0)
_PROMINENCE |= dict.fromkeys((*_TEXTURES, "Bangs", "Smiling", "Older", "Beard"), 2.5)
_PROMINENCE |= dict.fromkeys(("Goatee", "Mustache", "Wearing_Necktie"), 2.5)
_SIZES = (6, 10)  # facts per caption, where so many are known
_ENOUGH = 5  # with more facts than this, those of _RARE are mostly left out

_RULE = re.compile(r"(\S+)(?: \[(.*)\])? -> (.*)")
Draws = Iterator[float]  # uniform in [0, 1)


class _Rule:
    """One line of the grammar: a condition on facts and weighted lists of tokens."""

    def __init__(self, condition: str, alternatives: str):
        words = condition.split()
        self.needs = frozenset(word for word in words if word[0] != "-")
        self.excludes = frozenset(word[1:] for word in words if word[0] == "-")
        self.alternatives = []
        total = 0.0
        for alternative in alternatives.split("|"):
            weight, _, text = alternative.rpartition(":")
            total += float(weight or 1)
            self.alternatives.append((total, text.split()))
        self.total = total

    def holds(self, facts: frozenset[str]) -> bool:
        return self.needs <= facts and not (self.excludes & facts)

    def draw(self, draws: Draws) -> list[str]:
        point = next(draws) * self.total
        for bound, tokens in self.alternatives:
            if point < bound:
                return tokens
        return tokens  # rounding of a draw just below 1


def _read(path: Path) -> dict[str, list[_Rule]]:
    rules: dict[str, list[_Rule]] = {}
    for line in re.sub(r"\n +", " ", path.read_text("ascii")).split("\n"):
        if line and line[0] != "#":
            symbol, condition, alternatives = _RULE.fullmatch(line).groups()
            rules.setdefault(symbol, []).append(_Rule(condition or "", alternatives))
    return rules


_RULES = _read(Path(__file__).with_name("caption_grammar.txt"))
_UNIT_RULES = {
    unit: [(frame, _RULES[f"{unit}.{frame}"]) for frame in _FRAMES if f"{unit}.{frame}" in _RULES]
    for unit in _UNITS
}
_ORDER = {unit: index for index, unit in enumerate(_UNITS)}


def caption(attributes: np.ndarray, rng: np.random.Generator) -> str:
    """Draws one caption.

    Args:
        attributes: int [40] in the order of `ATTRIBUTES`: 1 present, 0 absent, -1 unknown.
        rng: source of the choices.

    Returns:
        One to four sentences of 4 to about 60 words together; the less is known about the face,
        the shorter.

    Raises:
        ValueError: If `attributes` is not such a vector.
    """
    return _write(_facts(attributes), _uniform(rng))


def captions(attributes: np.ndarray, seed: int, count: int) -> list[str]:
    """Draws `count` captions that depend on `attributes` and `seed` only.

    A repeated caption is drawn again up to eight times: captions are distinct unless next to
    nothing is known about the face. The first n of them do not depend on `count`.

    Args:
        attributes: int [40] in the order of `ATTRIBUTES`: 1 present, 0 absent, -1 unknown.
        seed: 0 or larger.
        count: number of captions, 0 or larger.

    Raises:
        ValueError: If `attributes` is not such a vector, or `seed` or `count` is negative.
    """
    facts = _facts(attributes)
    if seed < 0 or count < 0:
        raise ValueError(f"seed and count must be 0 or larger, got seed={seed}, count={count}.")
    labels = [value - UNKNOWN for value in np.asarray(attributes).tolist()]
    draws = _uniform(np.random.default_rng([seed, *labels]))
    texts: list[str] = []
    for _ in range(count):
        for _ in range(9):
            text = _write(facts, draws)
            if text not in texts:
                break
        texts.append(text)
    return texts


def _uniform(rng: np.random.Generator) -> Draws:
    while True:
        yield from rng.random(64).tolist()  # one call per number would take half of the time


def _facts(attributes: np.ndarray) -> frozenset[str]:
    """Returns what may be said: attribute names, and names for what an absent one means."""
    attributes = np.asarray(attributes)
    if attributes.shape != (len(ATTRIBUTES),) or attributes.dtype.kind not in "iu":
        raise ValueError(
            f"attributes must be an integer vector of shape ({len(ATTRIBUTES)},), got "
            f"{attributes.dtype} {attributes.shape}; see flip_jax.data.attributes for the order."
        )
    values = attributes.tolist()
    for name, value in zip(ATTRIBUTES, values, strict=True):
        if value not in (0, 1, UNKNOWN):
            raise ValueError(f"attribute {name} is {value}; allowed: 1, 0, -1 (unknown).")
    present = {name for name, value in zip(ATTRIBUTES, values, strict=True) if value == 1}
    absent = {name for name, value in zip(ATTRIBUTES, values, strict=True) if value == 0}
    silent: set[str] = set()
    for names in _EXCLUSIVE:
        if len(present.intersection(names)) > 1:
            silent.update(names)
    for name, names in _SILENCES.items():
        if name in present:
            silent.update(names)
    facts = present - silent
    if "Male" in absent:
        facts.difference_update(_MALE_ONLY)
    elif "No_Beard" in absent and not facts & {"Goatee", "5_o_Clock_Shadow"}:
        facts.add("Beard")
    if "Male" not in present:
        facts.discard("No_Beard")  # of a woman or of anyone it reads odd
    elif "No_Beard" in facts and {"Goatee", "Mustache", "5_o_Clock_Shadow"} <= absent:
        facts.remove("No_Beard")
        facts.add("Clean_Shaven")
    facts.update(fact for name, fact in _NEGATIVES.items() if name in absent)
    facts.discard("Male")
    gender = "man" if "Male" in present else "woman" if "Male" in absent else "person"
    return frozenset(facts | {gender})


def _write(facts: frozenset[str], draws: Draws) -> str:
    """Draws a plan and expands the grammar for each of its sentences."""
    chosen = _choose(facts, draws)
    plan, chosen = _plan(chosen, draws)
    sentences = [
        _Sentence(chosen, units, not index, draws).text("sentence" if index else "opening")
        for index, units in enumerate(plan)
    ]
    if "Blurry" in chosen:
        index = 0 if next(draws) < 0.2 else len(sentences)
        sentences.insert(index, _Sentence(chosen, [], False, draws).text("blurry"))
    return " ".join(sentences)


def _choose(facts: frozenset[str], draws: Draws) -> frozenset[str]:
    """Draws the facts of one caption: a weighted sample without replacement."""
    candidates = [fact for fact in _UNIT_FACTS if fact in facts]  # a set has no repeatable order
    share = 0.15 if len(candidates) > _ENOUGH else 0.5
    candidates = [fact for fact in candidates if fact not in _RARE or next(draws) < share]
    low, high = _SIZES
    size = low + int(next(draws) * (high - low + 1))
    if len(candidates) > size:  # Efraimidis and Spirakis 2006: the largest u ** (1 / weight)
        keys = {fact: next(draws) ** (1 / _PROMINENCE.get(fact, 1.0)) for fact in candidates}
        candidates = sorted(candidates, key=keys.__getitem__)[-size:]
    chosen = {*candidates, *(facts & {"man", "woman", "person"})}
    if "Blurry" in facts and next(draws) < 0.8:
        chosen.add("Blurry")
    chosen.update(kind for kind, names in _KINDS.items() if not chosen.isdisjoint(names))
    return frozenset(chosen)


def _plan(chosen: frozenset[str], draws: Draws) -> tuple[list[list[str]], frozenset[str]]:
    """Draws the units of each sentence, and whether age and looks stand at the first noun.

    Returns:
        The units of the opening and of one to three more sentences, and `chosen` with `in_noun`
        added where it holds.
    """
    units = [unit for unit, (_, facts) in _UNITS.items() if not chosen.isdisjoint(facts)]
    impression = "impression" in units
    if impression:
        units.remove("impression")
        if next(draws) < 0.7 or not units:
            impression, chosen = False, chosen | {"in_noun"}
    places = {_UNITS[unit][0]: next(draws) for unit in units}
    if "hair" in places:
        places["hair"] *= 0.3  # mostly first
    if "absence" in places:
        places["absence"] = 1.0  # last
    keys = {unit: (places[_UNITS[unit][0]], next(draws)) for unit in units}
    units.sort(key=keys.__getitem__)
    first = min(len(units), 1 + int(next(draws) * 2.5))
    opening, rest = units[:first], units[first:]
    if impression:
        rest.insert(int(next(draws) * (len(rest) + 1)), "impression")
    per_sentence = 2 + int(next(draws) * 2.5)
    count = min(-(-len(rest) // per_sentence), 2 if "Blurry" in chosen else 3)
    bounds = [len(rest) * index // count for index in range(count + 1)] if count else []
    return [opening, *(rest[a:b] for a, b in pairwise(bounds))], chosen


class _Sentence:
    """The expansion of one sentence: its facts, and its units by the frame they stand in."""

    def __init__(self, chosen: frozenset[str], units: list[str], opening: bool, draws: Draws):
        self.draws = draws
        self.frames: dict[str, list[str]] = {}
        clause = not opening and "impression" not in units  # at most one, which that one must be
        for unit in units:
            frame = self._frame(unit, chosen, clause or unit == "impression")
            clause = clause and frame != "clause"
            self.frames.setdefault(frame, []).append(unit)
        if "be" in self.frames:
            self.frames["be"].sort(key=_ORDER.__getitem__)  # adjectives before participles
        self.facts = chosen.union(self.frames)
        if len(self.frames) > ("clause" in self.frames):
            self.facts |= {"predicate"}

    def _frame(self, unit: str, chosen: frozenset[str], clause: bool) -> str:
        frames = [
            frame
            for frame, rules in _UNIT_RULES[unit]
            if (clause or frame != "clause") and any(rule.holds(chosen) for rule in rules)
        ]
        if len(frames) == 1:
            return frames[0]
        point = next(self.draws) * sum(_FRAMES[frame] for frame in frames)
        for frame in frames:
            point -= _FRAMES[frame]
            if point < 0:
                break
        return frame

    def text(self, symbol: str) -> str:
        """Expands `symbol` and spells it as a sentence."""
        tokens: list[str] = []
        self._expand(symbol, tokens)
        return _spell(tokens)

    def _expand(self, symbol: str, tokens: list[str]) -> None:
        rule = next(rule for rule in _RULES[symbol] if rule.holds(self.facts))
        for token in rule.draw(self.draws):
            if token[0] == "<":
                self._expand(token[1:-1], tokens)
            elif token[0] == "{":
                self._list(token[1:-1], tokens)
            else:
                tokens.append(token)

    def _list(self, frame: str, tokens: list[str]) -> None:
        units = self.frames[frame]
        for index, unit in enumerate(units):
            if index:
                tokens.append("and" if index == len(units) - 1 else ",")
            self._expand(f"{unit}.{frame}", tokens)


def _spell(tokens: list[str]) -> str:
    """Joins tokens: agreement of verbs, an before vowels, commas, capital letter, full stop."""
    plural = False
    words: list[str] = []
    for token in tokens:
        if token == ",":
            words[-1] += ","
            continue
        if "~" in token:
            token = token.split("~")[plural]
        elif token == "they":
            plural = True
        elif token in ("person", "individual"):  # what "they" takes turns with
            plural = False
        if words and words[-1] == "a" and token[0] in "aeiou":
            words[-1] = "an"
        words.append(token)
    text = " ".join(words)
    return f"{text[0].upper()}{text[1:]}."
