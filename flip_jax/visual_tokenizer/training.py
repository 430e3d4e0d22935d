"""Training of the `vq` tokenizer: one step, one codebook.

The loss is the squared error of the reconstruction plus `commitment` times that of the states
against their codes (arXiv 1711.00937, equation 3, whose middle term is replaced): the codebook has
no gradient but follows a moving average of the states that chose each code (appendix A.1 there).
A code that is chosen less than `DEAD` times its even share moves to a random state of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flip_jax.models.visual_tokenizer import (
    TokenizerConfig,
    VisualTokenizer,
    init_tokenizer,
    straight_through,
    unit_pixels,
    vq_pixels,
    vq_states,
)

Array = jax.Array

# Of pixels in 0..1 about so much; with the error divided by it, commitment and
# learning rate do not depend on the contrast of the pictures.
PIXEL_VARIANCE = 1 / 16
DEAD = 0.1  # of the even share of a code: states of a batch / codes


@dataclass(frozen=True)
class Recipe:
    """How the tokenizer is trained."""

    lr: float = 1e-3
    commitment: float = 0.25
    decay: float = 0.99  # of the moving average that the codebook is


class VqState(NamedTuple):
    """What training carries from step to step."""

    step: Array  # int32 scalar
    params: dict[str, Any]  # encoder, decoder
    moments: optax.OptState
    codebook: Array  # [V, C]
    uses: Array  # [V], moving average of the uses of each code in a batch
    sums: Array  # [V, C], of the states that chose it


def make_optimizer(recipe: Recipe, steps: int) -> optax.GradientTransformation:
    """Adam with a cosine to 0."""
    return optax.adam(optax.cosine_decay_schedule(recipe.lr, steps), b2=0.99)


def init_state(
    cfg: TokenizerConfig, tx: optax.GradientTransformation, image: Array, key: Array
) -> VqState:
    """A fresh state; codes start as states of the pictures `image` uint8 [B, S, S, 3]."""
    key, draw = jax.random.split(key)
    params = init_tokenizer(cfg, key)
    states = vq_states(VisualTokenizer(params, cfg), unit_pixels(image, image.shape[1]))
    states = states.reshape(-1, states.shape[-1])
    rows = jax.random.choice(draw, len(states), (cfg.codes,), replace=len(states) < cfg.codes)
    # Not one code twice where the pictures have fewer states than there are codes.
    noise = 1e-3 * jnp.std(states) * jax.random.normal(draw, (cfg.codes, cfg.code_width))
    share = jnp.float32(len(states) / cfg.codes)
    codebook = states[rows] + noise
    return VqState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        moments=tx.init(params),
        codebook=codebook,
        uses=jnp.full((cfg.codes,), share),
        sums=share * codebook,
    )


def vq_loss(
    params: dict[str, Any], codebook: Array, pixels: Array, cfg: TokenizerConfig, commitment: float
) -> tuple[Array, dict[str, Array]]:
    """Reconstruction + commitment.

    Args:
      params: encoder, decoder; codebook: [V, C], without gradient; pixels: [B, S, S, 3] in 0..1.

    Returns:
      (loss, {"states" [B, G, G, C], "codes" int [B, G, G], "error": mean squared error in 0..1})
    """
    tokenizer = VisualTokenizer(params, cfg)
    states = vq_states(tokenizer, pixels)
    chosen, codes = straight_through(states, codebook)
    error = jnp.mean(jnp.square(vq_pixels(tokenizer, chosen) - pixels))
    apart = jnp.mean(jnp.square(states - jax.lax.stop_gradient(codebook[codes])))
    loss = error / PIXEL_VARIANCE + commitment * apart
    return loss, {"states": states, "codes": codes, "error": error}


def train_step(
    state: VqState,
    image: Array,
    key: Array,
    *,
    cfg: TokenizerConfig,
    recipe: Recipe,
    tx: optax.GradientTransformation,
) -> tuple[VqState, dict[str, Array]]:
    """One step on uint8 [B, S, S, 3], half of them mirrored; metrics are scalars.

    `key` is of the run; a step's own is fold_in(key, step).
    """
    mirror_key, revive_key = jax.random.split(jax.random.fold_in(key, state.step))
    mirrored = jax.random.bernoulli(mirror_key, shape=(len(image), 1, 1, 1))
    image = jnp.where(mirrored, image[:, :, ::-1], image)
    pixels = unit_pixels(image, image.shape[1])
    grads, found = jax.grad(vq_loss, has_aux=True)(
        state.params, state.codebook, pixels, cfg, recipe.commitment
    )
    updates, moments = tx.update(grads, state.moments, state.params)
    states, codes = found["states"].reshape(-1, cfg.code_width), found["codes"].reshape(-1)
    codebook, uses, sums, dead = update_codebook(state, states, codes, recipe.decay, revive_key)
    new = VqState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        moments=moments,
        codebook=codebook,
        uses=uses,
        sums=sums,
    )
    return new, {
        "psnr": psnr(found["error"]),
        "perplexity": perplexity(jnp.bincount(codes, length=cfg.codes)),
        "revived": dead,
    }


def update_codebook(
    state: VqState, states: Array, codes: Array, decay: float, key: Array
) -> tuple[Array, Array, Array, Array]:
    """After states [N, C] chose `codes` [N]: (codebook, uses, sums, number of codes revived)."""
    count = len(state.codebook)
    uses = decay * state.uses + (1 - decay) * jnp.bincount(codes, length=count)
    sums = decay * state.sums + (1 - decay) * jax.ops.segment_sum(states, codes, count)
    share = len(states) / count
    dead = uses < DEAD * share
    rows = jax.random.randint(key, (count,), 0, len(states))
    uses = jnp.where(dead, share, uses)
    sums = jnp.where(dead[:, None], share * states[rows], sums)
    return sums / uses[:, None], uses, sums, jnp.sum(dead)


def psnr(error: Array) -> Array:
    """Peak signal to noise ratio in dB of a mean squared error of pixels in 0..1."""
    return -10.0 * jnp.log10(error)


def perplexity(counts: Array) -> Array:
    """exp of the entropy of how often each code was chosen: V if all are chosen equally."""
    share = counts / jnp.maximum(jnp.sum(counts), 1)
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(share), 0.0)))
