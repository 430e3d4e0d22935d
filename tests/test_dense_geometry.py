"""Where pixels go on the way into the network and back; what is drawn for training pictures."""

import dataclasses

import cv2
import numpy as np
import pytest

from flip_jax.data.drawn_faces import PARSING_CLASSES, draw_face
from flip_jax.data.readers.lapa import Lapa
from flip_jax.data.transforms import resize_image
from flip_jax.downstream.dense_augment import (
    Augment,
    change_pixels,
    flip_mask,
    flip_points,
    mirrored_classes,
    random_affine,
)
from flip_jax.downstream.dense_geometry import (
    FIVE_PLACES,
    FIVE_POINTS,
    Geometry,
    five_point_matrix,
    sample_bilinear,
    similarity,
    squash_matrix,
    tanh_unwarp,
    tanh_warp,
)

NOTHING = Augment(0.0, 0.0, 0.0, gray=0.0, gamma=0.0, blur=0.0)


@pytest.fixture(scope="module")
def face():
    return draw_face(seed=1, identity=3, picture=0, size=96)


@pytest.mark.parametrize("factor", [0.1, 0.8, 1.0])
def test_the_warp_has_an_exact_inverse(factor):
    end = 1 + 3 * factor  # beyond, tanh is 1 within a few roundings
    c = np.linspace(-end, end, 1201)
    bent = tanh_warp(c, factor)
    assert np.all(np.abs(bent) < 1) and np.all(np.diff(bent) > 0)
    np.testing.assert_allclose(tanh_unwarp(bent, factor), c, rtol=0, atol=1e-11)
    np.testing.assert_array_equal(bent[np.abs(c) <= 1 - factor], c[np.abs(c) <= 1 - factor])
    # No kink: the slope on both sides of the border is 1.
    edge = 1 - factor
    step = 1e-6
    assert tanh_warp(np.array([edge + step]), factor)[0] - edge == pytest.approx(step, rel=1e-4)


def test_no_warp_is_no_change():
    c = np.linspace(-3, 3, 13)
    assert tanh_warp(c, 0.0) is c and tanh_unwarp(c, 0.0) is c


def test_a_warped_point_by_hand():
    """f = 0.8, c = 1: 0.8 tanh(1) + 0.2."""
    np.testing.assert_allclose(tanh_warp(np.array([1.0, -1.0]), 0.8), [0.80927533, -0.80927533])


@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_points_come_back(factor, face):
    """Through an alignment and a random turn, over the whole picture and around it."""
    rng = np.random.default_rng(2)
    matrix = five_point_matrix(face.landmarks, 64)
    geometry = Geometry(matrix, 64, factor).then(random_affine(Augment(), 64, rng)[0])
    points = rng.uniform(-30, 126, (500, 2))
    there = geometry.forward(points)
    if factor:
        assert there.min() > -0.5 and there.max() < 63.5
    np.testing.assert_allclose(geometry.inverse(there), points, rtol=0, atol=1e-8)


def test_squashing_maps_corners_of_pixels():
    geometry = Geometry(squash_matrix(20, 50, 10), 10)
    corners = np.array([(-0.5, -0.5), (49.5, 19.5), (24.5, 9.5)])
    np.testing.assert_allclose(geometry.forward(corners), [(-0.5, -0.5), (9.5, 9.5), (4.5, 4.5)])


def test_a_squashed_picture_is_what_the_encoder_knows(face):
    for size in (48, 128):
        geometry = Geometry(squash_matrix(96, 96, size), size)
        assert np.array_equal(geometry.place_image(face.image), resize_image(face.image, size))
        # The general path, forced by a warp that bends nothing inside the picture.
        near = dataclasses.replace(geometry, matrix=geometry.matrix + 1e-9).place_image(face.image)
        wanted = resize_image(face.image, size).astype(int)
        assert np.abs(near[2:-2, 2:-2].astype(int) - wanted[2:-2, 2:-2]).mean() < 1.5


def test_picture_mask_and_points_move_together(face):
    """A disc around each of some landmarks is found around the moved landmark, in both."""
    rng = np.random.default_rng(5)
    for factor in (0.0, 0.8):
        for _ in range(3):
            square = random_affine(Augment(shift=0.05, rotate=0.5, scale=0.1), 128, rng)[0]
            geometry = Geometry(squash_matrix(96, 96, 128), 128, factor).then(square)
            for point in face.landmarks[[30, 36, 45, 48]].astype(np.float64):
                spot = np.zeros((96, 96), np.uint8)
                cv2.circle(spot, np.round(point).astype(int).tolist(), 3, 255, -1)
                wanted = geometry.forward(np.round(point))
                for placed in (
                    geometry.place_mask(spot),
                    geometry.place_image(np.repeat(spot[..., None], 3, -1))[..., 0],
                ):
                    y, x = np.nonzero(placed > 127)
                    assert np.hypot(x.mean() - wanted[0], y.mean() - wanted[1]) < 0.3


def test_masks_are_nearest_pixels():
    mask = np.arange(6, dtype=np.uint8).reshape(2, 3)
    twice = Geometry(squash_matrix(2, 3, 6), 6).place_mask(mask)
    assert np.array_equal(twice, mask.repeat(3, 0).repeat(2, 1))
    shifted = Geometry(np.array([(1.0, 0, 1), (0, 1, 0)]), 4).place_mask(mask)
    assert shifted.tolist() == [[0, 0, 1, 2], [0, 3, 4, 5], [0] * 4, [0] * 4]


@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_a_mask_comes_back(factor, face):
    """Placed and taken back as one-hot maps: the classes of nearly all pixels are as before."""
    geometry = Geometry(five_point_matrix(face.landmarks, 256), 256, factor)
    placed = geometry.place_mask(face.mask)
    maps = (placed[..., None] == np.arange(len(PARSING_CLASSES))).astype(np.float32)
    found, shown = geometry.take_back(maps, 96, 96)
    assert shown.all() == (factor > 0)
    same = found.argmax(-1) == face.mask
    assert same[shown].mean() > 0.985
    assert shown.mean() > 0.5


def test_taking_back_is_torch_bilinear():
    torch = pytest.importorskip("torch", reason="the oracle needs PyTorch (extra `torch`)")
    maps = np.random.default_rng(0).normal(size=(7, 7, 6)).astype(np.float32)
    found, shown = Geometry(squash_matrix(30, 41, 28), 28).take_back(maps, 30, 41)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(maps).permute(2, 0, 1)[None], (30, 41), mode="bilinear", align_corners=False
    )[0].permute(1, 2, 0)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    assert shown.all()


def test_bilinear_at_whole_pixels_is_the_map():
    maps = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
    grid = np.stack(np.meshgrid(np.arange(4), np.arange(3)), -1).astype(np.float32)
    assert np.array_equal(sample_bilinear(maps, grid), maps)


def test_similarity_is_the_least_squares_one():
    """Recovers a known one exactly; of noisy points no neighbour is better."""
    rng = np.random.default_rng(0)
    points = rng.normal(size=(5, 2)) * 30
    angle, scale, shift = 0.4, 1.7, (3.0, -5.0)
    turn = scale * np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    places = points @ turn.T + shift
    np.testing.assert_allclose(similarity(points, places), np.column_stack([turn, shift]))
    noisy = places + rng.normal(size=(5, 2))
    found = similarity(points, noisy)

    def error(m):
        return ((points @ m[:, :2].T + m[:, 2] - noisy) ** 2).sum()

    for a, b, x, y in np.vstack([np.eye(4), -np.eye(4)]) * 1e-4:
        assert error(found) < error(found + np.array([(a, -b, x), (b, a, y)]))


def test_five_points(face):
    assert sorted(FIVE_POINTS) == [5, 68, 98, 106]
    geometry = Geometry(five_point_matrix(face.landmarks, 128), 128)
    eyes = face.landmarks[36:42].mean(0), face.landmarks[42:48].mean(0)
    found = geometry.forward(np.array(eyes, np.float64))
    assert np.abs(found - (FIVE_PLACES[:2] * 128 - 0.5)).max() < 8
    with pytest.raises(ValueError, match="of 7 landmarks"):
        five_point_matrix(np.zeros((7, 2)), 128)


def test_what_is_drawn_is_a_function_of_the_generator():
    draw = [random_affine(Augment(), 64, np.random.default_rng(n)) for n in (1, 1, 2)]
    assert np.array_equal(draw[0][0], draw[1][0]) and not np.array_equal(draw[0][0], draw[2][0])
    assert np.array_equal(
        random_affine(NOTHING, 64, np.random.default_rng(1))[0], [(1, 0, 0), (0, 1, 0)]
    )


def test_widths_of_the_draws():
    """Standard deviations where normal, limits where even; turned around the centre."""
    rng = np.random.default_rng(0)
    for normal in (True, False):
        augment = Augment(shift=0.02, rotate=0.3, scale=0.1, normal=normal)
        found = np.stack([random_affine(augment, 101, rng)[0] for _ in range(4000)])
        angle = np.arctan2(found[:, 1, 0], found[:, 0, 0])
        factor = np.hypot(found[:, 1, 0], found[:, 0, 0])
        shift = found[:, :, :2] @ np.array([50, 50]) + found[:, :, 2] - 50
        assert np.abs(shift).max() == pytest.approx(2.02, rel=0.01)
        if normal:
            assert angle.std() == pytest.approx(0.3, rel=0.05)
            assert factor.std() == pytest.approx(0.1, rel=0.05)
        else:
            assert np.abs(angle).max() == pytest.approx(0.3, rel=0.01)
            assert factor.min() == pytest.approx(0.9, rel=0.01)
            assert angle.std() == pytest.approx(0.3 / 3**0.5, rel=0.05)


@pytest.mark.parametrize("name", ["gray", "gamma", "blur", "occlusion", "noise"])
def test_each_change_of_pixels(name, face):
    augment = dataclasses.replace(NOTHING, **{name: 1.0})
    before = face.image.copy()
    found = change_pixels(augment, face.image, np.random.default_rng(3))
    assert np.array_equal(face.image, before), "the input was changed"
    assert found.dtype == np.uint8 and found.shape == before.shape
    assert not np.array_equal(found, before)
    assert np.array_equal(found, change_pixels(augment, before, np.random.default_rng(3)))
    assert np.array_equal(change_pixels(NOTHING, before, np.random.default_rng(3)), before)
    if name == "gray":
        assert np.ptp(found.astype(int), axis=-1).max() == 0
    if name == "gamma":  # one table for all values, which keeps black and white
        assert (
            len({(int(a), int(b)) for a, b in zip(before.ravel(), found.ravel(), strict=True)})
            <= 256
        )


def test_mirrored_classes_by_name():
    pairs = {
        (names[k], names[m])
        for names in (PARSING_CLASSES, Lapa.CLASSES)
        for k, m in enumerate(mirrored_classes(names))
        if k != m
    }
    both = {(b, a) for a, b in pairs}
    assert both == pairs
    wanted = ("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear")
    wanted += ("left_eye", "right_eye"), ("left_eyebrow", "right_eyebrow")
    assert pairs == {pair for a, b in wanted for pair in ((a, b), (b, a))}


def test_sides_in_other_words():
    names = "Left eye", "nose", "brow.right", "RIGHT EYE", "brow.left", "l_lip", "gloves"
    assert mirrored_classes(names).tolist() == [3, 1, 4, 0, 2, 5, 6]
    with pytest.raises(ValueError, match=r"class 'left ear' has no other side.*set augment.flip=0"):
        mirrored_classes(("background", "left ear"))
    with pytest.raises(ValueError, match="does not name the classes"):
        mirrored_classes(())


def test_a_mirrored_face(face):
    """Mirrored points look like points of a face again: left stays left; twice is nothing."""
    augment = dataclasses.replace(NOTHING, flip=1.0)
    matrix, mirrored = random_affine(augment, 96, np.random.default_rng(0))
    assert mirrored
    geometry = Geometry(squash_matrix(96, 96, 96), 96).then(matrix)
    assert np.array_equal(geometry.place_mask(face.mask), face.mask[:, ::-1])
    points = flip_points(geometry.forward(face.landmarks.astype(np.float64)))
    np.testing.assert_allclose(points[36], (95 - face.landmarks[45, 0], face.landmarks[45, 1]))
    for one, other in ((0, 16), (17, 26), (36, 45), (48, 54), (31, 35), (60, 64), (67, 65)):
        assert points[one, 0] < points[other, 0]
    # Along the jaw, brows and lips the order stays that of the scheme.
    assert np.all(np.diff(points[17:22, 0]) > 0) and np.all(np.diff(points[48:55, 0]) > 0)
    mask = flip_mask(face.mask[:, ::-1], PARSING_CLASSES)
    eye = PARSING_CLASSES.index("l_eye"), PARSING_CLASSES.index("r_eye")
    for name in eye:
        other = eye[0] + eye[1] - name
        assert np.array_equal(mask == name, (face.mask == other)[:, ::-1])
    with pytest.raises(ValueError, match="set augment"):
        flip_points(np.zeros((7, 2)))


@pytest.mark.parametrize(
    "bad", [{"shift": 1.5}, {"rotate": -0.1}, {"scale": 1.0}, {"gray": 2.0}, {"flip": -1.0}]
)
def test_numbers_out_of_range(bad):
    with pytest.raises(ValueError, match=f"settings.augment.{next(iter(bad))}="):
        dataclasses.replace(NOTHING, **bad).check("settings.augment")
    Augment().check("settings.augment")
