"""Image-text matching (ITM) with hard negatives from the batch.

Source: arXiv 2407.08515; models/fflip_pretrain.py of the official code; arXiv 2107.07651.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flip_jax.losses.itc import similarity

Array = jax.Array


def sample_hard_negatives(
    image_embed: Array, text_embed: Array, group: Array, temperature: Array, key: Array
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One image for every text and one text for every image, likelier the more they look alike.

    Row b is drawn from softmax(cosine / temperature) over the batch without the rows of its own
    group, by Gumbel-max: argmax(logits + Gumbel noise). That is the reference's multinomial
    without its probabilities, so it cannot fail where they underflow.

    Args:
      image_embed, text_embed: float32 [B, E], online, unit norm.
      group: int32 [B]; equal numbers never become negatives of each other.
      temperature: scalar.
      key: PRNG key.

    Returns:
      ({"image": int32 [B], the image for text b; "text": int32 [B], the text for image b},
       {"image", "text": bool [B], False where a row has no other group to draw from})
    """
    allowed = group[:, None] != group[None, :]
    logits = jax.lax.stop_gradient(similarity(text_embed, image_embed) / temperature)
    image_key, text_key = jax.random.split(key)

    def draw(logits: Array, key: Array) -> Array:
        noisy = logits + jax.random.gumbel(key, logits.shape)
        return jnp.argmax(jnp.where(allowed, noisy, -jnp.inf), axis=-1).astype(jnp.int32)

    any_allowed = jnp.any(allowed, axis=-1)
    negatives = {"image": draw(logits, image_key), "text": draw(logits.T, text_key)}
    return negatives, {"image": any_allowed, "text": any_allowed}


def itm_inputs(
    token_ids: Array, token_mask: Array, negatives: dict[str, Array]
) -> tuple[Array, Array, Array]:
    """The 3B rows of the fused pass, in the reference's order.

    B pairs, B texts with a negative image, B images with a negative text.

    Args:
      token_ids: int32 [B, S]; token_mask: bool [B, S]; negatives: see `sample_hard_negatives`.

    Returns:
      token_ids [3B, S], token_mask [3B, S], image_index int32 [3B]
    """
    own = jnp.arange(len(token_ids), dtype=jnp.int32)
    text_index = jnp.concatenate([own, own, negatives["text"]])
    image_index = jnp.concatenate([own, negatives["image"], own])
    return token_ids[text_index], token_mask[text_index], image_index


def itm_loss(logits: Array, valid: dict[str, Array]) -> tuple[Array, Array]:
    """Two-class cross-entropy over the rows of `itm_inputs`, a plain mean without balancing.

    Args:
      logits: float32 [3B, 2]; class 1 = match. The first B rows match, the others do not.
      valid: {"image", "text": bool [B]}; rows without a negative are left out of the mean.

    Returns:
      (loss, accuracy), scalars over the rows that count.
    """
    rows = len(logits) // 3
    labels = (jnp.arange(3 * rows) < rows).astype(jnp.int32)
    weight = jnp.concatenate([jnp.ones(rows, bool), valid["image"], valid["text"]])
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
    total = jnp.sum(weight)
    loss = -jnp.sum(jnp.where(weight, picked, 0.0)) / total
    correct = (jnp.argmax(logits, axis=-1) == labels) & weight
    return loss, jnp.sum(correct) / total
