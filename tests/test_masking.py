"""Which patches are hidden, and where regions of the face come from and go to."""

import cv2
import jax
import numpy as np
import pytest
from test_pipeline import write

from flip_jax.config import DataConfig
from flip_jax.data.drawn_faces import PARSING_CLASSES, draw_face
from flip_jax.data.pipeline import TrainPipeline
from flip_jax.data.records import Record
from flip_jax.data.regions import label_map, region_map
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.data.transforms import AUGMENT_OPS, encode_jpeg, move_labels, rand_augment
from flip_jax.losses.masking import hidden_patches


@pytest.mark.parametrize("masking", ["block", "random"])
@pytest.mark.parametrize("count", [1, 30, 78, 195])
def test_exactly_so_many_patches_are_hidden(masking, count):
    hidden = np.asarray(hidden_patches(jax.random.key(1), 50, 14, count, masking))
    assert hidden.shape == (50, count)
    assert (np.diff(hidden, axis=1) > 0).all() and hidden.min() >= 0 and hidden.max() < 196
    assert len({tuple(row) for row in hidden}) > 15  # at 195 those that leave out the middle


def neighbours(hidden, grid=14):
    """Share of the hidden patches' neighbours to the right that are hidden, too."""
    mask = np.zeros((len(hidden), grid * grid), bool)
    np.put_along_axis(mask, hidden, True, axis=1)
    mask = mask.reshape(-1, grid, grid)
    return (mask[:, :, 1:] & mask[:, :, :-1]).sum() / mask[:, :, :-1].sum()


def test_blocks_are_rectangles_everywhere_in_the_picture():
    block, spread = (
        np.asarray(hidden_patches(jax.random.key(2), 2000, 14, 78, masking))
        for masking in ("block", "random")
    )
    assert abs(neighbours(spread) - 77 / 195) < 0.01
    assert neighbours(block) > 0.7
    share = np.bincount(block.ravel(), minlength=196) / 2000
    assert share.min() > 0.02 and share.max() > 0.7  # few rectangles reach the corners
    np.testing.assert_allclose(share, share[::-1], atol=0.06)
    np.testing.assert_allclose(
        np.bincount(spread.ravel(), minlength=196) / 2000, 78 / 196, atol=0.06
    )


def test_one_region_is_hidden_whole_and_the_rest_anywhere():
    rows, count = 600, 20
    regions = np.zeros((rows, 196), np.uint32)
    regions[:, 30:36] |= 1 << 2
    regions[:, 34:50] |= 1 << 31  # two of its patches show the other one, too
    regions[:, 60:90] |= 1 << 5  # too large
    hidden = np.asarray(
        hidden_patches(jax.random.key(3), rows, 14, count, "region", regions=regions)
    )
    assert hidden.shape == (rows, count) and (np.diff(hidden, axis=1) > 0).all()
    mask = np.zeros((rows, 196), bool)
    np.put_along_axis(mask, hidden, True, axis=1)
    small, wide = mask[:, 30:36].all(1), mask[:, 34:50].all(1)
    assert (small | wide).all()
    assert 0.4 < small.mean() < 0.6 and not mask[:, 60:90].all(1).any()
    # With the small one hidden 14 others are, of 190, wherever they fall.
    others = mask[small & ~wide][:, [*range(30), *range(36, 196)]].mean(0)
    np.testing.assert_allclose(others, 14 / 190, atol=0.07)


def test_pictures_without_a_region_are_hidden_in_blocks():
    regions = np.zeros((500, 196), np.uint32)
    regions[:250, :100] = 1 << 4  # larger than what is hidden
    hidden = hidden_patches(jax.random.key(4), 500, 14, 78, "region", regions=regions)
    hidden = np.asarray(hidden)
    assert (np.diff(hidden, axis=1) > 0).all() and neighbours(hidden) > 0.7


@pytest.mark.parametrize(("share", "hardest"), [(0.0, 0), (0.3, 6), (0.5, 10), (1.0, 20)])
def test_a_share_of_the_hardest_is_hidden(share, hardest):
    rng = np.random.default_rng(0)
    difficulty = np.stack([rng.permutation(196) for _ in range(400)]).astype(np.float32)
    hidden = np.asarray(
        hidden_patches(
            jax.random.key(5), 400, 14, 20, "hard", difficulty=difficulty, hard_share=share
        )
    )
    assert hidden.shape == (400, 20) and (np.diff(hidden, axis=1) > 0).all()
    chosen = np.sort(np.take_along_axis(difficulty, hidden, axis=1), axis=1)[:, ::-1]
    np.testing.assert_array_equal(
        chosen[:, :hardest], np.broadcast_to(195 - np.arange(hardest), (400, hardest))
    )
    if hardest < 20:  # the others are any
        rest = chosen[:, hardest:].mean()
        assert rest == pytest.approx((195 - hardest) / 2, abs=5)


def record(face, name="a", **fields):
    parts = {"mask": cv2.imencode(".png", face.mask)[1].tobytes(), "landmarks": face.landmarks}
    return Record(
        id=name,
        group_id=name,
        image=encode_jpeg(face.image),
        captions=["she is young"],
        attributes=face.attributes,
        **(parts | fields),
    )


@pytest.fixture(scope="module")
def face():
    return draw_face(0, 3, 1, 128)


def test_region_map_of_a_mask(face):
    labels = label_map(record(face), 128, 128, 64)
    np.testing.assert_array_equal(labels[5, 7], face.mask[11, 15])
    found = region_map(labels, 8)
    assert found.shape == (64,) and found.dtype == np.uint32
    for patch in range(64):
        y, x = divmod(patch, 8)
        shown = set(np.unique(labels[8 * y : 8 * y + 8, 8 * x : 8 * x + 8]).tolist()) - {0}
        assert {bit for bit in range(32) if found[patch] >> bit & 1} == shown
    assert not region_map(np.full((16, 16), 32, np.uint8), 8).any()


@pytest.mark.parametrize("points", [68, 5])
def test_landmarks_cover_what_the_mask_shows(face, points):
    landmarks = face.landmarks
    if points == 5:
        groups = (range(36, 42), range(42, 48), [30], [48], [54])
        landmarks = np.stack([landmarks[list(group)].mean(0) for group in groups])
    # A mask is used before landmarks are; a wide picture is squashed as the picture is.
    wide = record(face, mask=None, landmarks=(landmarks * (2, 1)).astype(np.float32))
    labels = label_map(wide, 128, 256, 128)
    eyes, mouth = (4, 5) if points == 68 else (2, 3), 6 if points == 68 else 4
    names = ("l_eye", "r_eye")
    shown = np.isin(face.mask, [PARSING_CLASSES.index(name) for name in names])
    assert shown.any() and np.isin(labels, eyes)[shown].mean() > 0.9
    assert (labels == mouth).any() and 0.01 < (labels > 0).mean() < 0.25
    assert not label_map(record(face, mask=None, landmarks=None), 128, 128, 64).any()
    odd = record(face, mask=None, landmarks=face.landmarks[:7])
    assert not label_map(odd, 128, 128, 64).any()


@pytest.mark.parametrize(
    "name", [op for op in AUGMENT_OPS if op[:5] in ("Shear", "Trans", "Rotat")]
)
def test_labels_follow_the_picture(name, monkeypatch):
    """A white patch on black and its label stay on each other."""
    monkeypatch.setattr("flip_jax.data.transforms.AUGMENT_OPS", (name,))
    labels = np.zeros((64, 64), np.uint8)
    labels[20:36, 10:28] = 7
    moved_by = 0
    for seed in range(6):
        moves = []
        image = np.repeat(labels[..., None], 3, axis=2) // 7 * 255
        moved = rand_augment(image, np.random.default_rng(seed), 2, 10, moves)
        follow = move_labels(labels, moves)
        white = moved[..., 0] == 255
        assert set(np.unique(follow)) <= {0, 7} and white.any()
        assert ((follow == 7) | ~white).all()
        assert (moved[..., 0][follow == 7] > 100).mean() > 0.97
        moved_by += np.abs(np.array([np.eye(3)[:2], *moves]) - np.eye(3)[:2]).sum()
    assert moved_by > 0.5


def test_the_pipeline_brings_regions_only_when_asked(face, tmp_path):
    """Without augmentation those of the record; with it other ones; all else stays the same."""
    source = write(tmp_path, [record(face, str(n)) for n in range(8)])
    tokenizer = Tokenizer.load("grammar", 12)
    plain = DataConfig(batch_size=4, flip=False, randaugment_ops=0)
    batch = TrainPipeline(source, tokenizer, plain, 64, seed=0, region_patch=8).batch_at(0)
    expected = region_map(label_map(record(face), 128, 128, 64), 8)
    np.testing.assert_array_equal(batch["regions"], np.broadcast_to(expected, (4, 64)))
    mirrored = DataConfig(batch_size=8, randaugment_ops=0)
    with_map = TrainPipeline(source, tokenizer, mirrored, 64, seed=1, region_patch=8).batch_at(0)
    without = TrainPipeline(source, tokenizer, mirrored, 64, seed=1).batch_at(0)
    assert with_map.keys() - without.keys() == {"regions"}
    np.testing.assert_array_equal(with_map["image"], without["image"])
    turned = expected.reshape(8, 8)[:, ::-1].ravel()
    flipped = (with_map["image"] == batch["image"][0, :, ::-1]).all(axis=(1, 2, 3))
    assert 0 < flipped.sum() < 8
    np.testing.assert_array_equal(with_map["regions"], np.where(flipped[:, None], turned, expected))


def test_a_record_with_a_damaged_mask_is_passed_over(face, tmp_path):
    bad = record(face, "b", mask=b"no picture")
    source = write(tmp_path, [record(face), bad, record(face, "c")])
    cfg = DataConfig(batch_size=3)
    train = TrainPipeline(source, Tokenizer.load("grammar", 12), cfg, 64, seed=0, region_patch=8)
    assert sorted(train.batch_at(0)["bad"]) == [0, 0, 1]
