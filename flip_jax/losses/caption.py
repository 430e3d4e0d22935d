"""How well each word of a caption was told from those before it.

Source: arXiv 2201.12086 (BLIP), language modelling loss: cross-entropy with label smoothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def next_word_losses(
    logits: Array, token_ids: Array, token_mask: Array, smoothing: float
) -> tuple[Array, Array]:
    """Losses of the words of each caption; [SEP] at the end is one, the first token is none.

    Args:
      logits: float32 [B, S, V], at each place those of the next one.
      token_ids: int32 [B, S]; token_mask: bool [B, S], True = real token.
      smoothing: share of the target that is spread over all V words.

    Returns:
      (their sum float32 [B], their number int32 [B])
    """
    words, real = token_ids[:, 1:], token_mask[:, 1:]
    log_shares = jax.nn.log_softmax(logits[:, :-1])
    told = jnp.take_along_axis(log_shares, words[..., None], axis=-1)[..., 0]
    losses = -(1 - smoothing) * told - smoothing * jnp.mean(log_shares, axis=-1)
    return jnp.sum(jnp.where(real, losses, 0.0), axis=1), jnp.sum(real, axis=1)
