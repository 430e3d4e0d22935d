"""What is said of a face that has an attribute, and of one that has not; and sets of free labels.

The phrases are those of the caption grammar where it has one (`flip_jax/data/caption_grammar.txt`).
Where it has none for the absence of an attribute, the contrast is a face of which nothing is said.
`{noun}` stands for each of `NOUNS`: captions nearly always name the gender, so "person" would be
the rarer word. Facial hair is said of men only, lipstick and make-up of women only, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flip_jax.data.attributes import ATTRIBUTES

TEMPLATES = (
    "the photo shows {}",
    "this is a photo of {}",
    "the picture depicts {}",
    "{} is shown in the image",
    "here is {}",
)
NOUNS = ("man", "woman")

_ANYBODY = ("a {noun}",)
_HAIR = ("a {noun} with black hair", "a {noun} with brown hair", "a {noun} with blond hair")
_SHAVEN = ("a woman", "a clean-shaven man", "a man without a beard")

# What is no participle of the person, as "wearing" is, but said of a part of the face or beside it.
_OF_PARTS = (
    *("receding", "thinning", "graying", "greying", "flowing", "curling", "protruding", "bulging"),
    *("drooping", "sagging", "piercing", "flaring", "earring", "ring", "clothing"),
)

# Attribute -> (phrases where it is there, phrases where it is not).
PHRASES: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "5_o_Clock_Shadow": (("a man with a five o'clock shadow", "a man with stubble"), _SHAVEN),
    "Arched_Eyebrows": (
        ("a {noun} with arched eyebrows", "a {noun} with curved eyebrows"),
        _ANYBODY,
    ),
    "Attractive": (("an attractive {noun}", "a good-looking {noun}"), _ANYBODY),
    "Bags_Under_Eyes": (
        ("a {noun} with bags under the eyes", "a {noun} with visible eye bags"),
        _ANYBODY,
    ),
    "Bald": (("a bald {noun}", "a {noun} with a bald head"), _HAIR),
    "Bangs": (("a {noun} with bangs", "a {noun} with a fringe"), _ANYBODY),
    "Big_Lips": (("a {noun} with big lips", "a {noun} with full lips"), _ANYBODY),
    "Big_Nose": (("a {noun} with a big nose", "a {noun} with a large nose"), _ANYBODY),
    "Black_Hair": (
        ("a {noun} with black hair",),
        ("a {noun} with brown hair", "a {noun} with blond hair", "a {noun} with gray hair"),
    ),
    "Blond_Hair": (
        ("a {noun} with blond hair", "a woman with blonde hair"),
        ("a {noun} with brown hair", "a {noun} with black hair", "a {noun} with gray hair"),
    ),
    "Blurry": (
        ("a {noun}. the photo is blurry", "a {noun}. the image is out of focus"),
        _ANYBODY,
    ),
    "Brown_Hair": (
        ("a {noun} with brown hair",),
        ("a {noun} with black hair", "a {noun} with blond hair", "a {noun} with gray hair"),
    ),
    "Bushy_Eyebrows": (
        ("a {noun} with bushy eyebrows", "a {noun} with thick eyebrows"),
        _ANYBODY,
    ),
    "Chubby": (("a chubby {noun}", "a {noun} with a chubby face"), _ANYBODY),
    "Double_Chin": (("a {noun} with a double chin",), _ANYBODY),
    "Eyeglasses": (
        ("a {noun} wearing eyeglasses", "a {noun} wearing a pair of glasses"),
        ("a {noun} not wearing glasses", "a {noun} without glasses"),
    ),
    "Goatee": (("a man with a goatee",), _SHAVEN),
    "Gray_Hair": (
        ("a {noun} with gray hair", "a {noun} with grey hair"),
        _HAIR,
    ),
    "Heavy_Makeup": (
        ("a woman wearing heavy makeup", "a woman wearing a lot of makeup"),
        _ANYBODY,
    ),
    "High_Cheekbones": (
        ("a {noun} with high cheekbones", "a {noun} with prominent cheekbones"),
        _ANYBODY,
    ),
    "Male": (("a man", "a gentleman"), ("a woman", "a lady")),
    "Mouth_Slightly_Open": (
        ("a {noun} with a slightly open mouth", "a {noun} with slightly parted lips"),
        _ANYBODY,
    ),
    "Mustache": (("a man with a mustache", "a man with a moustache"), _SHAVEN),
    "Narrow_Eyes": (("a {noun} with narrow eyes",), _ANYBODY),
    "No_Beard": (_SHAVEN, ("a man with a beard", "a man with a goatee")),
    "Oval_Face": (("a {noun} with an oval face", "a {noun} with an oval-shaped face"), _ANYBODY),
    "Pale_Skin": (("a {noun} with pale skin", "a {noun} with a pale complexion"), _ANYBODY),
    "Pointy_Nose": (("a {noun} with a pointy nose", "a {noun} with a pointed nose"), _ANYBODY),
    "Receding_Hairline": (("a {noun} with a receding hairline",), _ANYBODY),
    "Rosy_Cheeks": (("a {noun} with rosy cheeks", "a {noun} with pinkish cheeks"), _ANYBODY),
    "Sideburns": (("a man with sideburns", "a man with visible sideburns"), _SHAVEN),
    "Smiling": (
        ("a smiling {noun}", "a {noun} with a smile on the face"),
        ("a {noun} who is not smiling",),
    ),
    "Straight_Hair": (("a {noun} with straight hair",), ("a {noun} with wavy hair",)),
    "Wavy_Hair": (("a {noun} with wavy hair",), ("a {noun} with straight hair",)),
    "Wearing_Earrings": (
        ("a {noun} wearing earrings", "a {noun} wearing a pair of earrings"),
        _ANYBODY,
    ),
    "Wearing_Hat": (
        ("a {noun} wearing a hat", "a {noun} with a hat on the head"),
        ("a {noun} not wearing a hat", "a {noun} without a hat"),
    ),
    "Wearing_Lipstick": (
        ("a woman wearing lipstick", "a woman with lipstick on her lips"),
        _ANYBODY,
    ),
    "Wearing_Necklace": (("a {noun} wearing a necklace",), _ANYBODY),
    "Wearing_Necktie": (("a {noun} wearing a necktie", "a {noun} wearing a tie"), _ANYBODY),
    "Young": (("a young {noun}", "a youthful {noun}"), ("an older {noun}", "a mature {noun}")),
}
assert tuple(PHRASES) == ATTRIBUTES

# Set -> label -> the attributes that make it right. A face counts where one label is right.
LABEL_SETS: dict[str, dict[str, Mapping[str, int]]] = {
    "hair colour": {
        "black hair": {"Black_Hair": 1, "Blond_Hair": 0, "Brown_Hair": 0, "Gray_Hair": 0},
        "blond hair": {"Black_Hair": 0, "Blond_Hair": 1, "Brown_Hair": 0, "Gray_Hair": 0},
        "brown hair": {"Black_Hair": 0, "Blond_Hair": 0, "Brown_Hair": 1, "Gray_Hair": 0},
        "gray hair": {"Black_Hair": 0, "Blond_Hair": 0, "Brown_Hair": 0, "Gray_Hair": 1},
    },
    "age and gender": {
        "a young man": {"Male": 1, "Young": 1},
        "an older man": {"Male": 1, "Young": 0},
        "a young woman": {"Male": 0, "Young": 1},
        "an older woman": {"Male": 0, "Young": 0},
    },
    "glasses and hat": {
        "wearing glasses and a hat": {"Eyeglasses": 1, "Wearing_Hat": 1},
        "wearing glasses": {"Eyeglasses": 1, "Wearing_Hat": 0},
        "wearing a hat": {"Eyeglasses": 0, "Wearing_Hat": 1},
        "without glasses or a hat": {"Eyeglasses": 0, "Wearing_Hat": 0},
    },
}


def attribute_prompts(name: str) -> tuple[list[str], list[str]]:
    """All prompts of an attribute: for its presence, for its absence."""
    present, absent = PHRASES[name]
    return _prompts(present), _prompts(absent)


def label_prompts(label: str) -> list[str]:
    """Prompts of a free label such as "black hair", "a bald man" or "wearing a red hat"."""
    label = label.strip()
    if label.split()[0].lower() in ("a", "an", "the"):
        return _prompts((label,))
    first = label.split()[0].lower()
    verbal = first.endswith("ing") and first not in _OF_PARTS
    follows = verbal or first in ("with", "without", "who")
    return _prompts((f"a {{noun}} {label}" if follows else f"a {{noun}} with {label}",))


def _prompts(phrases: Sequence[str]) -> list[str]:
    said = dict.fromkeys(phrase.replace("{noun}", noun) for phrase in phrases for noun in NOUNS)
    return [template.format(phrase) for phrase in said for template in TEMPLATES]
