"""Masked image modelling: what is hidden, what is predicted, and whole steps with it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from test_partition import assert_same_steps, run
from tiny_run import CFG, batches

from flip_jax import config
from flip_jax.compile.hlo import Module
from flip_jax.config import LossWeights
from flip_jax.losses.flip import flip_loss
from flip_jax.losses.mim import pixel_errors, pixel_targets
from flip_jax.metrics import model_flops_per_pair
from flip_jax.models import flip
from flip_jax.models.vit import normalize_pixels
from flip_jax.optim import make_optimizer
from flip_jax.train import init_state, make_train_step

VISION = replace(CFG.model.vision, patch_size=8)  # 4 x 4 patches
MODEL = replace(CFG.model, vision=VISION, mim_depth=1)
MIM = replace(
    CFG, model=MODEL, loss=replace(CFG.loss, weights=LossWeights(contrastive=1, itm=0, mim=2))
)


def test_targets_are_patches_of_mean_0_and_variance_1():
    rng = np.random.default_rng(0)
    patches = rng.normal(3.0, 2.0, size=(2, 16, 48)).astype(np.float32)
    hidden = np.array([[1, 5, 6], [0, 2, 15]], np.int32)
    targets = np.asarray(pixel_targets(patches, hidden))
    chosen = np.take_along_axis(patches.astype(np.float64), hidden[..., None], axis=1)
    expected = chosen - chosen.mean(-1, keepdims=True)
    expected /= np.sqrt(chosen.var(-1, ddof=1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(targets, expected, atol=1e-5)
    errors = pixel_errors(targets + np.array([[[0.5], [0.0], [1.0]]]), targets)
    np.testing.assert_allclose(errors, np.tile([0.25, 0.0, 1.0], (2, 1)), rtol=1e-5, atol=1e-12)


def test_hidden_patches_are_not_seen_and_the_others_are():
    params = flip.init_params(MODEL, 0.07, jax.random.key(0))
    model = nnx.merge(flip.build(MODEL), params)
    (batch,) = batches(1)
    image = batch["image"][:2].copy()
    hidden = np.array([[0, 5, 6], [0, 2, 15]], np.int32)

    def predicted(image):
        found = model.predict_hidden(image, hidden)
        assert found.keys() == {"patches"}
        return found["patches"]

    before = predicted(image)
    assert before.shape == (2, 3, 3 * 8 * 8) and before.dtype == jnp.float32
    image[:, :8, :8] = 255 - image[:, :8, :8]  # patch 0, hidden in both
    np.testing.assert_array_equal(predicted(image), before)
    image[:, 8:16, :8] = 255 - image[:, 8:16, :8]  # patch 4, in full view
    assert (np.abs(predicted(image) - before).max(axis=(1, 2)) > 1e-4).all()
    # Nothing hidden at all: what the image tower makes of the picture, before its last norm.
    pixels = normalize_pixels(jnp.asarray(image))
    tokens = model.vit.encode_hidden(pixels, np.zeros((2, 16), bool), model.mim.mask_token[...])
    np.testing.assert_allclose(model.vit.post_norm(tokens), model.vit(pixels), atol=1e-6)


def losses(weights, batch):
    cfg = replace(MIM, loss=replace(MIM.loss, weights=weights))
    state = init_state(MIM, make_optimizer(cfg.optim, lambda _: 1e-3))
    arguments = state["params"], state["momentum"], state["queue"], batch, 0.4, jax.random.key(3)

    @jax.jit
    def f(arguments):
        loss, aux = flip_loss(*arguments, cfg=cfg, graphdef=flip.build(MODEL))
        return loss, aux["metrics"]

    return f(arguments)


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum_of_its_parts():
    (batch,) = batches(1)
    total, parts = losses(LossWeights(contrastive=0.5, itm=3.0, mim=2.0), batch)
    expected = 0.5 * parts["loss_itc"] + 3 * parts["loss_itm"] + 2 * parts["loss_mim"]
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    total, alone = losses(LossWeights(), batch)
    assert "loss_mim" not in alone
    assert alone["loss_itc"] == parts["loss_itc"] and alone["loss_itm"] == parts["loss_itm"]
    assert "loss_itm" not in losses(LossWeights(itm=0.0), batch)[1]


def test_mim_alone_neither_reads_texts_nor_keeps_twins():
    """What no loss needs is neither in the state nor in the compiled step nor changed by it."""
    weights = LossWeights(contrastive=0, itm=0, mim=1)
    cfg = replace(MIM, loss=replace(MIM.loss, weights=weights))
    tx = make_optimizer(replace(cfg.optim, weight_decay=0.0), lambda _: 1e-3)
    before = init_state(cfg, tx)
    assert before["momentum"] == {} and before["queue"] == {}
    step = make_train_step(cfg, tx, lambda _: jnp.float32(1e-3), lambda _: 0.0)
    (batch,) = batches(1)
    compiled = jax.jit(step).lower(before, batch).compile()
    products = Module(compiled.as_text()).dot_flops() / len(batch["image"])
    assert 1 <= products / model_flops_per_pair(cfg) < 1.02
    after, metrics = compiled(before, batch)
    assert metrics["loss"] == metrics["loss_mim"] and "loss_itc" not in metrics
    for name in ("bert", "image_proj", "text_proj", "itm_head"):
        jax.tree.map(np.testing.assert_array_equal, after["params"][name], before["params"][name])
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), after["params"], before["params"])
    assert all(jax.tree.leaves((moved["vit"]["blocks"], moved["mim"])))


@pytest.mark.slow
def test_mim_alone_on_a_mesh():
    alone = replace(MIM, loss=replace(MIM.loss, weights=LossWeights(contrastive=0, itm=0, mim=1)))
    one_device = run(1, 1, alone)
    assert one_device[0][0]["loss"] == one_device[0][0]["loss_mim"]
    assert_same_steps(run(8, 2, alone), one_device)


@pytest.mark.slow
def test_same_steps_on_a_mesh():
    meshed, alone = run(8, 2, MIM), run(1, 1, MIM)
    assert {"loss_itc", "loss_mim"} < set(alone[0][0]) and "loss_itm" not in alone[0][0]
    assert_same_steps(meshed, alone)


def test_learns_to_guess_a_fixed_batch():
    tx = make_optimizer(replace(MIM.optim, weight_decay=0.0), lambda _: 3e-3)
    step = jax.jit(make_train_step(MIM, tx, lambda _: jnp.float32(3e-3), lambda _: 0.0))
    state = init_state(MIM, tx)
    (batch,) = batches(1)
    # Smooth pictures: noise cannot be guessed from what is around it.
    ramp = np.linspace(0, 255, 32)
    slopes = np.random.default_rng(1).uniform(0, 1, (16, 1, 1, 3))
    picture = slopes * ramp[:, None, None] + (1 - slopes) * ramp[None, :, None]
    batch["image"] = picture.astype(np.uint8)
    values = []
    for _ in range(60):
        state, metrics = step(state, batch)
        values.append(float(metrics["loss_mim"]))
    assert values[0] > 0.9 and np.mean(values[-5:]) < 0.5


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (["loss.weights.mim=1"], r"model\.mim_depth=0: must be 1 or more with loss\.weights\.mim"),
        (["model.mim_depth=1"], r"model\.mim_depth=1: must be 0 with loss\.weights\.mim=0"),
        (
            ["loss.weights.mim=1", "model.mim_depth=1", "loss.mim_share=0.999"],
            r"loss\.mim_share=0\.999: must hide 1 to all but 1 of the 196",
        ),
        (["loss.mim_target=tokens"], r"loss\.mim_tokenizer=None: must be the folder of a visual"),
        (["loss.mim_tokenizer=a"], r"loss\.mim_tokenizer='a': must be None with .*=pixels"),
        (
            ["loss.mim_target=tokens", "loss.mim_tokenizer=a"],
            r"model\.mim_vocab=0: must be the number of codes of loss\.mim_tokenizer",
        ),
        (["model.mim_vocab=9"], r"model\.mim_vocab=9: must be 0 with loss\.mim_target=pixels"),
        (["loss.mim_masking=hard"], r"model\.mim_loss_head=False: must be True with .*=hard"),
        (["model.mim_loss_head=true"], r"model\.mim_loss_head=True: must be False with .*=block"),
        (
            [
                "loss.mim_masking=hard",
                "model.mim_loss_head=true",
                "loss.contrastive=sigmoid",
                "model.logit_bias=-10",
            ],
            r"loss\.mim_masking='hard': needs momentum twins",
        ),
        (["loss.weights.contrastive=-1"], r"loss\.weights\.contrastive=-1.*must be at least 0"),
        (
            ["loss.weights.contrastive=0"],
            r"loss\.weights\.itm=1\.0: must be 0 with loss\.weights\.contrastive=0",
        ),
        (
            ["loss.weights.contrastive=0", "loss.weights.itm=0"],
            r"loss\.weights=.*at least one must be above 0",
        ),
        (
            [
                "loss.weights.contrastive=0",
                "loss.weights.itm=0",
                "loss.weights.mim=1",
                "model.mim_depth=1",
                "loss.mim_masking=hard",
                "model.mim_loss_head=true",
            ],
            r"loss\.mim_masking='hard': needs momentum twins",
        ),
    ],
)
def test_settings_that_do_not_fit(fields, message):
    cfg = config.from_arguments(config.Config(), [f"--config.{field}" for field in fields])
    with pytest.raises(ValueError, match=message):
        config.validate(cfg)
