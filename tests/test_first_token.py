"""Towers of which only the first token is read: the same value and gradient as the whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flip_jax.config import ModelConfig, TextConfig, VisionConfig
from flip_jax.models import flip

CONFIG = ModelConfig(
    vision=VisionConfig(image_size=12, patch_size=4, width=12, depth=3, heads=2, mlp_width=20),
    text=TextConfig(
        vocab_size=40, max_length=7, positions=8, width=8, depth=3, heads=2, mlp_width=28
    ),
    embed_dim=6,
    dtype="float32",
)


def inputs():
    keys = jax.random.split(jax.random.key(1), 3)
    image = jax.random.randint(keys[0], (4, 12, 12, 3), 0, 256).astype(jnp.uint8)
    ids = jax.random.randint(keys[1], (4, 7), 0, 38)
    mask = jnp.arange(7) < jnp.array([7, 3, 5, 1])[:, None]
    return image, ids, mask


def outputs(model: flip.Flip, whole: bool):
    """Everything that reads only the first token, the short way or by way of all tokens."""
    image, ids, mask = inputs()
    tokens, image_embed = model.encode_image(image)
    text_embed = model.encode_text(ids, mask)[1]
    fused = model.bert(ids.at[:, 0].set(model.enc_id), mask, tokens)[:, 0]
    if not whole:
        image_embed, text_embed = model.embed_image(image), model.embed_text(ids, mask)
        fused = model.fuse(ids, mask, tokens)
    return {"image": image_embed, "text": text_embed, "fused": fused}


@pytest.mark.parametrize(
    "depth, remat",
    [
        (3, "none"),
        (3, "dots"),
        pytest.param(1, "dots", marks=pytest.mark.slow),
        pytest.param(3, "full", marks=pytest.mark.slow),
    ],
)
def test_value_and_gradient_are_those_of_the_whole(depth, remat):
    towers = (dataclasses.replace(t, depth=depth) for t in (CONFIG.vision, CONFIG.text))
    cfg = ModelConfig(*towers, CONFIG.embed_dim, dtype="float32", remat=remat)
    params = flip.init_params(cfg, 0.07, jax.random.key(0))
    graphdef = flip.build(cfg)

    def weighted(params, whole):
        found = outputs(nnx.merge(graphdef, params), whole)
        loss = sum(jnp.sum(jnp.sin(3 * value + 1)) for value in found.values())
        return loss, found

    run = jax.jit(jax.grad(weighted, has_aux=True), static_argnums=1)
    (short_grad, short), (long_grad, long) = run(params, False), run(params, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), short, long)
    largest = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(long_grad))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6 * largest), short_grad, long_grad
    )
    moved = [np.abs(g).max() for g in jax.tree.leaves(long_grad["bert"])]
    assert min(moved) > 0 or depth == 1


def test_the_last_block_computes_no_other_token():
    params = flip.init_params(CONFIG, 0.07, jax.random.key(0))
    graphdef = flip.build(CONFIG)
    _, ids, mask = inputs()

    def flops(call) -> float:
        compiled = jax.jit(lambda params: call(nnx.merge(graphdef, params))).lower(params).compile()
        return compiled.cost_analysis()["flops"]

    # A scan's body counts once, so what differs is the last block, peeled off.
    assert flops(lambda m: m.bert(ids, mask, first_only=True)) < 1.9 * flops(
        lambda m: m.bert(ids, mask)
    )


def test_the_other_blocks_are_read_where_they_are():
    """No copy of all layers but the last, which would be most of the weights of a tower."""
    params = flip.init_params(CONFIG, 0.07, jax.random.key(0))
    graphdef = flip.build(CONFIG)
    _, ids, mask = inputs()
    embed = jax.jit(lambda params: nnx.merge(graphdef, params).embed_text(ids, mask))
    program = embed.lower(params).compile().as_text()
    assert "f32[3,8,28]" in program and "f32[2,8,28]" not in program


def test_dropout_is_active_in_the_last_block():
    cfg = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, depth=1, dropout=0.5))
    model = nnx.merge(flip.build(cfg), flip.init_params(cfg, 0.07, jax.random.key(0)))
    _, ids, mask = inputs()
    one, two = (model.embed_text(ids, mask, jax.random.key(k)) for k in (0, 1))
    assert np.abs(one - two).max() > 1e-3
    again = model.embed_text(ids, mask, jax.random.key(0))
    np.testing.assert_array_equal(one, again)
