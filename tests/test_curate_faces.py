"""Crops of faces: filters, places in the picture and in the crop, alignment."""

import dataclasses
import pickle

import cv2
import numpy as np
import pytest
from conftest import SHARED
from PIL import Image

from flip_jax.curate.align import ARCFACE_POINTS, crop_aligned, crop_box, similarity
from flip_jax.curate.config import FacesConfig
from flip_jax.curate.detectors import Detector, Face
from flip_jax.curate.faces import FaceStage
from flip_jax.curate.stages import Sample, Tally
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.jpeg import jpeg_size
from flip_jax.data.transforms import decode_image, encode_jpeg

# Points of the 68 that stand for the five: means of the eyes, tip of the nose, mouth corners.
FIVE = (range(36, 42), range(42, 48), (30,), (48,), (54,))


class Told(Detector):
    """Finds what it is told to."""

    def __init__(self, *faces):
        self.faces = list(faces)

    def setup(self):
        self.ready = True

    def detect(self, image):
        assert self.ready
        return self.faces

    def fingerprint(self):
        return "told"


def face(x0, y0, x1, y1, confidence=0.99, landmarks=None):
    return Face(np.array([x0, y0, x1, y1], np.float32), confidence, landmarks)


def five_points(landmarks):
    return np.array([landmarks[list(part)].mean(axis=0) for part in FIVE], np.float32)


def picture(height=300, width=400, seed=0):
    rng = np.random.default_rng(seed)
    return cv2.resize(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8), (width, height))


def stage(cfg, *faces):
    made = FaceStage(cfg)
    if faces:
        made.detector = Told(*faces)
    made = pickle.loads(pickle.dumps(made))
    made.setup()
    return made


def run(made, *samples):
    tally = Tally()
    return made.process(samples, tally), tally


GIVEN = FacesConfig(detector="given", min_side=50, align=False)


def test_a_crop_is_a_part_of_the_picture():
    image = picture()
    sample = Sample(id="a", image=encode_jpeg(image), url="u", source="s")
    landmarks = np.array([(130, 60), (170, 60), (150, 80), (135, 100), (165, 100)], np.float32)
    ((kept,), tally) = run(stage(GIVEN, face(100.2, 40.7, 199.5, 139.1, 0.99, landmarks)), sample)
    assert (kept.id, kept.url, kept.source, kept.confidence) == ("a#0", "u", "s", 0.99)
    crop, decoded = decode_image(kept.image), decode_image(sample.image)
    assert crop.shape == (100, 100, 3)  # whole pixels around the box
    assert np.abs(crop.astype(int) - decoded[40:140, 100:200]).mean() < 1
    np.testing.assert_allclose(kept.box, [0.2, 0.7, 99.5, 99.1], atol=1e-4)
    np.testing.assert_allclose(kept.landmarks, landmarks - (100, 40))
    assert kept.box.dtype == kept.landmarks.dtype == np.float32
    assert not tally.drops


def test_boxes_are_clipped_to_the_picture():
    sample = Sample(id="a", image=encode_jpeg(picture()))
    ((kept,), _) = run(stage(GIVEN, face(-30, -20, 120, 100)), sample)
    assert jpeg_size(kept.image) == (100, 120)
    np.testing.assert_array_equal(kept.box, [0, 0, 120, 100])


def test_margin_is_added_on_each_side_within_the_picture():
    sample = Sample(id="a", image=encode_jpeg(picture()))
    cfg = dataclasses.replace(GIVEN, margin=0.5)
    ((kept,), _) = run(stage(cfg, face(20, 100, 120, 160)), sample)
    assert jpeg_size(kept.image) == (120, 170)
    np.testing.assert_array_equal(kept.box, [20, 30, 120, 90])


def test_what_is_left_out_and_why():
    sample = Sample(id="a", image=encode_jpeg(picture()))
    made = stage(
        dataclasses.replace(GIVEN, max_faces=2),
        face(0, 0, 100, 100, 0.999),
        face(0, 0, 100, 100, 0.98),  # not above the limit
        face(0, 0, 50, 100, 0.99),  # the shorter side is not above the limit
        face(500, 0, 600, 100, 0.99),
        face(0, 0, np.nan, 100, 0.99),
        face(0, 0, 51, 100, 0.99),
        face(0, 0, 90, 90, 0.99),
    )
    kept, tally = run(made, sample)
    assert [each.id for each in kept] == ["a#0", "a#5"]
    reasons = [(drop.sample.id, drop.reason) for drop in tally.drops]
    assert reasons == [
        ("a#1", "low confidence"),
        ("a#2", "too small"),
        ("a#3", "bad box"),
        ("a#4", "bad box"),
        ("a#6", "too many faces"),
    ]
    assert tally.drops[1].detail == "50 x 100 px"
    assert all(drop.sample.image == b"" and drop.stage == "faces" for drop in tally.drops)
    assert tally.counts["faces/dropped: bad box"] == 2


def test_a_detector_without_confidence_passes_the_filter():
    sample = Sample(id="a", image=encode_jpeg(picture()))
    ((kept,), _) = run(stage(GIVEN, face(0, 0, 100, 100, None)), sample)
    assert kept.confidence is None


def test_no_face_and_undecodable():
    made = stage(GIVEN, face(0, 0, 100, 100))
    made.detector.faces = []
    good = encode_jpeg(picture())
    kept, tally = run(made, Sample(id="a", image=good), Sample(id="b", image=good[:500]))
    assert not kept
    assert [(d.sample.id, d.reason) for d in tally.drops] == [
        ("a", "no face"),
        ("b", "undecodable"),
    ]


def test_given_boxes():
    box, image = np.array([10, 20, 110, 140], np.float32), encode_jpeg(picture())
    kept, tally = run(stage(GIVEN), Sample(id="a", image=image, box=box), Sample("b", image=image))
    assert [each.id for each in kept] == ["a"]
    np.testing.assert_array_equal(kept[0].box, [0, 0, 100, 120])
    assert [(d.sample.id, d.reason) for d in tally.drops] == [("b", "no box")]


def test_given_boxes_are_those_of_the_upright_picture(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying on its side
    upright = picture(400, 300)
    Image.fromarray(np.rot90(upright)).save(tmp_path / "a.jpg", quality=95, exif=exif)
    box = np.array([30, 250, 130, 390], np.float32)
    sample = Sample(id="a", image=(tmp_path / "a.jpg").read_bytes(), box=box)
    ((kept,), _) = run(stage(GIVEN), sample)
    crop = decode_image(kept.image)
    assert np.abs(crop.astype(int) - upright[250:390, 30:130]).mean() < 3


def test_whole_pictures():
    cfg = FacesConfig(detector="whole", min_side=128)
    good = encode_jpeg(picture(129, 400))
    kept, tally = run(
        stage(cfg),
        Sample(id="a", image=good, box=np.zeros(4, np.float32)),
        Sample(id="b", image=encode_jpeg(picture(128, 400))),
        Sample(id="c", image=b"no picture"),
    )
    assert [each.id for each in kept] == ["a"] and kept[0].image == good and kept[0].box is None
    assert [(d.sample.id, d.reason) for d in tally.drops] == [
        ("b", "too small"),
        ("c", "undecodable"),
    ]


def test_the_batch_does_not_matter():
    made = stage(GIVEN, face(0, 0, 100, 100), face(10, 10, 150, 160))
    samples = [Sample(id=str(n), image=encode_jpeg(picture(seed=n))) for n in range(4)]
    together, _ = run(made, *samples)
    alone = [each for sample in samples for each in run(made, sample)[0]]
    assert [(s.id, s.image) for s in together] == [(s.id, s.image) for s in alone]


def test_fingerprint_tells_settings_and_detectors_apart(tmp_path):
    prints = {
        stage(cfg).fingerprint()
        for cfg in (
            GIVEN,
            dataclasses.replace(GIVEN, min_side=51),
            dataclasses.replace(GIVEN, quality=90),
            FacesConfig(detector="whole"),
        )
    }
    assert len(prints) == 4
    told = stage(GIVEN, face(0, 0, 1, 1))
    assert told.fingerprint() not in prints


# Alignment


def test_similarity_against_least_squares():
    rng = np.random.default_rng(0)
    for _ in range(20):
        source, target = rng.normal(0, 50, (2, 5, 2))
        # x' = a x - b y + c, y' = b x + a y + d, by the general solver.
        rows = [[(x, -y, 1, 0), (y, x, 0, 1)] for x, y in source]
        a, b, c, d = np.linalg.lstsq(np.reshape(rows, (10, 4)), target.ravel(), rcond=None)[0]
        np.testing.assert_allclose(similarity(source, target), [(a, -b, c), (b, a, d)], atol=1e-9)


@pytest.mark.parametrize("margin", [0.0, 0.25])
@pytest.mark.parametrize("angle", [0, 35, -120])
def test_aligned_faces_lie_as_in_the_template(margin, angle):
    """Whatever the turn and the place, the crop is the same face at the same size."""
    drawn = draw_face(0, 5, 0, 256)
    points = five_points(drawn.landmarks)
    matrix = cv2.getRotationMatrix2D((200, 180), angle, 1.0)
    matrix[:, 2] += (60, 70)
    turned = cv2.warpAffine(drawn.image, matrix, (520, 500), flags=cv2.INTER_CUBIC)
    turned_points = points @ matrix[:, :2].T + matrix[:, 2]
    box = np.concatenate([turned_points.min(axis=0) - 20, turned_points.max(axis=0) + 20])
    crop = crop_aligned(turned, box, turned_points, margin)
    side = len(crop.image)
    assert crop.image.shape == (side, side, 3)
    # Native size: distances between the points are those in the picture.
    spread = np.linalg.norm(crop.landmarks - crop.landmarks.mean(axis=0), axis=1).sum()
    wanted = np.linalg.norm(points - points.mean(axis=0), axis=1).sum()
    assert spread == pytest.approx(wanted, rel=0.01)
    # In the units of the template the fit is the best: no turn, no shift, no scale is left.
    template = ((ARCFACE_POINTS + 0.5) / 112 + margin) / (1 + 2 * margin) * side - 0.5
    np.testing.assert_allclose(
        similarity(crop.landmarks.astype(float), template), [(1, 0, 0), (0, 1, 0)], atol=2e-3
    )
    # The pixels follow: the crop of the turned picture looks like that of the upright one.
    upright = crop_aligned(drawn.image, box, points, margin).image
    inner = slice(side // 5, -side // 5)
    upright = cv2.resize(upright, (side, side))[inner, inner].astype(float)
    assert np.abs(upright - crop.image[inner, inner]).mean() < 6


def test_the_box_of_an_aligned_crop_has_the_faces_middle_and_size():
    points = ARCFACE_POINTS * 2 + (100, 50)
    image = picture(400, 500)
    crop = crop_aligned(image, np.array([140, 120, 280, 260]), points, 0.0)
    assert crop.image.shape == (224, 224, 3)
    # The template at twice its size, at (100, 50) less half a pixel of the template.
    np.testing.assert_allclose(crop.box, [40.5, 70.5, 180.5, 210.5], atol=1e-3)
    np.testing.assert_allclose(crop.landmarks, ARCFACE_POINTS * 2 + 0.5, atol=1e-3)


def test_points_that_are_no_face():
    image, box = picture(), np.array([0, 0, 100, 100])
    assert crop_aligned(image, box, np.zeros((5, 2)), 0.0) is None
    assert crop_aligned(image, box, ARCFACE_POINTS * 40, 0.0) is None
    assert crop_aligned(image, box, np.full((5, 2), np.nan), 0.0) is None
    landmarks = np.zeros((5, 2), np.float32)
    kept, tally = run(
        stage(dataclasses.replace(GIVEN, align=True), face(0, 0, 100, 100, 0.99, landmarks)),
        Sample(id="a", image=encode_jpeg(image)),
    )
    assert not kept and tally.drops[0].reason == "bad landmarks"


def test_nothing_outside_of_the_picture_is_made_up():
    """The edge is continued: no black corners that a model could take for hair."""
    image = np.full((200, 200, 3), 200, np.uint8)
    crop = crop_aligned(image, np.array([0, 0, 90, 90]), ARCFACE_POINTS - (60, 40), 0.3)
    assert crop.image.min() == 200


def test_a_box_beyond_the_picture_has_no_crop():
    assert crop_box(picture(), np.array([-50, -50, 0, 100]), None, 0.0) is None
    assert crop_box(picture(), np.array([0, 0, np.inf, 100]), None, 0.0) is None
    assert crop_box(picture(), np.array([90, 0, 80, 100]), None, 0.5) is None


# The detector that ships with OpenCV


def test_drawn_faces_end_to_end():
    samples = [Sample(str(n), image=encode_jpeg(draw_face(0, n, 0, 256).image)) for n in range(20)]
    kept, tally = run(stage(FacesConfig(min_side=96)), *samples)
    pictures = {each.id.split("#")[0] for each in kept}
    assert len(pictures) >= 14 and len(kept) <= len(pictures) + 2
    assert {drop.reason for drop in tally.drops} <= {"no face", "too small"}
    assert all(min(jpeg_size(each.image)) > 96 for each in kept)


def test_photographs_end_to_end():
    folder = SHARED / "real_faces" / "images"
    if not folder.is_dir():
        pytest.skip("no photographs on this machine; drawn faces are tested above")
    files = sorted(folder.iterdir())[::94]
    samples = [Sample(file.name, image=file.read_bytes()) for file in files]
    kept, _ = run(stage(FacesConfig(min_side=64)), *samples)
    pictures = {each.id.split("#")[0] for each in kept}
    assert len(samples) > 50 and len(pictures) > 0.9 * len(samples)
    assert len(kept) < 1.1 * len(pictures)
