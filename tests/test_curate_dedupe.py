"""Hashes of pictures, near duplicates and groups, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate.config import SplitConfig
from flip_jax.curate.dedupe import BANDS, components, copies, near_pairs
from flip_jax.curate.pictures import _BAND_ORDER, perceptual_hash, pixel_hash
from flip_jax.curate.split import split_of
from flip_jax.data.drawn_faces import draw_face
from flip_jax.data.transforms import decode_image, encode_jpeg


def _bits(data: bytes) -> np.ndarray:
    return np.unpackbits(np.frombuffer(data, np.uint8))


def _words(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=1).view("<u8")


def test_the_perceptual_hash_is_the_sign_of_the_lowest_frequencies():
    """Against the definition of the transform in float64."""
    grey = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    image = np.repeat(grey[:, :, None], 3, axis=2)
    wave = np.cos(np.pi * np.outer(np.arange(16), np.arange(64) + 0.5) / 64)
    wave[0] /= np.sqrt(2)
    low = (wave @ grey.astype(np.float64) @ wave.T / 32).ravel()
    bits = low > np.median(low[1:])
    found = _bits(perceptual_hash(image))
    np.testing.assert_array_equal(found, bits[_BAND_ORDER])


def test_each_band_has_one_bit_of_every_row_and_column():
    for band in _BAND_ORDER.reshape(BANDS, 16):
        assert sorted(band // 16) == sorted(band % 16) == list(range(16))


@pytest.fixture(scope="module")
def faces():
    return [draw_face(seed=0, identity=number, picture=0, size=160).image for number in range(40)]


def _distance(first: np.ndarray, second: np.ndarray) -> int:
    return int((_bits(perceptual_hash(first)) != _bits(perceptual_hash(second))).sum())


def test_copies_of_a_picture_are_near_and_other_people_are_not(faces):
    limit = 20
    for face in faces[:10]:
        picture = Image.fromarray(face)
        small = np.asarray(picture.resize((90, 90), Image.Resampling.LANCZOS))
        assert _distance(face, small) <= limit
        assert _distance(face, decode_image(encode_jpeg(face, 50))) <= limit
        assert _distance(face, np.asarray(ImageEnhance.Brightness(picture).enhance(1.1))) <= limit
    hashes = [_bits(perceptual_hash(face)) for face in faces]
    others = [(a != b).sum() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(others) > limit


def test_the_pixel_hash_is_of_pixels_and_shape(faces):
    face = faces[0]
    assert pixel_hash(face) == pixel_hash(face.copy())
    assert pixel_hash(face) == pixel_hash(face[::1, ::1])
    changed = face.copy()
    changed[3, 4, 1] ^= 1
    assert pixel_hash(changed) != pixel_hash(face)
    assert pixel_hash(face.reshape(80, 320, 3)) != pixel_hash(face)


def _brute_force(bits: np.ndarray, limit: int) -> set[tuple[int, int]]:
    """Components of all pairs within the limit, as the set of linked pairs."""
    distance = (bits[:, None] != bits[None]).sum(axis=2)
    return {(a, b) for a, b in np.argwhere(distance <= limit).tolist() if a < b}


def _linked(pairs: set[tuple[int, int]]) -> set[frozenset[int]]:
    groups: dict[int, set[int]] = {}
    edges = np.array(sorted(pairs), np.uint64).reshape(-1, 2)
    for node, root in zip(*(each.tolist() for each in components(edges)), strict=True):
        groups.setdefault(root, set()).add(node)
    return {frozenset(group) for group in groups.values()}


@pytest.mark.parametrize("limit", [0, 6, 15])
def test_all_near_duplicates_are_found(limit):
    """Up to 15 bits the bands miss none."""
    rng = np.random.default_rng(limit)
    centres = rng.integers(0, 2, (60, 256), np.uint8)
    bits = centres[rng.integers(0, 60, 300)]
    for row in bits:
        flips = rng.choice(256, rng.integers(0, limit // 2 + 3), replace=False)
        row[flips] ^= 1
    bits[7] = bits[5] = bits[3]
    found = [near_pairs(_words(bits), band, limit) for band in range(BANDS)]
    pairs = {tuple(sorted(pair)) for each in found for pair in each.tolist()}
    wanted = _brute_force(bits, limit)
    assert pairs <= wanted
    assert _linked(pairs) == _linked(wanted)
    assert wanted


def test_near_misses_are_not_paired():
    bits = np.zeros((2, 256), np.uint8)
    bits[1, :21] = 1
    assert all(len(near_pairs(_words(bits), band, 20)) == 0 for band in range(BANDS))
    assert any(len(near_pairs(_words(bits), band, 21)) == 1 for band in range(BANDS))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_hashes(rows):
    assert len(near_pairs(np.zeros((rows, 4), np.uint64), 0, 20)) == 0


def test_equal_hashes_make_a_star_and_not_all_pairs():
    pairs = near_pairs(np.zeros((1000, 4), np.uint64), 0, 20)
    assert len(pairs) == 999
    assert len(near_pairs(np.zeros((1000, 4), np.uint64), 1, 20)) == 0


def test_copies_keep_one_of_equals():
    number = np.array([50, 20, 30, 20, 40, 20], np.uint64)
    pixels = np.array([[1] * 4, [2] * 4, [1] * 4, [2] * 4, [3] * 4, [1] * 4], np.uint64)
    again, stays = copies(number, pixels)
    assert again.tolist() == [False, False, False, True, False, True]
    assert stays.tolist() == [2, 1, 2, -1, 4, -1]


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_components_are_what_paths_connect(edges):
    reach = np.eye(31, dtype=bool)
    for a, b in edges:
        reach[a, b] = reach[b, a] = True
    for _ in range(5):  # paths of length 32
        reach = reach @ reach
    far = np.uint64(2**64 - 31)  # nodes are hashes, of which float64 would not keep all bits
    nodes, smallest = components(np.array(edges, np.uint64).reshape(-1, 2) + far)
    found = dict(zip((nodes - far).tolist(), (smallest - far).tolist(), strict=True))
    assert found == {node: int(reach[node].argmax()) for node in {n for e in edges for n in e}}
    assert nodes.dtype == smallest.dtype == np.uint64 and np.all(nodes[1:] > nodes[:-1])


def test_splits_have_their_shares_and_depend_on_group_and_seed_only():
    cfg = SplitConfig(train=0.7, val=0.2, test=0.1)
    found = [split_of(f"person {number}", cfg) for number in range(20_000)]
    for name in ("train", "val", "test"):
        assert found.count(name) / 20_000 == pytest.approx(getattr(cfg, name), abs=0.015)
    assert found == [split_of(f"person {number}", cfg) for number in range(20_000)]
    other = SplitConfig(train=0.7, val=0.2, test=0.1, seed=1)
    assert found != [split_of(f"person {number}", other) for number in range(20_000)]
    assert split_of("a", SplitConfig(train=1.0, val=0.0, test=0.0)) == "train"
