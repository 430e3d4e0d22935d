"""Schedules against the reference's formulas, AdamW against torch's."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flip_jax.config import Config, LossConfig, OptimConfig
from flip_jax.optim import decay_mask, learning_rate, make_optimizer, target_alpha


def reference_lr(step, steps_per_epoch, cfg):
    """pretrain.py: step_lr_schedule at the start of an epoch, warm-up inside epoch 0."""
    epoch = step // steps_per_epoch
    if epoch == 0:
        return min(cfg.lr, cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * step / cfg.warmup_steps)
    return max(cfg.min_lr, cfg.lr * cfg.decay_rate**epoch)


@pytest.mark.parametrize("steps_per_epoch", [23_925, 500])
def test_step_schedule_is_the_reference(steps_per_epoch):
    cfg = OptimConfig()
    schedule = learning_rate(cfg, steps_per_epoch, 15 * steps_per_epoch)
    for step in [0, 1, 499, 500, 19_999, 20_000, 23_924, 23_925, 47_850, 14 * 23_925, 10**6]:
        expected = reference_lr(step, steps_per_epoch, cfg)
        np.testing.assert_allclose(schedule(step), expected, rtol=1e-5, err_msg=str(step))
    assert float(schedule(14 * steps_per_epoch)) == pytest.approx(6.86e-6, rel=1e-2)


@pytest.mark.parametrize("schedule", ["step", "cosine", "constant"])
def test_no_rate_is_below_zero_or_above_the_highest(schedule):
    """Not after a warm-up from above `lr` either, which `validate` refuses."""
    cfg = OptimConfig(lr=5e-7, warmup_lr=1e-6, min_lr=0.0, warmup_steps=100, schedule=schedule)
    rates = learning_rate(cfg, 5000, 10_000)(np.arange(0, 10_000, 50))
    assert rates.min() >= 0 and rates.max() <= np.float32(5e-7)


def test_cosine_and_constant_schedules():
    cfg = OptimConfig(lr=1e-3, min_lr=1e-5, warmup_lr=0.0, warmup_steps=10, schedule="cosine")
    schedule = learning_rate(cfg, 50, 110)
    np.testing.assert_allclose(
        [schedule(s) for s in (0, 5, 10, 60, 110, 500)],
        [0.0, 5e-4, 1e-3, (1e-3 + 1e-5) / 2, 1e-5, 1e-5],
        rtol=1e-5,
    )
    constant = learning_rate(OptimConfig(lr=1e-3, warmup_steps=0, schedule="constant"), 50, 110)
    assert float(constant(0)) == float(constant(99)) == pytest.approx(1e-3)


def test_alpha_ramps_over_two_epochs():
    alpha = target_alpha(Config(), steps_per_epoch=100)
    np.testing.assert_allclose([alpha(s) for s in (0, 50, 200, 999)], [0, 0.1, 0.4, 0.4], rtol=1e-6)
    flat = target_alpha(Config(loss=LossConfig(alpha_ramp_epochs=0.0)), 100)
    assert float(flat(0)) == pytest.approx(0.4)


def test_decay_mask_and_clipping():
    params = {
        "vit": {"blocks": {"ln_attn": {"scale": 1, "bias": 1}}, "class_embed": 1},
        "bert": {"word_embed": 1, "mlp": {"up": {"kernel": 1, "bias": 1}}},
        "temperature": 1,
    }
    assert decay_mask(params) == {
        "vit": {"blocks": {"ln_attn": {"scale": False, "bias": False}}, "class_embed": False},
        "bert": {"word_embed": True, "mlp": {"up": {"kernel": True, "bias": False}}},
        "temperature": False,
    }
    cfg = OptimConfig(clip_norm=1.0, decay="kernels", weight_decay=0.0)
    plain = OptimConfig(decay="kernels", weight_decay=0.0)
    weights = {"kernel": jnp.ones(4)}
    grads = {"kernel": jnp.full(4, 100.0)}
    for settings, seen in ((cfg, grads["kernel"] / 200.0), (plain, grads["kernel"])):
        tx = make_optimizer(settings, lambda _: 1e-3)
        _, state = tx.update(grads, tx.init(weights), weights)
        (adam,) = [s for s in _flat(state) if isinstance(s, optax.ScaleByAdamState)]
        np.testing.assert_allclose(adam.mu["kernel"], 0.1 * seen, rtol=1e-5)


def _flat(state):
    if isinstance(state, optax.ScaleByAdamState) or not isinstance(state, tuple):
        return [state]
    return [leaf for part in state for leaf in _flat(part)]


def test_adamw_is_torchs():
    torch = pytest.importorskip("torch", reason="needs the extra [torch]")
    rng = np.random.default_rng(0)
    start = rng.normal(size=(7, 3)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.tensor(start))
    cfg = OptimConfig(lr=1e-2, schedule="constant", warmup_steps=0)
    optimizer = torch.optim.AdamW([theirs], lr=cfg.lr, weight_decay=cfg.weight_decay)
    tx = make_optimizer(cfg, learning_rate(cfg, 1, 1))
    ours = {"w": jnp.asarray(start)}
    state = tx.init(ours)
    for _ in range(5):
        grad = rng.normal(size=start.shape).astype(np.float32)
        theirs.grad = torch.tensor(grad)
        optimizer.step()
        updates, state = tx.update({"w": jnp.asarray(grad)}, state, ours)
        ours = optax.apply_updates(ours, updates)
    np.testing.assert_allclose(ours["w"], theirs.detach().numpy(), rtol=0, atol=1e-6)
