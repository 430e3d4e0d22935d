"""The frozen encoder: batches over devices, pooled states, identity, and its random twin."""

import jax
import numpy as np
import pytest
import tiny_downstream
from flax import nnx

from flip_jax.data.tokenizer import Tokenizer
from flip_jax.downstream.backbone import Backbone, probe_blocks
from flip_jax.models.vit import normalize_pixels
from flip_jax.weights import params_digest, read_weights

TEXTS = ["a young woman", "an older man with a beard", "a person wearing a hat"]


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return tiny_downstream.write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def backbone(export):
    return Backbone.load(export, batch_size=8)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (19, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def whole(backbone):
    return nnx.merge(backbone.graphdef, jax.device_get(backbone.params))


def test_rows_in_padded_batches_over_devices_are_those_of_one_call(backbone, whole, images):
    assert jax.local_device_count() == 8
    tokens, embed = whole.encode_image(images)
    np.testing.assert_allclose(backbone.embed_images(images), embed, atol=2e-6)
    np.testing.assert_allclose(backbone.image_tokens(images), tokens, atol=2e-5)
    ids, mask = backbone.tokenizer(TEXTS)
    np.testing.assert_allclose(
        backbone.embed_texts(TEXTS), whole.encode_text(ids, mask)[1], atol=2e-6
    )
    for first in ("enc", "cls"):
        logits = whole.match(ids, mask, tokens[:3], first_token=first)
        found = backbone.match(TEXTS, np.asarray(tokens[:3]), first)
        np.testing.assert_allclose(found, logits, atol=2e-5)


def test_pooled_states_by_a_loop_over_blocks(backbone, whole, images):
    vit = whole.vit
    x = vit.patch_embed(vit.patches(normalize_pixels(images))) + vit.position_embed[...][1:]
    first = np.broadcast_to(vit.class_embed[...] + vit.position_embed[...][0], (len(x), 1, 32))
    x = vit.pre_norm(np.concatenate([first, x], axis=1))
    graphdef, state = nnx.split(vit.blocks)
    states = []
    for layer in range(4):
        x = nnx.merge(graphdef, jax.tree.map(lambda leaf, n=layer: leaf[n], state))(x)
        states.append(np.asarray(x))
    wanted = []
    for state in [*states[:3], np.asarray(vit.post_norm(x))]:
        wanted += [state[:, 0], state[:, 1:].mean(1), state[:, 1:].max(1)]
    found = backbone.pooled_states(images)
    assert found.shape == (19, 12, 32) and found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(wanted, 1), atol=2e-5)
    raw = backbone.map_rows(backbone.state_function(last_normed=False), images)
    np.testing.assert_allclose(raw[:, 9], states[3][:, 0], atol=2e-5)
    np.testing.assert_array_equal(raw[:, :9], found[:, :9])


def test_blocks_of_the_reference_and_of_other_depths():
    assert probe_blocks(12) == (4, 6, 8)
    assert probe_blocks(24) == (8, 12, 16)
    assert probe_blocks(4) == (1, 2, 3)
    assert probe_blocks(3) == (1, 2)  # the recorded case
    assert probe_blocks(1) == ()


def test_rows_are_made_one_batch_ahead_and_only_once(backbone, images):
    asked = []

    class Lazy:
        def __len__(self):
            return len(images)

        def __getitem__(self, rows):
            asked.append(range(*rows.indices(len(images))))
            return images[rows]

    parts = backbone.stream_rows(backbone.state_function(), Lazy())
    next(parts)
    assert len(asked) <= 3
    assert sum(map(len, parts)) == 19 - 8
    assert [list(r) for r in asked] == [
        list(range(8)),
        list(range(8, 16)),
        list(range(16, 19)),
    ]


def test_no_row_or_unequal_rows_are_an_error(backbone, images):
    with pytest.raises(ValueError, match="at least 1"):
        backbone.embed_images(images[:0])
    with pytest.raises(ValueError, match="length 3, 3, 2"):
        backbone.match(TEXTS, np.zeros((2, 5, 32), np.float32))


def test_the_random_twin_has_the_shape_and_nothing_else(backbone, images):
    twin, again = backbone.random_twin(), backbone.random_twin()
    shapes = jax.tree.map(np.shape, backbone.params)
    assert jax.tree.map(np.shape, twin.params) == shapes
    assert twin.origin["name"] == "random" and twin.origin["checkpoint"] is None
    assert twin.origin["digest"] == again.origin["digest"] != backbone.origin["digest"]
    assert twin.identity != backbone.random_twin(seed=1).identity
    assert np.abs(twin.embed_images(images) - backbone.embed_images(images)).max() > 0.05


def test_digest_sees_every_bit_name_and_shape():
    params = {"a": {"b": np.arange(6, dtype=np.float32)}, "c": np.float32(1)}
    base = params_digest(params)
    changed = np.arange(6, dtype=np.float32)
    changed[3] = np.nextafter(changed[3], 4)
    assert base == params_digest({"c": np.float32(1), "a": {"b": np.arange(6, dtype=np.float32)}})
    others = [
        {"a": {"b": changed}, "c": np.float32(1)},
        {"a": {"d": params["a"]["b"]}, "c": np.float32(1)},
        {"a": {"b": params["a"]["b"].reshape(2, 3)}, "c": np.float32(1)},
    ]
    assert len({base, *map(params_digest, others)}) == 4


def test_load_says_what_it_loaded_and_refuses_bad_options(export, backbone):
    assert backbone.origin["step"] == 7 and backbone.origin["checkpoint"] == str(export)
    assert backbone.origin["digest"] == params_digest(read_weights(export).params)
    assert backbone.tokenizer.vocab_hash == Tokenizer.load("grammar", 24).vocab_hash
    for options in ({"batch_size": 0}, {"dtype": "float16"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Backbone.load(export, **options)
