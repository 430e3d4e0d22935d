"""Hard negatives by distribution and by property; the fused pass and its loss on any mesh."""

import dataclasses
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import use_abstract_mesh
from tiny_run import TINY, batches

from flip_jax.config import MeshConfig
from flip_jax.losses import itm
from flip_jax.losses.itm import itm_logits, itm_loss, sample_hard_negatives
from flip_jax.models import flip
from flip_jax.partition import batch_sharding, make_mesh, state_shardings

draw_on_one = jax.jit(sample_hard_negatives)


def unit(seed, rows, width=8):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


# Hard negatives -----------------------------------------------------------------------------------


def test_draws_follow_the_masked_softmax():
    image, text = unit(0, 5), unit(1, 5)
    group = jnp.asarray([1, 2, 2, 3, 4])
    temperature, draws = 0.3, 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    negatives, _ = jax.vmap(lambda k: sample_hard_negatives(image, text, group, temperature, k))(
        keys
    )
    same = np.asarray(group)[:, None] == np.asarray(group)[None]
    for name, similarity in (("image", text @ image.T), ("text", image @ text.T)):
        weights = np.where(same, 0.0, np.exp(similarity / temperature))
        expected = weights / weights.sum(-1, keepdims=True)
        counts = np.stack([np.bincount(c, minlength=5) for c in np.asarray(negatives[name]).T])
        # Five standard deviations of a binomial share.
        np.testing.assert_allclose(counts / draws, expected, atol=5 * 0.5 / draws**0.5)
        # Rows are drawn independently of each other, and so are the two directions.
        correlation = np.corrcoef(np.asarray(negatives[name]).T)
        assert np.abs(correlation - np.eye(5)).max() < 5 / draws**0.5
    both = np.corrcoef(negatives["image"].T, negatives["text"].T)
    assert np.abs(both - np.eye(10)).max() < 5 / draws**0.5


@settings(max_examples=30, deadline=None)
@given(
    group=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    temperature=st.sampled_from([0.001, 0.07, 0.5]),
    kind=st.sampled_from(["random", "equal", "opposite"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_negatives_are_never_of_the_same_group(group, temperature, kind, seed):
    image, text = unit(seed, 6), unit(seed + 1, 6)
    if kind != "random":  # all similarities equal, or each exactly -1 but the own one
        image = np.tile(image[:1], (6, 1))
        text = image if kind == "equal" else -image
    negatives, valid = draw_on_one(
        image, text, jnp.asarray(group), temperature, jax.random.key(seed)
    )
    group = np.asarray(group)
    for name in ("image", "text"):
        drawn = np.asarray(negatives[name])
        assert drawn.dtype == np.int32 and np.all((drawn >= 0) & (drawn < 6))
        has_other = np.array([np.any(group != g) for g in group])
        np.testing.assert_array_equal(np.asarray(valid[name]), has_other)
        assert np.all((group[drawn] != group) | ~has_other)


@jax.jit
def noise_by_row(key, number):
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, number)
    return jax.vmap(lambda k: jax.random.gumbel(k, number.shape))(keys)


def dense_draws(image, text, group, temperature, key):
    """All [B, B] at once, in float64."""
    image, text = np.float64(image), np.float64(text)
    negatives = {}
    for k, name in zip(jax.random.split(key), ("image", "text"), strict=True):
        noise = noise_by_row(k, jnp.arange(len(group)))
        logits = (text @ image.T if name == "image" else image @ text.T) / temperature
        noisy = np.where(group[:, None] != group, logits + np.float64(noise), -np.inf)
        negatives[name] = np.argmax(noisy, axis=1)
    return negatives


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (2, 1), (8, 1), (8, 2), (8, 8)])
@pytest.mark.parametrize("block", [3 * 40, 2**21])
def test_same_draws_on_any_mesh(devices, fsdp, block, monkeypatch):
    """Also in blocks of three rows, which leave a remainder."""
    monkeypatch.setattr(itm, "_BLOCK", block)
    mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices])
    image, text = unit(2, 40, 16), unit(3, 40, 16)
    group = np.where(np.arange(40) < 12, 3, np.arange(40) % 17).astype(np.int32)
    arguments = jax.device_put((image, text, group), batch_sharding(mesh))
    draw = jax.jit(partial(sample_hard_negatives, mesh=mesh))
    for seed in range(10):
        key = jax.random.key(seed)
        negatives, valid = draw(*arguments, 0.07, key)
        for name, expected in dense_draws(image, text, group, 0.07, key).items():
            np.testing.assert_array_equal(negatives[name], expected)
            assert np.all(valid[name])
            assert negatives[name].sharding.is_equivalent_to(batch_sharding(mesh), 1)
    *_, valid = draw(*arguments[:2], jax.device_put(group * 0, batch_sharding(mesh)), 0.07, key)
    assert not np.any(valid["image"]) and not np.any(valid["text"])


def test_similarities_are_never_held_all_at_once():
    rows = 16_384  # 2^30 bytes of similarities
    embed = jax.ShapeDtypeStruct((rows, 16), jnp.float32)
    group = jax.ShapeDtypeStruct((rows,), jnp.int32)
    draw = jax.jit(lambda *a: sample_hard_negatives(*a, 0.07, jax.random.key(0)))
    memory = draw.lower(embed, embed, group).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**27


# The fused pass -----------------------------------------------------------------------------------


def one_batch(rows=16):
    """Token ids and mask, image tokens, negatives, valid flags: some wanted often, some not."""
    (batch,) = batches(1)
    rng = np.random.default_rng(1)
    tokens = rng.normal(size=(rows, 5, 32)).astype(np.float32)
    negatives = {
        "image": np.where(np.arange(rows) % 3 == 0, 2, rng.permutation(rows)).astype(np.int32),
        "text": rng.integers(0, rows, rows).astype(np.int32),
    }
    valid = {name: rng.random(rows) < 0.8 for name in ("image", "text")}
    return batch["token_ids"], batch["token_mask"], tokens, negatives, valid


@cache
def tiny_model(dropout=0.0):
    cfg = dataclasses.replace(TINY, text=dataclasses.replace(TINY.text, dropout=dropout))
    params = jax.jit(lambda: flip.init_params(TINY, 0.07, jax.random.key(0)))()
    # Far from the small start values, so that every input matters; both answers are given, and
    # the errors of the answers do not cancel, with dropout or without: all that would be left of
    # the gradient of the bias is the rounding of the logits.
    params = jax.tree.map(lambda p: 3 * p, params)
    params["itm_head"]["bias"] += jnp.asarray([1.0, 0.0])
    return flip.build(cfg), params


def loss_of(graphdef, key, mesh=None, parts=1):
    def loss(params, tokens, ids, mask, negatives, valid):
        match = nnx.merge(graphdef, params).match
        logits = itm_logits(match, ids, mask, tokens, negatives, key, mesh=mesh, parts=parts)
        value, accuracy = itm_loss(logits, valid)
        return value, (accuracy, logits)

    def loss_on_mesh(*arguments):
        with use_abstract_mesh(mesh.abstract_mesh):
            return loss(*arguments)

    return jax.value_and_grad(loss if mesh is None else loss_on_mesh, argnums=(0, 1), has_aux=True)


def on_mesh(devices, fsdp, parts=1, dropout=0.0):
    """Loss, accuracy, logits, and gradients to parameters and image tokens."""
    mesh = make_mesh(MeshConfig(fsdp=fsdp), jax.devices()[:devices]) if devices else None
    graphdef, params = tiny_model(dropout)
    ids, mask, *rest = one_batch()
    tokens, negatives, valid = rest
    data = tokens, ids, mask, negatives, valid
    if mesh is not None:
        params = jax.device_put(params, state_shardings(params, mesh))
        data = jax.device_put(data, batch_sharding(mesh))
    key = jax.random.key(7) if dropout else None
    return jax.device_get(jax.jit(loss_of(graphdef, key, mesh, parts))(params, *data))


def plainly():
    """Three passes, images picked before them, and cross-entropy in float64."""
    graphdef, params = tiny_model()
    ids, mask, tokens, negatives, valid = one_batch()
    image, text = negatives["image"], negatives["text"]

    def loss(params, tokens):
        model = nnx.merge(graphdef, params)
        logits = [
            model.match(ids, mask, tokens),
            model.match(ids, mask, tokens[image]),
            model.match(ids[text], mask[text], tokens),
        ]
        log_p = [
            jax.nn.log_softmax(row)[:, match] for row, match in zip(logits, (1, 0, 0), strict=True)
        ]
        counted = log_p[0], log_p[1][valid["image"]], log_p[2][valid["text"]]
        return -jnp.mean(jnp.concatenate(counted)), jnp.stack(logits, axis=1)

    (value, logits), grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        params, tokens
    )
    weight = np.stack([np.ones(16, bool), valid["image"], valid["text"]], axis=1)
    said_match = np.asarray(logits[..., 1] > logits[..., 0])
    accuracy = np.mean((said_match == [True, False, False])[weight])
    return jax.device_get(((value, (accuracy, logits)), grads))


def check_equal(ours, expected):
    (value, (accuracy, logits)), grads = ours
    (other_value, (other_accuracy, other_logits)), other_grads = expected
    np.testing.assert_allclose(value, other_value, rtol=1e-6)
    assert accuracy == pytest.approx(other_accuracy, rel=1e-6)
    np.testing.assert_allclose(logits, other_logits, rtol=0, atol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(other_grads), strict=True
    ):
        name = jax.tree_util.keystr(path)
        # A key bias has no gradient but rounding noise.
        scale = max(np.abs(b).max(), 1e-2)
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * scale, err_msg=name)


@pytest.fixture(scope="module")
def plain():
    return plainly()


@pytest.fixture(scope="module")
def one_device_with_dropout():
    return on_mesh(0, 1, dropout=0.2)


@pytest.mark.parametrize(("devices", "fsdp"), [(0, 1), (2, 1), (8, 2)])
def test_equals_three_plain_passes(plain, devices, fsdp):
    (_, (_, logits)), _ = plain
    assert np.std(logits) > 0.1 and len(np.unique(np.argmax(logits, axis=-1))) == 2
    check_equal(on_mesh(devices, fsdp), plain)


@pytest.mark.parametrize(("devices", "parts"), [(1, 4), (8, 2)])
def test_parts_have_negatives_of_the_whole_batch(plain, devices, parts):
    check_equal(on_mesh(devices, 1, parts), plain)


@pytest.mark.slow
def test_same_dropout_on_a_mesh(plain, one_device_with_dropout):
    (_, (_, logits)), _ = one_device_with_dropout
    assert np.abs(logits - plain[0][1][1]).max() > 0.1
    check_equal(on_mesh(8, 2, dropout=0.2), one_device_with_dropout)


def test_of_the_activations_only_the_fetched_tokens_travel():
    """Else: sums of parameter gradients, token ids and row numbers."""
    mesh = make_mesh(MeshConfig())
    graphdef, params = tiny_model()
    ids, mask, tokens, negatives, valid = one_batch()
    params = jax.device_put(params, state_shardings(params, mesh))
    data = jax.device_put((tokens, ids, mask, negatives, valid), batch_sharding(mesh))
    step = jax.jit(loss_of(graphdef, None, mesh))
    text = step.lower(params, *data).compile().as_text()
    shapes = {(), (2, 32)}  # scalars; the head's kernel may be summed transposed
    for leaf in jax.tree.leaves(params):
        # Of stacked layers all, all but the last, which runs by itself, or one.
        shapes |= {leaf.shape, leaf.shape[1:]}
        if leaf.ndim:
            shapes.add((len(leaf) - 1, *leaf.shape[1:]))
    travelling = set()
    for line in text.splitlines():
        if found := re.search(
            r"= (.*?) (all-\w+(-\w+)?|collective-permute|reduce-scatter)\(", line
        ):
            for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", found[1]):
                dims = tuple(int(d) for d in dims.split(",") if d)
                if dtype == "f32" and not (found[2] == "all-reduce" and dims in shapes):
                    travelling.add((found[2], dims))
    assert travelling == {("all-to-all", (1, 1, 5, 32))}


# Loss ---------------------------------------------------------------------------------------------


def test_loss_by_hand():
    logits = np.zeros((2, 3, 2), np.float32)
    logits[0, 0, 1], logits[0, 1, 1] = 2.0, 1.0  # a sure match, a false one
    logits[1, 2, 1] = 3.0  # left out
    valid = {"image": jnp.asarray([True, True]), "text": jnp.asarray([True, False])}
    loss, accuracy = itm_loss(jnp.asarray(logits), valid)
    match, half = np.log1p(np.exp(-2.0)), np.log(2.0)
    # Rows: match, false match, undecided; match (undecided), undecided.
    expected = (match + np.log1p(np.exp(1.0)) + half + half + half) / 5
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    # argmax of equal logits is class 0 = no match.
    assert float(accuracy) == pytest.approx(3 / 5)


def test_a_constant_prediction_of_the_prior():
    """1 : 2 split without balancing: the best constant scores the entropy of 1/3."""
    logits = jnp.tile(jnp.log(jnp.asarray([2 / 3, 1 / 3])), (4, 3, 1))
    every = {"image": jnp.ones(4, bool), "text": jnp.ones(4, bool)}
    assert float(itm_loss(logits, every)[0]) == pytest.approx(0.6365, abs=1e-4)
