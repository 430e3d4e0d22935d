"""Captions say what the labels say, in correct English.

The checks read the text with a keyword table of their own: what a caption claims must be in the
labels, and the words that claim nothing must be among the few that the grammar needs as glue.
"""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES
from flip_jax.data.captions import caption, captions

ROOT = Path(__file__).parents[1]
LABELS = ROOT.parent / "shared" / "celeba_anno" / "celeba_labels_all.parquet"

# In this order, each match is taken out of the text. Negations come before what they negate.
CLAIMS = (
    (r"not wearing glasses or a hat|neither glasses nor a hat", "Eyeglasses=0 Wearing_Hat=0"),
    (r"not wearing glasses|without glasses", "Eyeglasses=0"),
    (r"not wearing a hat|without a hat", "Wearing_Hat=0"),
    (r"not smiling", "Smiling=0"),
    (r"without a beard|clean-shaven", "No_Beard=1"),
    (r"beard", "No_Beard=0"),
    (r"five o'clock shadow|5 o'clock shadow|stubble", "5_o_Clock_Shadow=1"),
    (r"goatee", "Goatee=1"),
    (r"mo?ustache", "Mustache=1"),
    (r"sideburns", "Sideburns=1"),
    (r"(big|large), (pointy|pointed) nose", "Big_Nose=1 Pointy_Nose=1"),
    (r"nose is (big|large) and (pointy|pointed)", "Big_Nose=1 Pointy_Nose=1"),
    (r"(big|large|prominent) nose|nose is (big|large)", "Big_Nose=1"),
    (r"(pointy|pointed|sharp) nose|nose is (pointy|pointed)", "Pointy_Nose=1"),
    (r"(big|full|plump) lips|lips are (big|full)", "Big_Lips=1"),
    (r"slightly parted lips|lips are slightly parted", "Mouth_Slightly_Open=1"),
    (r"slightly open mouth|mouth( is)? (slightly|a little) open", "Mouth_Slightly_Open=1"),
    (r"(bushy|thick), arched eyebrows", "Arched_Eyebrows=1 Bushy_Eyebrows=1"),
    (r"arched, (bushy|thick) eyebrows", "Arched_Eyebrows=1 Bushy_Eyebrows=1"),
    (r"arched eyebrows are (bushy|thick)", "Arched_Eyebrows=1 Bushy_Eyebrows=1"),
    (r"eyebrows are (bushy|thick) and arched", "Arched_Eyebrows=1 Bushy_Eyebrows=1"),
    (r"(arched|curved) eyebrows|eyebrows are arched", "Arched_Eyebrows=1"),
    (r"(bushy|thick) eyebrows|eyebrows are (bushy|thick)", "Bushy_Eyebrows=1"),
    (r"narrow eyes|eyes are narrow", "Narrow_Eyes=1"),
    (r"bags under (her|his|their) eyes|eye bags", "Bags_Under_Eyes=1"),
    (r"(eyes have )?(\w+ )?bags under them", "Bags_Under_Eyes=1"),
    (r"high, prominent cheekbones|(high|prominent) cheekbones", "High_Cheekbones=1"),
    (r"cheekbones are high", "High_Cheekbones=1"),
    (r"(rosy|pinkish|flushed) cheeks|cheeks are rosy", "Rosy_Cheeks=1"),
    (r"pale (skin|complexion)|(skin|complexion) is pale", "Pale_Skin=1"),
    (r"chubby, oval face|oval, chubby face", "Chubby=1 Oval_Face=1"),
    (r"the shape of (her|his|their) face is oval", "Oval_Face=1"),
    (r"oval(-shaped)? face|face is oval|face has an oval shape", "Oval_Face=1"),
    (r"(a little |somewhat )?chubby( face)?", "Chubby=1"),
    (r"double chin", "Double_Chin=1"),
    (r"bald( head)?|head is bald", "Bald=1"),
    (r"receding hairline|hairline is receding", "Receding_Hairline=1"),
    (r"bangs( over the forehead)?|fringe", "Bangs=1"),
    (r"\bblack", "Black_Hair=1"),
    (r"\bblonde?", "Blond_Hair=1"),
    (r"\bbrown", "Brown_Hair=1"),
    (r"\bgr[ae]y", "Gray_Hair=1"),
    (r"\bwavy", "Wavy_Hair=1"),
    (r"\bstraight", "Straight_Hair=1"),
    (r"a pair of glasses|eyeglasses|glasses|spectacles", "Eyeglasses=1"),
    (r"\bhat( on (her|his|their) head)?", "Wearing_Hat=1"),
    (r"(a pair of )?earrings", "Wearing_Earrings=1"),
    (r"necklace( around (her|his|their) neck)?", "Wearing_Necklace=1"),
    (r"necktie|\btie", "Wearing_Necktie=1"),
    (r"lipstick( on (her|his|their) lips)?", "Wearing_Lipstick=1"),
    (r"heavy make-?up|a lot of makeup", "Heavy_Makeup=1"),
    (r"smiling|smile( on (her|his|their) face)?", "Smiling=1"),
    (r"blurry|out of focus", "Blurry=1"),
    (r"young|youthful", "Young=1"),
    (r"older|mature", "Young=0"),
    (r"attractive|handsome|pretty|good-looking", "Attractive=1"),
    (r"\b(wo)(man)\b|lady|\bshe\b|\bher\b", "Male=0"),
    (r"\bman\b|gentleman|\bhe\b|\bhis\b", "Male=1"),
)
PATTERNS = [
    (re.compile(pattern), {(c[:-2], int(c[-1])) for c in claims.split()})
    for pattern, claims in CLAIMS
]
GLUE = """
a an and appear appears are be can chin color depicts face features has have hair here image in is
individual look looks of on one person photo photograph picture pictured portrait puffy see seen
shown shows snapshot some that the their there they this visible we wear wearing wears who with
"""
COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
BEARDS = ("5_o_Clock_Shadow", "Goatee", "Mustache", "Sideburns")
SINGULAR_VERBS = {"has", "is", "wears", "looks", "appears", "shows", "features", "depicts"}
PLURAL_VERBS = {"have", "are", "wear", "look", "appear", "see"}
PLURAL_NOUNS = {"eyes", "lips", "eyebrows", "cheekbones", "cheeks"}
LOCAL_NOUNS = {"hair", "nose", "mouth", "face", "skin", "complexion", "head", "hairline"}
PEOPLE = {"she", "he", "woman", "man", "lady", "gentleman", "person", "individual"}
PHOTOS = {"photo", "photograph", "picture", "image", "portrait", "snapshot"}


def read(text: str) -> tuple[set[tuple[str, int]], list[str]]:
    """Returns the claims (attribute, value) of a caption and the words that claim nothing."""
    rest = text.lower()
    claims: set[tuple[str, int]] = set()
    for pattern, found in PATTERNS:
        rest, count = pattern.subn(" # ", rest)
        if count:
            claims |= found
    return claims, re.findall(r"[\w'-]+", rest.replace("#", " "))


def check_truth(text: str, attributes: np.ndarray) -> set[tuple[str, int]]:
    """Checks that all that is said is in the labels and contradicts nothing; returns the claims."""
    claims, rest = read(text)
    for name, value in claims:
        assert attributes[ATTRIBUTE_INDEX[name]] == value, (name, value, text)
    invented = set(rest) - set(GLUE.split())
    assert not invented, text
    said = {name for name, value in claims if value == 1}
    assert len(said.intersection(COLOURS)) <= 1, text
    assert not said >= {"Straight_Hair", "Wavy_Hair"}, text
    assert not said >= {"Bangs", "Receding_Hairline"}, text
    hair = {*COLOURS, "Straight_Hair", "Wavy_Hair", "Bangs", "Receding_Hairline"}
    assert "Bald" not in said or not said & hair, text
    if "No_Beard" in said:
        assert not said & {"Goatee", "5_o_Clock_Shadow"}, text
    if "clean-shaven" in text:
        assert not said & set(BEARDS) - {"Sideburns"}, text
    if ("Male", 0) in claims:
        assert not said.intersection(BEARDS) and ("No_Beard", 0) not in claims, text
    if ("Male", 1) in claims:
        assert not said & {"Wearing_Lipstick", "Heavy_Makeup"}, text
    gender = attributes[ATTRIBUTE_INDEX["Male"]]
    assert gender == -1 or ("Male", gender) in claims, text  # never left out
    if gender != -1:
        assert not {"person", "individual", "they", "their"} & set(text.lower().split()), text
    return claims


def check_form(text: str) -> None:
    """Checks sentences, articles, agreement and length."""
    assert text == text.strip() and "  " not in text and "\n" not in text, text
    assert not re.search(r"[^A-Za-z0-9 .,'-]| [.,]|,\.|,,|[.,][A-Za-z]", text), text
    assert text.endswith("."), text
    sentences = text.removesuffix(".").split(". ")
    assert 1 <= len(sentences) <= 4, text
    assert 4 <= len(text.split()) <= 75, text
    for sentence in sentences:
        assert sentence[0].isupper() and len(sentence.split()) >= 3, text
        assert not re.search(r"\b[Aa] [aeiou]|\b[Aa]n [^aeiou]", sentence), text
        assert not re.search(r"\b(\w+) \1\b", sentence.lower()), text
        check_agreement(sentence)


def check_agreement(sentence: str) -> None:
    """Checks every verb against its subject: "her eyes" and the like, or else the last person."""
    plural = False
    words = re.findall(r"[\w'-]+", sentence.lower())
    for index, word in enumerate(words):
        before = words[index - 1] if index else ""
        if word in ("they", "we"):
            plural = True
        elif word in PEOPLE | PHOTOS:
            plural = False
        elif word in SINGULAR_VERBS | PLURAL_VERBS:
            # "her brows are", "her thick brows are", but not "bags under her eyes is"
            subject = re.search(r"(\w*) ?(her|his|their)( \w+)? \w+$", " ".join(words[:index]))
            if before in PLURAL_NOUNS and subject and subject[1] not in ("under", "on"):
                expected = True
            elif before in LOCAL_NOUNS | {"this", "here", "there"}:
                expected = False
            else:
                expected = plural
            assert (word in PLURAL_VERBS) == expected, (word, sentence)


def labels(**values: int) -> np.ndarray:
    """Returns labels with the given attributes, all others unknown."""
    attributes = np.full(40, -1, np.int8)
    for name, value in values.items():
        attributes[ATTRIBUTE_INDEX[name]] = value
    return attributes


def random_labels(count: int, seed: int) -> np.ndarray:
    """Returns int8 [count, 40], as many present as in CelebA, some unknown."""
    rng = np.random.default_rng(seed)
    attributes = (rng.random((count, 40)) < 0.25).astype(np.int8)
    attributes[:, ATTRIBUTE_INDEX["Male"]] = rng.random(count) < 0.5
    attributes[:, ATTRIBUTE_INDEX["No_Beard"]] = rng.random(count) < 0.8
    attributes[rng.random((count, 40)) < rng.choice([0, 0.2, 0.6], (count, 1))] = -1
    return attributes


vectors = st.lists(st.sampled_from([-1, 0, 1]), min_size=40, max_size=40).map(
    lambda values: np.array(values, np.int8)
)


@settings(max_examples=300, deadline=None)
@given(vectors, st.integers(0, 2**32))
def test_any_labels_give_true_and_correct_captions(attributes, seed):
    for text in captions(attributes, seed, 3):
        check_truth(text, attributes)
        check_form(text)


@pytest.mark.parametrize("value", [-1, 0, 1])
@pytest.mark.parametrize("gender", [-1, 0, 1])
def test_constant_labels(value, gender):
    attributes = np.full(40, value, np.int8)
    attributes[ATTRIBUTE_INDEX["Male"]] = gender
    for text in captions(attributes, 0, 50):
        check_form(text)
        claims = check_truth(text, attributes)
        assert value != -1 or claims <= {("Male", gender)}


def test_many_faces():
    everything = set()
    words = []
    colour_said = colour_known = 0
    grams = set()
    faces = random_labels(3000, 1)
    for index, attributes in enumerate(faces):
        (text,) = captions(attributes, index, 1)
        check_form(text)
        claims = check_truth(text, attributes)
        everything |= claims
        words.append(len(text.split()))
        colours = [name for name in COLOURS if attributes[ATTRIBUTE_INDEX[name]] == 1]
        if len(colours) == 1 and attributes[ATTRIBUTE_INDEX["Bald"]] != 1:
            colour_known += 1
            colour_said += (colours[0], 1) in claims
        tokens = re.findall(r"[\w'-]+", text.lower())
        grams.update(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
    assert {name for name, value in everything} == set(ATTRIBUTES)
    assert {(name, 1) for name in ATTRIBUTES} <= everything
    assert 20 < np.mean(words) < 35
    assert np.quantile(words, 0.95) < 50
    assert colour_said / colour_known > 0.9
    assert len(grams) > 10_000


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_lone_attribute_is_said(name):
    # No_Beard is said of men only, and even then not always.
    attributes = labels(**{"Male": 1, name: 1}) if name == "No_Beard" else labels(**{name: 1})
    claimed = [(name, 1) in check_truth(text, attributes) for text in captions(attributes, 1, 40)]
    assert sum(claimed) >= (1 if name in ("No_Beard", "Blurry") else 40)


COMPATIBLE = [
    ("Black_Hair", "Brown_Hair", "Gray_Hair"),
    ("Wavy_Hair", "Straight_Hair"),
    ("Bangs", "Receding_Hairline"),
    *((name,) for name in ATTRIBUTES if "Hair" not in name and name not in ("Bangs", "Bald")),
]
PLAIN = [group for group in COMPATIBLE if group[0] not in ("No_Beard", "Blurry", "Male")]


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(st.sampled_from(PLAIN), max_size=5, unique=True), st.integers(0, 99))
def test_few_facts_are_all_said(data, groups, seed):
    names = [data.draw(st.sampled_from(group)) for group in groups]
    attributes = labels(**dict.fromkeys(names, 1))
    for text in captions(attributes, seed, 3):
        assert check_truth(text, attributes) >= {(name, 1) for name in names}


@pytest.mark.parametrize(
    ("values", "silent", "said"),
    [
        ({"Black_Hair": 1, "Brown_Hair": 1}, {"Black_Hair", "Brown_Hair"}, set()),
        ({"Straight_Hair": 1, "Wavy_Hair": 1}, {"Straight_Hair", "Wavy_Hair"}, set()),
        ({"Bald": 1, "Blond_Hair": 1, "Bangs": 1}, {"Blond_Hair", "Bangs"}, {"Bald"}),
        ({"Male": 1, "No_Beard": 1, "Goatee": 1}, {"No_Beard"}, {"Goatee"}),
        ({"Male": 0, "Goatee": 1, "No_Beard": 0, "Young": 1}, {"Goatee", "No_Beard"}, {"Young"}),
        ({"Male": 0, "No_Beard": 1}, {"No_Beard"}, set()),
        ({"Male": 1, "Wearing_Lipstick": 1, "Chubby": 1}, {"Wearing_Lipstick"}, {"Chubby"}),
        ({"Male": 1, "No_Beard": 0, "Mustache": 1}, set(), {"No_Beard", "Mustache"}),
    ],
)
def test_labels_that_contradict_each_other(values, silent, said):
    attributes = labels(**values)
    for text in captions(attributes, 3, 30):
        names = {name for name, _ in check_truth(text, attributes)}
        assert not names & silent
        assert names >= said


def test_clean_shaven_needs_more_than_no_beard():
    attributes = labels(Male=1, No_Beard=1)
    assert not any("clean-shaven" in text for text in captions(attributes, 0, 60))
    attributes = labels(Male=1, No_Beard=1, Goatee=0, Mustache=0, **{"5_o_Clock_Shadow": 0})
    assert any("clean-shaven" in text for text in captions(attributes, 0, 60))


@settings(max_examples=30, deadline=None)
@given(vectors, st.integers(0, 2**40))
def test_captions_depend_on_labels_and_seed_only(attributes, seed):
    texts = captions(attributes, seed, 6)
    assert texts == captions(attributes.astype(np.int64), seed, 6)
    assert texts[:2] == captions(attributes, seed, 2)
    assert captions(attributes, seed, 0) == []
    rng, twin = np.random.default_rng(seed), np.random.default_rng(seed)
    assert [caption(attributes, rng) for _ in range(3)] == [
        caption(attributes, twin) for _ in range(3)
    ]


def test_captions_are_the_same_in_every_process():
    code = """
import numpy as np
from flip_jax.data.captions import captions
rng = np.random.default_rng(0)
for _ in range(20):
    print(captions(rng.integers(-1, 2, 40), 7, 4))
"""
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            check=True,
        ).stdout
        for hash_seed in ("1", "2")
    ]
    assert outputs[0] == outputs[1] != b""


def test_captions_of_a_face_differ():
    attributes = labels(Male=0, Young=1, Brown_Hair=1, Wavy_Hair=1, Smiling=1, Oval_Face=1)
    texts = captions(attributes, 0, 300)
    assert len(set(texts)) == 300
    assert texts != captions(attributes, 1, 300)
    changed = attributes.copy()
    changed[ATTRIBUTE_INDEX["Wavy_Hair"]] = 0
    assert not set(texts) & set(captions(changed, 0, 300))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (np.zeros(39, np.int8), r"\(39,\)"),
        (np.zeros((1, 40), np.int8), r"\(1, 40\)"),
        (np.zeros(40, np.float32), "float32"),
        (np.zeros(40, bool), "bool"),
        (np.full(40, 2, np.int8), "5_o_Clock_Shadow is 2"),
        (np.full(40, -2, np.int8), "-2"),
        (np.full(40, 255, np.uint8), "255"),
    ],
)
def test_bad_labels(attributes, message):
    with pytest.raises(ValueError, match=message):
        captions(attributes, 0, 1)
    with pytest.raises(ValueError, match=message):
        caption(attributes, np.random.default_rng(0))


def test_unsigned_labels_are_fine():
    ones = np.ones(40, np.uint8)
    assert captions(ones, 0, 2) == captions(ones.astype(np.int8), 0, 2)


@pytest.mark.parametrize(("seed", "count"), [(-1, 1), (0, -1)])
def test_bad_seed_and_count(seed, count):
    with pytest.raises(ValueError, match=f"seed={seed}, count={count}"):
        captions(np.zeros(40, np.int8), seed, count)


def test_labels_of_celeba():
    if not LABELS.is_file():
        pytest.skip("the labels of CelebA are not in ../shared/celeba_anno")
    table = pytest.importorskip("pyarrow.parquet").read_table(LABELS, columns=list(ATTRIBUTES))
    attributes = np.stack([table[name].to_numpy() for name in ATTRIBUTES], 1).astype(np.int8)
    rng = np.random.default_rng(0)
    words = []
    for index in rng.choice(len(attributes), 2000, replace=False):
        for text in captions(attributes[index], int(index), 2):
            check_form(text)
            check_truth(text, attributes[index])
            words.append(len(text.split()))
    assert 25 < np.mean(words) < 35  # FaceCaption-15M: 30
