"""Reading captions back into attributes, and telling faithful rewrites from others."""

from pathlib import Path

import numpy as np
import pytest

from flip_jax.curate import caption_reader
from flip_jax.curate.caption_check import can_be_checked, check_rewrite
from flip_jax.curate.caption_reader import read_caption
from flip_jax.data import captions as grammar
from flip_jax.data.attributes import ATTRIBUTES


def table():
    """Cases of `caption_rewrites.txt`: source, rewrite, reason."""
    cases, source = [], ""
    for line in Path(__file__).with_name("caption_rewrites.txt").read_text("utf-8").splitlines():
        if line.startswith("  "):
            reason, rewrite = line.strip().split(":", 1)
            cases.append((source, rewrite.strip(), "" if reason == "the same" else reason))
        elif line and line[0] != "#":
            source = line
    return cases


@pytest.mark.parametrize(("source", "rewrite", "reason"), table())
def test_rewrites_by_hand(source, rewrite, reason):
    verdict = check_rewrite(source, rewrite)
    assert verdict.reason == reason, verdict
    assert verdict.accepted == (reason == "")
    assert can_be_checked(source)


@pytest.mark.parametrize(
    ("text", "claims"),
    [
        ("She isn't smiling.", "-Male -Smiling"),
        (
            "He doesn't wear glasses, a hat or a tie.",
            "+Male -Eyeglasses -Wearing_Hat -Wearing_Necktie",
        ),
        ("He wears no glasses and has a beard.", "+Male -Eyeglasses -No_Beard"),
        ("No beard, no glasses; a hat.", "+No_Beard -Eyeglasses +Wearing_Hat"),
        ("They are without glasses and a hat.", "-Eyeglasses -Wearing_Hat"),
        ("They have no beard and black hair.", "+No_Beard +Black_Hair"),
        ("They are without a beard and their hair is black.", "+No_Beard +Black_Hair"),
        (
            "Neither a hat nor glasses, but a necklace.",
            "-Wearing_Hat -Eyeglasses +Wearing_Necklace",
        ),
        ("It is not only wavy hair but also bangs.", "+Wavy_Hair +Bangs"),
        ("He is no longer young.", "+Male -Young"),
        ("He is hatless and beardless.", "+Male -Wearing_Hat +No_Beard"),
        ("A man free of facial hair.", "+Male +No_Beard -Mustache -Goatee -5_o_Clock_Shadow"),
        ("He is not clean-shaven.", "+Male -No_Beard"),
        ("She wears no makeup.", "-Male -Heavy_Makeup"),
        ("Her mouth is closed.", "-Male -Mouth_Slightly_Open"),
        ("The photo is not in focus.", "+Blurry"),
        ("A gray-haired, pale-skinned lady.", "-Male +Gray_Hair +Pale_Skin"),
        ("THE MAN’S NOSE IS BIG — AND POINTY!", "+Male +Big_Nose +Pointy_Nose"),
        ("A girl with her lips slightly apart.", "-Male +Young +Mouth_Slightly_Open"),
        ("The hair on his head is black.", "+Male +Black_Hair"),
        ("He is plump-lipped.", "+Male +Big_Lips"),
        ("She has bangs and is a blonde.", "-Male +Bangs +Blond_Hair"),
        ("", ""),
    ],
)
def test_what_a_sentence_says(text, claims):
    reading = read_caption(text)
    found = {f"{'+' if present else '-'}{name}" for name, present in reading.claims}
    assert found == set(claims.split()) and reading.strange == ()


@pytest.mark.parametrize(
    ("text", "strange"),
    [
        ("A man with blue eyes.", ("blue",)),
        ("A man with big eyes.", ("big eyes",)),
        ("A man whose eyes are black.", ("black eyes",)),
        ("A man with black hair and glasses, both black and new.", ("new", "black glasses")),
        ("A woman with makeup and facial hair.", ("makeup", "facial hair")),
        ("A man with glasses or a hat.", ("or",)),
        ("A man not showing facial hair.", ("facial hair",)),
        ("A man not without glasses.", ("without",)),
        ("Is he bald?", ("?",)),
        ("Ein Mann mit Hut.", ("ein", "mann", "mit", "hut")),
        ("A man: \U0001f600.", ("\U0001f600",)),
    ],
)
def test_what_is_not_understood(text, strange):
    assert read_caption(text).strange == strange


def test_captions_that_cannot_be_checked():
    assert can_be_checked("A man with black hair.")
    assert not can_be_checked("A man with black shoes.")
    assert not can_be_checked("A bald man with black hair.")
    assert not can_be_checked("The photo shows a person.")
    assert not can_be_checked("")


# The grammar's own captions

MEANINGS = {
    "man": "+Male",
    "woman": "-Male",
    "Older": "-Young",
    "Not_Smiling": "-Smiling",
    "No_Eyeglasses": "-Eyeglasses",
    "No_Hat": "-Wearing_Hat",
    "Beard": "-No_Beard",
    "Clean_Shaven": "+No_Beard -Mustache -Goatee -5_o_Clock_Shadow",
    **{name: f"+{name}" for name in ATTRIBUTES},
}


def sampled_captions(monkeypatch, count, seed):
    """Captions of random faces, and what the grammar was told to say in each."""
    told = []
    choose = grammar._choose

    def remember(facts, draws):
        told.append(choose(facts, draws))
        return told[-1]

    monkeypatch.setattr(grammar, "_choose", remember)
    rng = np.random.default_rng(seed)
    for _ in range(count):
        labels = rng.choice([-1, 0, 1], 40, p=rng.dirichlet([1, 1, 1]))
        if rng.random() < 0.5:
            labels[rng.random(40) < 0.7] = -1
        text = grammar.caption(labels, rng)
        signed = " ".join(MEANINGS.get(fact, "") for fact in told[-1]).split()
        claims = {(claim[1:], claim[0] == "+") for claim in signed}
        if {"Not_Smiling", "Mouth_Slightly_Open"} <= told[-1]:  # the grammar says one of them
            claims -= {("Smiling", False), ("Mouth_Slightly_Open", True)}
            claims |= (
                {("Smiling", False)} if "not smiling" in text else {("Mouth_Slightly_Open", True)}
            )
        yield text, claims


def test_captions_of_the_grammar_are_read_back_exactly(monkeypatch):
    number = 0
    for text, claims in sampled_captions(monkeypatch, 3000, seed=0):
        reading = read_caption(text)
        assert reading.claims == claims, text
        assert reading.strange == (), text
        number += len(claims)
    assert number > 15_000


def test_two_captions_differ_by_what_they_say(monkeypatch):
    """A caption of another face in place of a rewrite: each difference is found and named."""
    pairs = list(sampled_captions(monkeypatch, 1000, seed=1))
    for (source, wanted), (rewrite, said) in zip(pairs[::2], pairs[1::2], strict=True):
        verdict = check_rewrite(source, rewrite)
        names, other = {name for name, _ in wanted}, {name for name, _ in said}
        assert set(verdict.lost) == names - other
        assert set(verdict.invented) == other - names
        assert set(verdict.contradicted) == {
            name for name, value in wanted if (name, not value) in said
        }
        assert verdict.accepted == (wanted == said)


def test_another_caption_of_the_same_facts_is_accepted(monkeypatch):
    """As far as the grammar can say the same in other words, these are faithful rewrites."""
    by_claims = {}
    for text, claims in sampled_captions(monkeypatch, 3000, seed=2):
        by_claims.setdefault(frozenset(claims), set()).add(text)
    pairs = [sorted(texts)[:2] for texts in by_claims.values() if len(texts) > 1]
    assert len(pairs) > 50
    for source, rewrite in pairs:
        assert check_rewrite(source, rewrite).accepted


def test_the_lexicon_names_each_attribute_both_ways():
    """Each attribute can be said; a typing error in a rule is found when the file is read."""
    lexicon = caption_reader._Lexicon(caption_reader._LEXICON.read_text("ascii"))
    claims = {claim for entry in lexicon.entries.values() for claim in entry.claims}
    claims |= {claim for said in lexicon.adjectives.values() for claim in said}
    assert {name for name, _ in claims} == set(ATTRIBUTES)
    for rule in ("word +Hair: hair", "noun: hair", "word x: y | z", "word +Bald: bald\nbe: bald"):
        with pytest.raises(ValueError, match=r"caption_lexicon\.txt"):
            caption_reader._Lexicon(rule)
