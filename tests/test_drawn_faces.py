"""Drawn faces: reproducible, consistent in themselves, and showing what their labels say."""

import subprocess
import sys

import cv2
import numpy as np
import pytest

from flip_jax.data.attributes import ATTRIBUTE_INDEX, ATTRIBUTES
from flip_jax.data.drawn_faces import PARSING_CLASSES, draw_face, draw_sketch
from flip_jax.data.face_traits import attribute_vector, sample_person, sample_picture

CLASS = {name: index for index, name in enumerate(PARSING_CLASSES)}
CHANGING = {
    "5_o_Clock_Shadow",
    "Bangs",
    "Blurry",
    "Eyeglasses",
    "Heavy_Makeup",
    "Mouth_Slightly_Open",
    "Narrow_Eyes",
    "No_Beard",  # follows the shaved beard
    "Rosy_Cheeks",
    "Smiling",
    "Wearing_Earrings",
    "Wearing_Hat",
    "Wearing_Lipstick",
    "Wearing_Necklace",
    "Wearing_Necktie",
}


def has(face, name: str) -> bool:
    return bool(face.attributes[ATTRIBUTE_INDEX[name]])


@pytest.fixture(scope="module")
def faces():
    """Two pictures each of 120 people."""
    return [draw_face(0, identity, picture) for identity in range(120) for picture in range(2)]


@pytest.fixture(scope="module")
def labels():
    """Labels of 3000 pictures of different people, without drawing them: bool dict of columns."""
    rows = []
    for i in range(3000):
        rng = np.random.default_rng(i)
        person = sample_person(rng)
        rows.append(attribute_vector(person, sample_picture(rng, person)))
    return dict(zip(ATTRIBUTES, np.array(rows, bool).T, strict=True))


def test_shapes_and_types():
    face = draw_face(3, 1, 4, size=100)
    assert face.identity == 1
    assert face.image.shape == (100, 100, 3) and face.image.dtype == np.uint8
    assert face.mask.shape == (100, 100) and face.mask.dtype == np.uint8
    assert face.mask.max() < len(PARSING_CLASSES) == 19
    assert face.attributes.shape == (40,) and face.attributes.dtype == np.int8
    assert set(face.attributes.tolist()) <= {0, 1}
    assert face.landmarks.shape == (68, 2) and face.landmarks.dtype == np.float32
    assert face.box.shape == (4,) and face.box.dtype == np.float32
    assert all(s.ndim == 2 and s.shape[1] == 2 and s.dtype == np.float32 for s in face.strokes)


def test_same_arguments_same_bytes_in_another_process():
    face = draw_face(7, 5, 2)
    program = (
        "import sys, numpy as np; from flip_jax.data.drawn_faces import draw_face;"
        "draw_face(1, 1, 1); f = draw_face(7, 5, 2);"
        "sys.stdout.buffer.write(b''.join(np.ascontiguousarray(a).tobytes() for a in"
        " (f.image, f.mask, f.attributes, f.landmarks, f.box, *f.strokes)))"
    )
    other = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    arrays = (face.image, face.mask, face.attributes, face.landmarks, face.box, *face.strokes)
    assert other.stdout == b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)


def test_seed_identity_and_picture_each_change_the_face():
    base = draw_face(0, 0, 0)
    for other in (draw_face(1, 0, 0), draw_face(0, 1, 0), draw_face(0, 0, 1)):
        assert (base.image != other.image).mean() > 0.5
        assert not np.array_equal(base.landmarks, other.landmarks)


def test_identity_keeps_its_permanent_attributes_and_varies_the_rest():
    varied = np.zeros(40, bool)
    for identity in range(25):
        rows = np.array([draw_face(2, identity, p, size=64).attributes for p in range(6)])
        varied |= (rows != rows[0]).any(axis=0)
    assert {name for name, column in zip(ATTRIBUTES, varied, strict=True) if column} == CHANGING


def test_labels_are_consistent(labels):
    def implies(a, b):
        assert not (a & ~b).any()

    colours = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
    assert sum(labels[c].astype(int) for c in colours).max() == 1
    kinds = ("Bald", "Straight_Hair", "Wavy_Hair")
    assert sum(labels[k].astype(int) for k in kinds).max() == 1
    for hidden in ("Bangs", "Receding_Hairline", "Wearing_Hat", *colours):
        assert not (labels["Bald"] & labels[hidden]).any()
    assert not (labels["Wearing_Hat"] & (labels["Bangs"] | labels["Receding_Hairline"])).any()
    assert not (labels["Bangs"] & labels["Receding_Hairline"]).any()
    grown = labels["Goatee"] | labels["Mustache"] | labels["Sideburns"]
    assert not (labels["5_o_Clock_Shadow"] & grown).any()
    beard = labels["5_o_Clock_Shadow"] | grown
    np.testing.assert_array_equal(labels["No_Beard"], ~beard)
    for male_only in (beard, labels["Bald"], labels["Wearing_Necktie"]):
        implies(male_only, labels["Male"])
    for female_only in ("Heavy_Makeup", "Wearing_Lipstick"):
        implies(labels[female_only], ~labels["Male"])
    implies(labels["Gray_Hair"], ~labels["Young"])
    implies(labels["Attractive"], labels["Young"])
    assert not (labels["Chubby"] & labels["Oval_Face"]).any()
    assert not (labels["Wearing_Necklace"] & labels["Wearing_Necktie"]).any()


def test_labels_are_balanced(labels):
    share = {name: column.mean() for name, column in labels.items()}
    rare = {"Bald": 0.04, "Wearing_Hat": 0.05}
    common = {"No_Beard": 0.75, "Young": 0.67}
    for name, value in share.items():
        assert rare.get(name, 0.075) <= value <= common.get(name, 0.6), (name, value)
    distinct = np.unique(np.stack(list(labels.values()), axis=1), axis=0)
    assert len(distinct) > 2900


@pytest.mark.parametrize("size", [64, 128])
def test_mask_has_a_class_exactly_where_the_label_says(faces, size):
    if size == 64:
        faces = [draw_face(5, identity, 0, size=64) for identity in range(545, 605)]
    present = {
        "eye_g": "Eyeglasses",
        "hat": "Wearing_Hat",
        "ear_r": "Wearing_Earrings",
        "neck_l": "Wearing_Necklace",
        "mouth": "Mouth_Slightly_Open",
    }
    always = ("background", "skin", "nose", "l_eye", "r_eye", "u_lip", "l_lip", "cloth")
    for face in faces:
        found = set(np.unique(face.mask).tolist())
        for name, attribute in present.items():
            assert (CLASS[name] in found) == has(face, attribute), (face.identity, name)
        assert (CLASS["hair"] in found) == (not has(face, "Bald")), face.identity
        assert {CLASS[name] for name in always} <= found, face.identity


def test_landmarks_lie_on_their_features(faces):
    parts = {
        "r_eye": slice(36, 42),
        "l_eye": slice(42, 48),
        "nose": slice(27, 36),
        "lips": slice(48, 68),
    }
    classes = {"lips": ("u_lip", "l_lip", "mouth"), "nose": ("nose", "eye_g")}
    for face in faces:
        x, y = face.landmarks.T
        assert x.min() >= 0 and y.min() >= 0 and max(x.max(), y.max()) <= 127
        x0, y0, x1, y1 = face.box
        assert x0 <= x.min() and x.max() <= x1 and y0 <= y.min() and y.max() <= y1
        for part, points in parts.items():
            names = classes.get(part, (part,))
            region = np.isin(face.mask, [CLASS[name] for name in names])
            distance = cv2.distanceTransform((~region).astype(np.uint8), cv2.DIST_L2, 5)
            at = face.landmarks[points].round().astype(int)
            assert distance[at[:, 1], at[:, 0]].max() <= 2.5, (face.identity, part)


def test_landmarks_are_ordered_as_ibug(faces):
    for face in faces:
        points = face.landmarks
        left, right = points[36:42].mean(axis=0), points[42:48].mean(axis=0)
        across = (right - left) / np.hypot(*(right - left))
        down = np.array([-across[1], across[0]])
        along = points @ across
        assert (np.diff(along[3:14]) > 0).all() and along[0] < along[8] < along[16]
        for run in ([*range(17, 27)], [*range(31, 36)], [36, 37, 38, 39], [42, 43, 44, 45]):
            assert (np.diff(along[run]) > 0).all()
        assert (np.diff(along[48:55]) > 0).all() and (np.diff(along[55:60]) < 0).all()
        height = points @ down
        assert height[8] == pytest.approx(height[:17].max(), abs=1.0)
        assert (np.diff(height[27:31]) > 0).all()
        assert height[17:27].max() < height[36:48].max() < height[33] < height[57] < height[8]


def distance(face, a: int, b: int) -> float:
    return float(np.hypot(*(face.landmarks[a] - face.landmarks[b])))


def eye_opening(face) -> float:
    return sum(distance(face, a, b) for a, b in ((37, 41), (38, 40), (43, 47), (44, 46))) / (
        distance(face, 36, 39) + distance(face, 42, 45)
    )


def corner_lift(face) -> float:
    """How far the mouth's corners lie over the middle between the lips, in mouth widths."""
    corner = face.landmarks[[48, 54]].mean(axis=0)
    # The lower lip moves twice as far as the upper when the mouth opens.
    middle = 0.68 * face.landmarks[62] + 0.32 * face.landmarks[66]
    across = face.landmarks[54] - face.landmarks[48]
    dx, dy = middle - corner
    return float(across[0] * dy - across[1] * dx) / float(across @ across)


@pytest.mark.parametrize(
    "attribute, measure",
    [
        ("Mouth_Slightly_Open", lambda f: distance(f, 62, 66)),
        ("Narrow_Eyes", lambda f: -eye_opening(f)),
        ("Big_Nose", lambda f: distance(f, 31, 35) / distance(f, 36, 45)),
        ("Big_Lips", lambda f: distance(f, 66, 57) / distance(f, 36, 45)),
        ("Smiling", corner_lift),
    ],
)
def test_geometry_separates_the_label(faces, attribute, measure):
    present = [measure(f) for f in faces if has(f, attribute)]
    absent = [measure(f) for f in faces if not has(f, attribute)]
    assert min(present) > max(absent)


def mean_colour(face, *names: str) -> np.ndarray:
    return face.image[np.isin(face.mask, [CLASS[n] for n in names])].mean(axis=0)


def test_colours_show_the_labels(faces):
    def means(attribute, wanted, *names):
        chosen = [f for f in faces if has(f, attribute) == wanted and not has(f, "Bald")]
        return np.array([mean_colour(f, *names) for f in chosen])

    black, blond = means("Black_Hair", True, "hair"), means("Blond_Hair", True, "hair")
    gray = means("Gray_Hair", True, "hair")
    assert black.max(axis=0)[0] < blond.min(axis=0)[0]
    assert np.percentile(blond[:, 0] - blond[:, 2], 5) > np.percentile(gray[:, 0] - gray[:, 2], 95)

    def saturation(wanted):
        skin = means("Pale_Skin", wanted, "skin")
        return 1 - skin.min(axis=1) / skin.max(axis=1)

    assert np.percentile(saturation(True), 90) < np.percentile(saturation(False), 10)

    def redness(wanted):
        lips = means("Wearing_Lipstick", wanted, "u_lip", "l_lip")
        return lips[:, 0] - lips[:, 1]

    assert redness(True).mean() > redness(False).mean() + 40


def test_blurry_pictures_are_blurred(faces):
    def sharpness(face):
        smooth = cv2.GaussianBlur(face.image, (0, 0), 0.8)  # grain would count as detail
        edges = cv2.Laplacian(smooth.astype(np.float32), cv2.CV_32F)
        return float(np.percentile(np.abs(edges), 99))

    blurry = [sharpness(f) for f in faces if has(f, "Blurry")]
    sharp = [sharpness(f) for f in faces if not has(f, "Blurry")]
    assert max(blurry) < min(sharp)


@pytest.mark.parametrize("size", [64, 256, 512])
def test_another_size_shows_the_same_face(size):
    for identity in range(6):
        base, other = draw_face(0, identity, 0, 128), draw_face(0, identity, 0, size)
        np.testing.assert_array_equal(base.attributes, other.attributes)
        scaled = (other.landmarks + 0.5) * (128 / size) - 0.5
        np.testing.assert_allclose(scaled, base.landmarks, atol=1e-3)
        large, small = (base, other) if size < 128 else (other, base)
        side = len(small.image)
        image = cv2.resize(large.image, (side, side), interpolation=cv2.INTER_AREA)
        # The grain is drawn per pixel and differs.
        image, reference = (cv2.GaussianBlur(i, (0, 0), 1.5) for i in (image, small.image))
        assert np.abs(image.astype(float) - reference).mean() < 3.5
        mask = cv2.resize(large.mask, (side, side), interpolation=cv2.INTER_NEAREST_EXACT)
        assert (mask == small.mask).mean() > 0.94


def test_strokes_lie_in_the_picture(faces):
    for face in faces:
        assert 20 <= len(face.strokes) <= 120
        for stroke in face.strokes:
            assert len(stroke) >= 2
            assert stroke.min() >= 0 and stroke.max() <= 127


def test_sketch_gains_ink_with_every_stroke(faces):
    for face in faces[:10]:
        sketches = [draw_sketch(face.strokes, 128, n) for n in range(len(face.strokes) + 1)]
        ink = [int((255 - s.astype(int)).sum()) for s in sketches]
        assert ink[0] == 0
        assert (np.diff(ink) >= 0).all()
        assert np.mean(np.diff(ink) > 0) > 0.9
        np.testing.assert_array_equal(sketches[-1], draw_sketch(face.strokes, 128))


def test_sketch_follows_the_picture(faces):
    """Lines of the eyes are where the mask has eyes."""
    for face in faces[:20]:
        ink = draw_sketch(face.strokes, 128) < 128
        for name in ("l_eye", "r_eye"):
            assert ink[face.mask == CLASS[name]].mean() > 0.2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((-1, 0, 0), "seed is -1"),
        ((0, -2, 0), "identity is -2"),
        ((0, 0, -3), "picture is -3"),
        ((0, 0, 0, 63), r"size is 63 pixels, must be 64\.\.512"),
        ((0, 0, 0, 513), "size is 513"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        draw_face(*arguments)


@pytest.mark.parametrize("count", [-1, 10_000])
def test_bad_stroke_count_is_refused(count):
    with pytest.raises(ValueError, match=f"count is {count}"):
        draw_sketch(draw_face(0, 0, 0).strokes, 128, count)
