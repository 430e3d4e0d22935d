"""Hard negatives by distribution and by property; ITM loss by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flip_jax.losses.itm import itm_inputs, itm_loss, sample_hard_negatives


def unit(seed, rows, width=8):
    x = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


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
    negatives, valid = sample_hard_negatives(
        image, text, jnp.asarray(group), temperature, jax.random.key(seed)
    )
    group = np.asarray(group)
    for name in ("image", "text"):
        drawn = np.asarray(negatives[name])
        assert drawn.dtype == np.int32 and np.all((drawn >= 0) & (drawn < 6))
        has_other = np.array([np.any(group != g) for g in group])
        np.testing.assert_array_equal(np.asarray(valid[name]), has_other)
        assert np.all((group[drawn] != group) | ~has_other)


def test_rows_of_the_fused_pass():
    ids = jnp.arange(6).reshape(3, 2)
    mask = ids > 0
    negatives = {"image": jnp.asarray([1, 2, 0]), "text": jnp.asarray([2, 0, 1])}
    token_ids, token_mask, image_index = itm_inputs(ids, mask, negatives)
    np.testing.assert_array_equal(token_ids[:, 0] // 2, [0, 1, 2, 0, 1, 2, 2, 0, 1])
    np.testing.assert_array_equal(image_index, [0, 1, 2, 1, 2, 0, 0, 1, 2])
    np.testing.assert_array_equal(token_mask, np.asarray(token_ids) > 0)


def test_loss_by_hand():
    logits = np.zeros((6, 2), np.float32)
    logits[0, 1], logits[2, 1] = 2.0, 1.0  # a sure match, a false one
    valid = {"image": jnp.asarray([True, True]), "text": jnp.asarray([True, False])}
    loss, accuracy = itm_loss(jnp.asarray(logits), valid)
    match, half = np.log1p(np.exp(-2.0)), np.log(2.0)
    # Rows: match, match (undecided), wrong match, undecided, undecided, left out.
    expected = (match + half + np.log1p(np.exp(1.0)) + half + half) / 5
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    # argmax of equal logits is class 0 = no match.
    assert float(accuracy) == pytest.approx(3 / 5)


def test_a_constant_prediction_of_the_prior():
    """1 : 2 split without balancing: the best constant scores the entropy of 1/3."""
    logits = jnp.tile(jnp.log(jnp.asarray([2 / 3, 1 / 3])), (12, 1))
    every = {"image": jnp.ones(4, bool), "text": jnp.ones(4, bool)}
    assert float(itm_loss(logits, every)[0]) == pytest.approx(0.6365, abs=1e-4)
