"""Schedules as pure functions of the step, and AdamW.

Source: models/utils.py and pretrain.py of the official FLIP.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from flip_jax.config import Config, OptimConfig

Array = jax.Array


def learning_rate(cfg: OptimConfig, steps_per_epoch: int, total_steps: int) -> optax.Schedule:
    """The learning rate at a step.

    Args:
      cfg: `schedule` picks the form, see `OptimConfig`.
      steps_per_epoch: borders of the `step` schedule.
      total_steps: end of the `cosine` schedule.

    Returns:
      step (int32 scalar, from 0) -> float32 scalar.
    """

    def warmup(step: Array) -> Array:
        share = jnp.minimum(step / max(cfg.warmup_steps, 1), 1)
        return jnp.minimum(cfg.lr, cfg.warmup_lr + (cfg.lr - cfg.warmup_lr) * share)

    def step_decay(step: Array) -> Array:
        # The reference warms up in epoch 0 only: an epoch shorter than the warm-up ends it.
        epoch = step // steps_per_epoch
        decayed = jnp.maximum(cfg.min_lr, cfg.lr * cfg.decay_rate ** epoch.astype(jnp.float32))
        return jnp.where(epoch == 0, warmup(step) if cfg.warmup_steps else cfg.lr, decayed)

    def cosine(step: Array) -> Array:
        span = max(total_steps - cfg.warmup_steps, 1)
        share = jnp.clip((step - cfg.warmup_steps) / span, 0.0, 1.0)
        decayed = cfg.min_lr + (cfg.lr - cfg.min_lr) * 0.5 * (1.0 + jnp.cos(jnp.pi * share))
        return jnp.where(step < cfg.warmup_steps, warmup(step), decayed)

    def constant(step: Array) -> Array:
        return jnp.where(step < cfg.warmup_steps, warmup(step), cfg.lr)

    form = {"step": step_decay, "cosine": cosine, "constant": constant}[cfg.schedule]
    return lambda step: jnp.asarray(form(jnp.asarray(step)), jnp.float32)


def target_alpha(cfg: Config, steps_per_epoch: int) -> optax.Schedule:
    """Weight of the soft targets: 0 at step 0, linear to `loss.alpha`, then flat."""
    ramp = cfg.loss.alpha_ramp_epochs * steps_per_epoch
    if ramp == 0:
        return lambda step: jnp.float32(cfg.loss.alpha)
    return lambda step: cfg.loss.alpha * jnp.minimum(1.0, step / ramp)


def hard_share(total_steps: int) -> optax.Schedule:
    """Share of the hidden patches that are the hardest ones: linear from 0 to 1/2 over the run.

    Source: arXiv 2304.05919 (HPM), section 3.4.
    """
    return lambda step: 0.5 * jnp.minimum(1.0, jnp.asarray(step, jnp.float32) / total_steps)


def decay_mask(params: dict) -> dict:
    """True for kernels and embedding tables, False for norms, biases, class token, temperature."""

    def decays(path: tuple, _: Array) -> bool:
        name = path[-1].key
        return name in ("kernel", "word_embed", "position_embed")

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(cfg: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW as torch defines it: decay times learning rate, eps outside the root."""
    adamw = optax.adamw(
        schedule,
        b1=cfg.beta1,
        b2=cfg.beta2,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        mask=decay_mask if cfg.decay == "kernels" else None,
    )
    if cfg.clip_norm is None:
        return adamw
    return optax.chain(optax.clip_by_global_norm(cfg.clip_norm), adamw)
