"""Heads of SLFIR against plain loops, and whether they learn."""

import jax
import numpy as np
import pytest
import tiny_downstream

from flip_jax.downstream import pair_visits
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import FaceData
from flip_jax.downstream.features import FeatureCache
from flip_jax.downstream.retrieval_features import FrozenGallery, FusedTower
from flip_jax.downstream.slfir_features import (
    Matches,
    PairFeatures,
    caption_rows,
    frozen_heads,
    fused_features,
    grid_means,
    hard_matches,
    image_features,
)
from flip_jax.downstream.slfir_heads import Recipe, contrastive_loss, embed, together, train_heads
from flip_jax.models.vit import normalize_pixels

WIDTH, EMBED, STEPS = 12, 8, 3
RECIPE = Recipe(40, 16, 0.0, 0.01, 0.5)
SHORT = Recipe(3, 60, 0.0, 0.06, 0.08)  # whole batches; compiled once for all that use it


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_contrastive_loss_by_a_loop():
    rng = np.random.default_rng(0)
    photo, query = (unit(rng.normal(size=(5, EMBED))) for _ in range(2))
    group = [0, 1, 0, 2, 3]
    total = 0.0
    for rows, columns in ((photo, query), (query, photo)):
        for i in range(5):
            logits = [
                rows[i] @ columns[j] / 0.1 for j in range(5) if j == i or group[j] != group[i]
            ]
            own = rows[i] @ columns[i] / 0.1
            total += np.log(np.sum(np.exp(logits))) - own
    found = contrastive_loss(
        photo.astype(np.float32), query.astype(np.float32), np.array(group, np.int32), 0.1
    )
    assert float(found) == pytest.approx(total / 10, abs=1e-5)


def features(count: int, seed: int, noise: float = 0.1) -> PairFeatures:
    """Photos, sketches and captions that are different linear pictures of the same thing."""
    rng, fixed = np.random.default_rng(seed), np.random.default_rng(0)
    turns = fixed.normal(size=(3, WIDTH, WIDTH))
    thing = rng.normal(size=(count, WIDTH))

    def seen(turn: np.ndarray, copies: int) -> np.ndarray:
        grain = noise * rng.normal(size=(count, copies, WIDTH))
        return (thing @ turn)[:, None] + grain

    return PairFeatures(
        photo=seen(turns[0], 1)[:, 0].astype(np.float16),
        sketch=seen(turns[1], STEPS).astype(np.float16),
        text=seen(turns[2], 2).astype(np.float32),
        group=np.arange(count, dtype=np.int32),
    )


def start() -> dict:
    rng = np.random.default_rng(5)

    def layer(columns: int) -> dict:
        kernel = rng.normal(size=(WIDTH, columns)) * WIDTH**-0.5
        return {"kernel": kernel.astype(np.float32), "bias": np.zeros(columns, np.float32)}

    return {
        "photo": layer(EMBED),
        "sketch": layer(EMBED),
        "text": layer(EMBED),
        "match": layer(2),
        "temperature": np.float32(0.07),
    }


def matches(count: int) -> Matches:
    """The first number of a fused feature says whether text and photo belong together."""
    fused = np.random.default_rng(1).normal(size=(count, 2, 3, WIDTH)).astype(np.float32)
    fused[..., 0] = [4, -4, -4]
    return Matches(fused, np.ones(count, bool))


def val_oracle(heads: dict, val: PairFeatures) -> float:
    """Mean of 1 / rank by loops, half by sketches, half by sketches with captions."""

    def project(name: str, x: np.ndarray) -> np.ndarray:
        return unit(x.astype(np.float64) @ heads[name]["kernel"] + heads[name]["bias"])

    photo, total, seen = project("photo", val.photo), 0.0, 0
    for i in range(len(photo)):
        text = project("text", val.text[i, 0])
        for sketch in val.sketch[i]:
            query = project("sketch", sketch)
            for each in (query, unit(query + text)):
                cosines = photo @ each
                total += 1 / np.sum(cosines >= cosines[i])
                seen += 1
    return 100 * total / seen


def test_training_learns_and_keeps_the_best_on_validation():
    train, val, first = features(60, 1), features(20, 2), start()
    fitted = train_heads(RECIPE, (1e-9, 0.01), first, train, matches(60), val, seed=0)
    assert fitted.rate == 0.01 and fitted.epoch > 0
    assert fitted.val_score.shape == (41,) and fitted.val_score[0] < 40
    assert fitted.val_score.max() > 60
    assert fitted.val_score[0] == pytest.approx(val_oracle(first, val), abs=1e-3)
    best = val_oracle(fitted.heads, val)
    assert fitted.val_score.max() == fitted.val_score[fitted.epoch] == pytest.approx(best, abs=0.5)
    assert set(fitted.losses) == {"sketch", "caption", "both", "match", "total"}
    parts = [fitted.losses[name] for name in ("sketch", "caption", "both", "match")]
    np.testing.assert_allclose(fitted.losses["total"], sum(parts), rtol=1e-4)
    for name, values in fitted.losses.items():
        assert values[-1] < 0.7 * values[0], name
    again = train_heads(RECIPE, (1e-9, 0.01), first, train, matches(60), val, seed=0)
    jax.tree.map(np.testing.assert_array_equal, again.heads, fitted.heads)


def test_the_start_takes_part():
    """A rate that spoils everything leaves the heads as they were."""
    val = features(20, 2, noise=0.0)
    good = train_heads(SHORT, (0.02,), start(), features(60, 1), matches(60), val, 0).heads
    fitted = train_heads(SHORT, (30.0,), good, features(60, 1), matches(60), val, 0)
    assert fitted.epoch == 0
    jax.tree.map(np.testing.assert_array_equal, fitted.heads, good)


def test_the_temperature_stays_in_its_bounds():
    some = features(60, 1), matches(60), features(20, 2)
    fitted = train_heads(SHORT, (0.1,), start(), *some, seed=0)
    assert np.float32(0.06) <= fitted.heads["temperature"] <= np.float32(0.08)


def test_a_broken_training_is_an_error():
    train = features(60, 1)
    train.text[3] = np.inf
    with pytest.raises(FloatingPointError, match=r"not a number at the learning rate 0\.01"):
        train_heads(SHORT, (0.01,), start(), train, matches(60), features(20, 2), 0)


def test_embeddings_are_projections():
    some, heads = features(70, 3), start()  # more than a block
    found = embed(heads, some)
    for name in ("photo", "sketch", "text"):
        raw = getattr(some, name).astype(np.float64) @ heads[name]["kernel"]
        np.testing.assert_allclose(found[name], unit(raw), atol=1e-5)
    both = together(found["sketch"], found["text"][:, :1])
    np.testing.assert_allclose(both, unit(found["sketch"] + found["text"][:, :1]), atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    backbone = Backbone.load(tiny_downstream.write_model(folder / "model"), batch_size=8)
    path = tiny_downstream.write_faces(folder / "drawn", train_identities=4, test_identities=5)
    faces = FaceData(path, backbone.image_size).split("test")
    tower = FusedTower(backbone, "enc")
    return backbone, faces, tower, FrozenGallery(tower, faces, 2, FeatureCache(None))


def test_features_begin_with_the_class_token(tiny):
    backbone, faces, _, _ = tiny
    short = image_features(backbone, faces.images, "class")
    long = image_features(backbone, faces.images, "layers")
    width = backbone.cfg.model.vision.width
    tokens = backbone.image_tokens(faces.images)
    np.testing.assert_allclose(short, tokens[:, 0], atol=2e-3)
    np.testing.assert_array_equal(long[:, :width], short)
    states = backbone.pooled_states(faces.images)
    assert long.shape == (10, (1 + states.shape[1]) * width)
    centred = states - states.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt(centred.var(axis=2, keepdims=True) + 1e-5)
    np.testing.assert_allclose(long[:, width:], normed.reshape(10, -1), atol=5e-3)
    # The tiny model has a grid of two by two patches, which are the cells.
    grid = image_features(backbone, faces.images, "grid")
    np.testing.assert_array_equal(grid[:, : long.shape[1]], long)
    block = backbone.map_rows(first_block, faces.images)
    centred = block - block.mean(axis=2, keepdims=True)
    normed = centred / np.sqrt(centred.var(axis=2, keepdims=True) + 1e-5)
    np.testing.assert_allclose(grid[:, long.shape[1] :], normed.reshape(10, -1), atol=5e-3)


def first_block(model, image):
    """Patches of the first block that is looked at."""
    return model.vit(normalize_pixels(image), return_blocks=True)[1][0][:, 1:]


@pytest.mark.parametrize("side", [2, 4, 6, 14])
def test_means_of_a_grid_by_loops(side):
    patches = np.random.default_rng(side).normal(size=(3, side, side, 5)).astype(np.float32)
    cells = min(side, 4)
    found = np.asarray(grid_means(patches.reshape(3, side * side, 5)))
    assert found.shape == (3, cells * cells, 5)
    # Patch p lies in cell p * cells // side, so cell n begins at the first p not below n * side.
    edges = [-(-n * side // cells) for n in range(cells + 1)]
    for y in range(cells):
        for x in range(cells):
            cell = patches[:, edges[y] : edges[y + 1], edges[x] : edges[x + 1]]
            np.testing.assert_allclose(found[:, y * cells + x], cell.mean((1, 2)), atol=1e-6)


def test_frozen_heads_are_those_of_the_checkpoint(tiny):
    backbone, faces, _, gallery = tiny
    found = image_features(backbone, faces.images, "layers")
    pairs = PairFeatures(found, found[:, None], np.zeros((10, 1, 32), np.float32), faces.groups)
    heads = frozen_heads(backbone.params, found.shape[1])
    embeds = embed(heads, pairs)
    wanted = backbone.embed_images(faces.images)
    np.testing.assert_allclose(embeds["photo"], wanted, atol=2e-3)
    np.testing.assert_allclose(embeds["sketch"][:, 0], wanted, atol=2e-3)
    assert [gallery.texts[n] for n in caption_rows(gallery)[3]] == faces.captions[3][:2]


def test_matches_are_the_fused_pass_of_hard_negatives(tiny):
    backbone, faces, tower, gallery = tiny
    rng = np.random.default_rng(0)
    embeds = {
        "photo": unit(rng.normal(size=(10, 16))).astype(np.float32),
        "text": unit(rng.normal(size=(10, 2, 16))).astype(np.float32),
    }
    group = faces.groups.astype(np.int32)
    found = hard_matches(tower, gallery, embeds, group, FeatureCache(None), draws=3, seed=0)
    assert found.fused.shape == (10, 3, 3, 32) and found.valid.all()
    # All pairs one by one; a fused feature tells which pair it is of.
    tokens = backbone.image_tokens(faces.images)
    images, texts = (grid.ravel() for grid in np.mgrid[:10, :20])
    every = fused_features(tower, gallery, images, texts, FeatureCache(None)).reshape(10, 20, -1)
    head = jax.device_get(backbone.params["itm_head"])
    for image in (0, 7):
        logits = backbone.match(gallery.texts, np.repeat(tokens[image : image + 1], 20, axis=0))
        np.testing.assert_allclose(
            every[image] @ head["kernel"] + head["bias"], logits, rtol=1e-3, atol=1e-4
        )
    drawn = set()
    for row in range(10):
        for draw in range(3):
            pairs = []
            for fused in found.fused[row, draw]:
                distance = np.abs(every - fused).max(axis=2)
                assert distance.min() < 1e-5
                pairs.append(np.unravel_index(distance.argmin(), distance.shape))
            (own, text), (photo, same), (again, other) = pairs
            assert own == again == row and text // 2 == row and same == text
            assert group[photo] != group[row] != group[other // 2]
            drawn |= {photo, other // 2}
    assert len(drawn) > 5


def test_fused_features_go_to_their_own_pairs(tiny, monkeypatch):
    """Texts that are cut to several lengths are not looked at in the order of the pairs."""
    backbone, faces, tower, _ = tiny
    some = faces.take(range(10))
    some.captions = [
        [" ".join(first.split()[: 1 + row]), " ".join(second.split()[: 19 - row])]
        for row, (first, second, *_) in enumerate(faces.captions)
    ]
    gallery = FrozenGallery(tower, some, 2, FeatureCache(None))
    images, texts = (grid.ravel() for grid in np.mgrid[:10, :20])
    in_order = fused_features(tower, gallery, images, texts, FeatureCache(None))
    for name, value in (("PAIRS_PER_IMAGE", 1), ("CALLS_PER_LENGTH", 8), ("MULTIPLE", 1)):
        monkeypatch.setattr(pair_visits, f"_{name}", value)
    visits = tower(gallery, backbone.tokenizer(gallery.texts), (images, texts))
    visited = np.concatenate([places for places, _ in visits])
    assert not (np.diff(visited) > 0).all() and sorted(visited) == list(range(200))
    found = fused_features(tower, gallery, images, texts, FeatureCache(None))
    np.testing.assert_allclose(found, in_order, atol=1e-5)
    assert np.abs(found - in_order[::-1]).max() > 0.05
