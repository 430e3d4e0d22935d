"""Hashes of pictures, near duplicates and groups, against brute force."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

pytest.importorskip("apache_beam", reason="curation needs the extra `curate`")

from flip_jax.curate.config import SplitConfig
from flip_jax.curate.dedupe import BANDS, Edges, band_first, components, near_pairs
from flip_jax.curate.pictures import _BAND_ORDER, perceptual_hash, pixel_hash
from flip_jax.curate.sorter import LIMIT, Sorter
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
    for node, root in components(edges).tolist():
        groups.setdefault(root, set()).add(node)
    return {frozenset(group) for group in groups.values()}


def _near(words: np.ndarray, band: int, max_distance: int, folder, limit: int = LIMIT):
    """Pairs of rows, int [P, 2]; rows stand for their nodes."""
    sorter = Sorter(folder, 5, limit)
    rows = np.arange(len(words), dtype=np.uint64)
    sorter.add(band_first(np.column_stack([words, rows]), band))
    found = near_pairs(sorter.sorted(), max_distance, folder, band == 0, limit)
    return np.concatenate([np.zeros((0, 2), np.int64), *(each.astype(np.int64) for each in found)])


@pytest.mark.parametrize("memory", [24, LIMIT])
@pytest.mark.parametrize("limit", [0, 6, 15])
def test_all_near_duplicates_are_found(tmp_path, limit, memory):
    """Up to 15 bits the bands miss none, however few rows memory holds: one band has more of
    them."""
    rng = np.random.default_rng(limit)
    centres = rng.integers(0, 2, (60, 256), np.uint8)
    bits = centres[rng.integers(0, 60, 300)]
    for row in bits:
        flips = rng.choice(256, rng.integers(0, limit // 2 + 3), replace=False)
        row[flips] ^= 1
    bits[7] = bits[5] = bits[3]
    bits[200:240, :16] = 0  # one band that is everywhere the same, among different hashes
    found = [_near(_words(bits), band, limit, tmp_path, memory) for band in range(BANDS)]
    pairs = {tuple(sorted(pair)) for each in found for pair in each.tolist()}
    wanted = _brute_force(bits, limit)
    assert pairs <= wanted
    assert _linked(pairs) == _linked(wanted)
    assert wanted


@pytest.mark.parametrize("memory", [25, LIMIT])
def test_one_band_that_all_share_is_compared_whole(tmp_path, memory):
    """Two full bands one after the other, each too large for memory: all pairs of each are
    compared, and none across."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2, (120, 256), np.uint8)
    bits[:60, :16], bits[60:, :16] = 0, 1
    found = _near(_words(bits), 0, 120, tmp_path, memory)
    distance = (bits[:, None] != bits[None]).sum(axis=2)
    same = np.arange(120) // 60
    wanted = np.argwhere((distance <= 120) & (same[:, None] == same))
    assert {tuple(sorted(pair)) for pair in found.tolist()} == {
        (a, b) for a, b in wanted.tolist() if a < b
    }
    assert len(found) > 100


def test_near_misses_are_not_paired(tmp_path):
    bits = np.zeros((2, 256), np.uint8)
    bits[1, :21] = 1
    assert all(len(_near(_words(bits), band, 20, tmp_path)) == 0 for band in range(BANDS))
    assert any(len(_near(_words(bits), band, 21, tmp_path)) == 1 for band in range(BANDS))


@pytest.mark.parametrize("rows", [0, 1])
def test_few_hashes(tmp_path, rows):
    assert len(_near(np.zeros((rows, 4), np.uint64), 0, 20, tmp_path)) == 0


@pytest.mark.parametrize("memory", [50, LIMIT])
def test_equal_hashes_make_a_star_and_not_all_pairs(tmp_path, memory):
    pairs = _near(np.zeros((1000, 4), np.uint64), 0, 20, tmp_path, memory)
    assert len(pairs) == 999 and set(pairs[:, 1].tolist()) == {0}
    assert len(_near(np.zeros((1000, 4), np.uint64), 1, 20, tmp_path, memory)) == 0


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40))
def test_components_are_what_paths_connect(edges):
    reach = np.eye(31, dtype=bool)
    for a, b in edges:
        reach[a, b] = reach[b, a] = True
    for _ in range(5):  # paths of length 32
        reach = reach @ reach
    far = np.uint64(2**64 - 31)  # nodes are hashes, of which float64 would not keep all bits
    nodes, smallest = components(np.array(edges, np.uint64).reshape(-1, 2) + far).T
    found = dict(zip((nodes - far).tolist(), (smallest - far).tolist(), strict=True))
    assert found == {node: int(reach[node].argmax()) for node in {n for e in edges for n in e}}
    assert nodes.dtype == smallest.dtype == np.uint64 and np.all(nodes[1:] > nodes[:-1])


def _union_find(pairs: list[list[int]]) -> dict[int, int]:
    """The plain way: the smallest of the nodes that each is joined to."""
    parent: dict[int, int] = {}

    def root(node: int) -> int:
        while parent.setdefault(node, node) != node:
            node = parent[node]
        return node

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {node: root(node) for node in list(parent)}


@pytest.mark.parametrize("kind", ["random", "path", "clique", "star"])
@pytest.mark.parametrize("memory", [16, 100, LIMIT])
def test_components_are_the_same_with_little_memory(tmp_path, kind, memory):
    rng = np.random.default_rng(1)
    names = rng.integers(2**62, 2**64, 300, np.uint64)
    if kind == "random":
        ends = rng.integers(0, 300, (200, 2))
    elif kind == "path":  # in any order, so that the smallest is far from most
        ends = rng.permutation(np.stack([np.arange(299), np.arange(1, 300)], axis=1))
    elif kind == "clique":
        ends = np.argwhere(np.tri(40, k=-1)) + 7
    else:
        ends = np.stack([np.full(299, 150), np.delete(np.arange(300), 150)], axis=1)
    pairs = names[ends]
    twice = np.concatenate([pairs, pairs[::-1, ::-1]])
    edges, links = Edges(tmp_path, memory), Edges(tmp_path, memory)
    edges.add(twice)
    links.add(twice)
    wanted = _union_find([pair for pair in pairs.tolist() if pair[0] != pair[1]])
    found = [pair for block in edges.components() for pair in block.tolist()]
    assert dict(found) == wanted
    assert len({tuple(pair) for pair in found}) == len(wanted)  # no node with two answers
    kept = np.concatenate(list(links.links()))
    assert _union_find(kept.tolist()) == wanted
    if memory >= 100 and kind == "clique":  # many pairs of few nodes are made few
        assert len(kept) == 39


def test_splits_have_their_shares_and_depend_on_group_and_seed_only():
    cfg = SplitConfig(train=0.7, val=0.2, test=0.1)
    found = [split_of(f"person {number}", cfg) for number in range(20_000)]
    for name in ("train", "val", "test"):
        assert found.count(name) / 20_000 == pytest.approx(getattr(cfg, name), abs=0.015)
    assert found == [split_of(f"person {number}", cfg) for number in range(20_000)]
    other = SplitConfig(train=0.7, val=0.2, test=0.1, seed=1)
    assert found != [split_of(f"person {number}", other) for number in range(20_000)]
    assert split_of("a", SplitConfig(train=1.0, val=0.0, test=0.0)) == "train"
