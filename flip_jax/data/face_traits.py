"""Traits of a drawn face: who a person is, how one picture shows them, and the 40 labels.

A `Person` holds what all pictures of one identity share, a `Picture` what changes between them.
A binary trait is drawn first and the numbers behind it from ranges that do not overlap, so that a
label is always a visible difference and never a threshold in the middle of a continuum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flip_jax.data.attributes import ATTRIBUTES

Colour = tuple[float, float, float]  # RGB, 0..255

# Skin from light to deep, interpolated linearly.
SKIN_RAMP = np.array(
    [(248, 212, 184), (236, 190, 154), (214, 160, 118), (178, 120, 80), (132, 84, 56), (88, 54, 40)]
)
PALE_RAMP = np.array([(248, 229, 216), (242, 218, 205)])
HAIR_RAMPS = {
    "black": np.array([(20, 18, 22), (46, 38, 38)]),
    "blond": np.array([(214, 172, 92), (240, 212, 140)]),
    "brown": np.array([(78, 46, 24), (122, 78, 42)]),
    "gray": np.array([(146, 146, 152), (206, 206, 208)]),
    "red": np.array([(150, 62, 22), (182, 84, 36)]),
}
EYE_COLOURS = np.array([(88, 54, 30), (60, 40, 26), (74, 116, 150), (84, 122, 78), (112, 94, 52)])
LIPSTICKS = np.array([(196, 24, 54), (214, 44, 98), (150, 20, 62), (226, 66, 66)])


@dataclass(frozen=True)
class Person:
    """What every picture of one identity shares. Lengths are in half face widths."""

    male: bool
    young: bool
    pale: bool
    skin: Colour
    oval: bool
    chubby: bool
    double_chin: bool
    high_cheekbones: bool
    cheek: float  # half width at the cheekbones
    jaw: float  # half width at the mouth
    chin: float  # y of the chin
    chin_width: float
    hair_colour: str  # key of HAIR_RAMPS
    hair: Colour
    hair_kind: str  # straight, wavy, cropped, bald
    hair_length: float  # y where it ends; below 0 = above the ears
    hair_volume: float
    parting: float  # x of the parting
    receding: bool
    bangs_habit: bool
    arched_brows: bool
    bushy_brows: bool
    brow_lift: float
    eye: Colour
    eye_width: float
    eye_height: float
    eye_spacing: float
    eye_slant: float
    bags: bool
    nose_width: float
    nose_length: float
    big_nose: bool
    pointy_nose: bool
    big_lips: bool
    upper_lip: float  # thickness
    lower_lip: float
    mouth_width: float
    mustache: bool
    goatee: bool
    sideburns: bool
    stubble_habit: bool
    wrinkles: float  # 0 = none .. 1
    makeup_habit: bool
    glasses_habit: bool
    style: int  # seeds details of hair and clothes that belong to the person


@dataclass(frozen=True)
class Picture:
    """What changes between the pictures of one identity. Angles are in radians."""

    yaw: float
    pitch: float
    roll: float
    centre: tuple[float, float]  # of the face, in picture widths
    scale: float  # half face width, in picture widths
    light: tuple[float, float]  # where it comes from; positive = right, below
    brightness: float
    contrast: float
    tint: Colour  # factors of R, G, B
    blur: float  # Gaussian sigma in picture widths; 0 = sharp
    noise: float  # standard deviation of the grain, grey levels
    smiling: bool
    smile: float  # lift of the mouth's corners
    opening: float  # gap between the lips; 0 = closed
    narrow_eyes: bool
    squint: float  # factor of the eyes' height
    stubble: bool
    bangs: bool
    rosy: bool
    makeup: bool
    lipstick: Colour | None
    glasses: str | None  # round, square, oval
    hat: str | None  # beanie, brim, cap
    earrings: str | None  # hoop, drop, stud
    necklace: str | None  # chain, beads, pendant
    necktie: bool
    garment: str  # crew, vneck, shirt
    garment_colour: Colour
    accessory_colour: Colour


def _ramp(rng: np.random.Generator, colours: np.ndarray, low=0.0, high=1.0) -> Colour:
    """A colour at a uniform place between `low` and `high` of a ramp, with a little jitter."""
    place = rng.uniform(low, high) * (len(colours) - 1)
    index = min(int(place), len(colours) - 2)
    colour = colours[index] + (place - index) * (colours[index + 1] - colours[index])
    return tuple(np.clip(colour + rng.normal(0, 3, 3), 4, 254).tolist())


def _vivid(rng: np.random.Generator) -> Colour:
    """A colour for clothes and hats: any hue, any lightness, moderate saturation."""
    hue, saturation, value = rng.uniform(0, 3), rng.uniform(0.15, 0.75), rng.uniform(70, 235)
    rgb = 1 - np.clip(np.abs((hue - np.arange(3) + 1.5) % 3 - 1.5), 0, 1)
    return tuple((value * (1 - saturation * (1 - rgb))).tolist())


def _chance(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _sample_hair(rng: np.random.Generator, male: bool, young: bool, skin_depth: float) -> dict:
    gray = not young and _chance(rng, 0.55)
    natural = ["black", "brown", "blond", "red"]
    odds = [0.34, 0.34, 0.27, 0.05] if skin_depth < 0.45 else [0.76, 0.18, 0.05, 0.01]
    colour = str(rng.choice(natural, p=odds))
    if gray:
        colour = "gray"
    bald = male and _chance(rng, 0.10 if young else 0.22)
    receding = not bald and _chance(rng, (0.12 if young else 0.45) if male else 0.03)
    kind = str(rng.choice(["straight", "wavy", "cropped"], p=[0.4, 0.38, 0.22]))
    if not male and kind != "cropped":
        length = float(rng.choice([0.75, 1.35, 2.2])) + rng.uniform(-0.1, 0.25)
    elif male and kind != "cropped" and _chance(rng, 0.15):
        length = rng.uniform(0.65, 1.2)
    else:
        length = -0.1
    return {
        "hair_colour": colour,
        "hair": _ramp(rng, HAIR_RAMPS[colour]),
        "hair_kind": "bald" if bald else kind,
        "hair_length": length,
        "hair_volume": 0.05 if kind == "cropped" else rng.uniform(0.1, 0.3),
        "parting": rng.uniform(0.1, 0.5) * rng.choice([-1, 1]),
        "receding": receding,
        "bangs_habit": not (bald or receding) and _chance(rng, 0.18 if male else 0.36),
    }


def _sample_beard(rng: np.random.Generator, male: bool, bald: bool) -> dict:
    styles = {  # (mustache, goatee, sideburns, stubble habit): share of men
        (False, False, False, False): 0.24,
        (False, False, False, True): 0.26,
        (True, False, False, False): 0.11,
        (False, True, False, False): 0.07,
        (True, True, False, False): 0.09,
        (False, False, True, False): 0.07,
        (True, True, True, False): 0.16,
    }
    style = list(styles)[rng.choice(len(styles), p=list(styles.values()))]
    mustache, goatee, sideburns, stubble = style if male else (False,) * 4
    # Sideburns alone would float on a head without hair.
    sideburns = sideburns and (goatee or not bald)
    return {
        "mustache": mustache,
        "goatee": goatee,
        "sideburns": sideburns,
        "stubble_habit": stubble,
    }


def _sample_head(rng: np.random.Generator, male: bool, young: bool) -> dict:
    shape = str(rng.choice(["oval", "chubby", "angular"], p=[0.38, 0.22, 0.40]))
    oval, chubby = shape == "oval", shape == "chubby"
    high_cheekbones = not chubby and _chance(rng, 0.55)
    jaw = {"oval": 0.70, "chubby": 0.98, "angular": 0.84}[shape] + 0.03 * male
    return {
        "oval": oval,
        "chubby": chubby,
        "double_chin": _chance(rng, 0.55 if chubby else 0.0 if young else 0.12),
        "high_cheekbones": high_cheekbones,
        "cheek": 1.0 + 0.04 * high_cheekbones + rng.uniform(-0.02, 0.03),
        "jaw": jaw - 0.05 * high_cheekbones + rng.uniform(-0.03, 0.03),
        "chin": {"oval": 1.34, "chubby": 1.2, "angular": 1.22}[shape] + rng.uniform(-0.04, 0.05),
        "chin_width": {"oval": 0.27, "chubby": 0.5, "angular": 0.42}[shape] + 0.04 * male,
    }


def _sample_features(rng: np.random.Generator, male: bool, young: bool) -> dict:
    nose = str(rng.choice(["big", "pointy", "plain"], p=[0.28, 0.30, 0.42]))
    big_nose, pointy_nose = nose == "big", nose == "pointy"
    big_lips = _chance(rng, 0.24 if male else 0.36)
    bushy_brows = _chance(rng, 0.42 if male else 0.12)
    return {
        "arched_brows": _chance(rng, 0.14 if male else 0.5),
        "bushy_brows": bushy_brows,
        "brow_lift": rng.uniform(-0.03, 0.04),
        "eye": tuple(rng.choice(EYE_COLOURS).astype(float).tolist()),
        "eye_width": rng.uniform(0.21, 0.255),
        "eye_height": rng.uniform(0.13, 0.165),
        "eye_spacing": rng.uniform(0.40, 0.45),
        "eye_slant": rng.uniform(-0.03, 0.05),
        "bags": _chance(rng, 0.14 if young else 0.42),
        "nose_width": rng.uniform(0.31, 0.38) if big_nose else rng.uniform(0.16, 0.21),
        "nose_length": rng.uniform(0.42, 0.48) if pointy_nose else rng.uniform(0.34, 0.42),
        "big_nose": big_nose,
        "pointy_nose": pointy_nose,
        "big_lips": big_lips,
        "upper_lip": rng.uniform(0.11, 0.14) if big_lips else rng.uniform(0.045, 0.065),
        "lower_lip": rng.uniform(0.15, 0.19) if big_lips else rng.uniform(0.06, 0.085),
        "mouth_width": rng.uniform(0.30, 0.37),
    }


def sample_person(rng: np.random.Generator) -> Person:
    """Draws the traits that all pictures of one identity share."""
    male, young = _chance(rng, 0.47), _chance(rng, 0.6)
    depth = rng.uniform(0.0, 1.0) ** 1.25
    pale = _chance(rng, 0.15)
    hair = _sample_hair(rng, male, young, 0.0 if pale else depth)
    return Person(
        male=male,
        young=young,
        pale=pale,
        skin=_ramp(rng, PALE_RAMP) if pale else _ramp(rng, SKIN_RAMP, depth, depth),
        wrinkles=0.0 if young else rng.uniform(0.6, 1.0),
        makeup_habit=not male and _chance(rng, 0.5),
        glasses_habit=_chance(rng, 0.2),
        style=int(rng.integers(2**32)),
        **hair,
        **_sample_beard(rng, male, hair["hair_kind"] == "bald"),
        **_sample_head(rng, male, young),
        **_sample_features(rng, male, young),
    )


def _sample_accessories(rng: np.random.Generator, person: Person) -> dict:
    male = person.male
    # A hat would hide a bald head, a receding hairline and bangs, and their labels with them.
    no_hat = person.hair_kind == "bald" or person.receding
    hat = str(rng.choice(["beanie", "brim", "cap"])) if _chance(rng, 0.1) and not no_hat else None
    glasses = _chance(rng, 0.7 if person.glasses_habit else 0.06)
    necktie = male and _chance(rng, 0.32)
    necklace = not necktie and _chance(rng, 0.05 if male else 0.34)
    earrings = _chance(rng, 0.04 if male else 0.42)
    garment = str(rng.choice(["crew", "vneck", "shirt"]))
    return {
        "bangs": hat is None and _chance(rng, 0.85) and person.bangs_habit,
        "glasses": str(rng.choice(["round", "square", "oval"])) if glasses else None,
        "hat": hat,
        "earrings": str(rng.choice(["hoop", "drop", "stud"])) if earrings else None,
        "necklace": str(rng.choice(["chain", "beads", "pendant"])) if necklace else None,
        "necktie": necktie,
        "garment": "shirt" if necktie else "vneck" if necklace else garment,
        "garment_colour": _vivid(rng),
        "accessory_colour": _vivid(rng),
    }


def sample_picture(rng: np.random.Generator, person: Person) -> Picture:
    """Draws what one picture of `person` adds: pose, light, expression, accessories."""
    smiling, narrow_eyes = _chance(rng, 0.48), _chance(rng, 0.18)
    open_mouth = _chance(rng, 0.55 if smiling else 0.3)
    makeup = person.makeup_habit and _chance(rng, 0.85)
    lipstick = not person.male and _chance(rng, 0.92 if makeup else 0.3)
    clean = not (person.mustache or person.goatee or person.sideburns)
    yaw = rng.uniform(-0.42, 0.42)
    return Picture(
        yaw=yaw,
        pitch=rng.uniform(-0.16, 0.16),
        roll=rng.uniform(-0.16, 0.16),
        centre=(0.5 - 0.06 * yaw + rng.uniform(-0.02, 0.02), 0.5 + rng.uniform(-0.02, 0.02)),
        scale=rng.uniform(0.228, 0.258),
        light=(rng.uniform(-1, 1), rng.uniform(-0.8, 0.2)),
        brightness=rng.uniform(0.84, 1.06),
        contrast=rng.uniform(0.86, 1.06),
        tint=tuple((1 + rng.uniform(-1, 1) * np.array([0.045, 0.0, -0.045])).tolist()),
        blur=rng.uniform(0.009, 0.016) if _chance(rng, 0.1) else 0.0,
        noise=rng.uniform(1.0, 4.0),
        smiling=smiling,
        smile=rng.uniform(0.11, 0.18) if smiling else rng.uniform(-0.03, 0.02),
        opening=rng.uniform(0.11, 0.22) if open_mouth else 0.0,
        narrow_eyes=narrow_eyes,
        squint=rng.uniform(0.42, 0.52) if narrow_eyes else rng.uniform(0.9, 1.12),
        stubble=person.stubble_habit and clean and _chance(rng, 0.8),
        rosy=_chance(rng, 0.06 if person.male else 0.32),
        makeup=makeup,
        lipstick=tuple(rng.choice(LIPSTICKS).astype(float).tolist()) if lipstick else None,
        **_sample_accessories(rng, person),
    )


def attribute_vector(person: Person, picture: Picture) -> np.ndarray:
    """The 40 labels that hold in a picture.

    Attractive cannot be drawn. A fixed rule over visible traits stands in for it, so that the
    vector has all of CelebA's entries: young, with an oval face or high cheekbones, and neither
    bags under the eyes nor a double chin. It says nothing about people.

    A bald head has no hair colour and no hair type; a hat implies no bangs.

    Returns:
        int8 [40], 0 or 1, in the order of `attributes.ATTRIBUTES`.
    """
    bald = person.hair_kind == "bald"
    beard = picture.stubble or person.goatee or person.mustache or person.sideburns
    appeal = person.oval or person.high_cheekbones
    present = {
        "5_o_Clock_Shadow": picture.stubble,
        "Arched_Eyebrows": person.arched_brows,
        "Attractive": person.young and appeal and not (person.bags or person.double_chin),
        "Bags_Under_Eyes": person.bags,
        "Bald": bald,
        "Bangs": picture.bangs,
        "Big_Lips": person.big_lips,
        "Big_Nose": person.big_nose,
        "Black_Hair": not bald and person.hair_colour == "black",
        "Blond_Hair": not bald and person.hair_colour == "blond",
        "Blurry": picture.blur > 0,
        "Brown_Hair": not bald and person.hair_colour == "brown",
        "Bushy_Eyebrows": person.bushy_brows,
        "Chubby": person.chubby,
        "Double_Chin": person.double_chin,
        "Eyeglasses": picture.glasses is not None,
        "Goatee": person.goatee,
        "Gray_Hair": not bald and person.hair_colour == "gray",
        "Heavy_Makeup": picture.makeup,
        "High_Cheekbones": person.high_cheekbones,
        "Male": person.male,
        "Mouth_Slightly_Open": picture.opening > 0,
        "Mustache": person.mustache,
        "Narrow_Eyes": picture.narrow_eyes,
        "No_Beard": not beard,
        "Oval_Face": person.oval,
        "Pale_Skin": person.pale,
        "Pointy_Nose": person.pointy_nose,
        "Receding_Hairline": person.receding,
        "Rosy_Cheeks": picture.rosy,
        "Sideburns": person.sideburns,
        "Smiling": picture.smiling,
        "Straight_Hair": person.hair_kind == "straight",
        "Wavy_Hair": person.hair_kind == "wavy",
        "Wearing_Earrings": picture.earrings is not None,
        "Wearing_Hat": picture.hat is not None,
        "Wearing_Lipstick": picture.lipstick is not None,
        "Wearing_Necklace": picture.necklace is not None,
        "Wearing_Necktie": picture.necktie,
        "Young": person.young,
    }
    return np.array([present[name] for name in ATTRIBUTES], np.int8)
