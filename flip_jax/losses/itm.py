"""Image-text matching (ITM) with hard negatives from the whole batch.

On a mesh no device holds all similarities or all image tokens: each draws negatives for its own
rows, and of the images only those drawn travel. Source: arXiv 2407.08515;
models/fflip_pretrain.py of the official code; arXiv 2107.07651.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from flip_jax.losses.exchange import fetch_rows
from flip_jax.losses.itc import similarity
from flip_jax.parts import in_parts

Array = jax.Array

# Similarities that a device works on at a time, so that memory does not grow with the batch.
_BLOCK = 2**21


def sample_hard_negatives(
    image_embed: Array,
    text_embed: Array,
    group: Array,
    temperature: Array,
    key: Array,
    mesh: Mesh | None = None,
) -> tuple[dict[str, Array], dict[str, Array]]:
    """One image for every text and one text for every image, likelier the more they look alike.

    Row b is drawn from softmax(cosine / temperature) over the batch without the rows of its own
    group, by Gumbel-max: argmax(logits + Gumbel noise). That is the reference's multinomial
    without its probabilities, so it cannot fail where they underflow. The noise of a row depends on
    `key`, its number and B only, so equal embeddings give the same draw on any mesh.

    Args:
      image_embed, text_embed: float32 [B, E], online, unit norm.
      group: int32 [B]; equal numbers never become negatives of each other.
      temperature: scalar.
      key: PRNG key.
      mesh: has the rows on all of its devices; None = one device.

    Returns:
      ({"image": int32 [B], the image for text b; "text": int32 [B], the text for image b},
       {"image", "text": bool [B], False where a row has no other group to draw from})
    """
    draw = _draw
    if mesh is not None and mesh.size > 1:
        rows = P(mesh.axis_names)
        specs = (rows, rows, rows, P(), P(), P(), P())
        draw = jax.shard_map(_draw, mesh=mesh, in_specs=specs, out_specs=rows)
    image_embed, text_embed, temperature = jax.lax.stop_gradient(
        (image_embed, text_embed, temperature)
    )
    number = jnp.arange(len(group), dtype=jnp.int32)
    image_key, text_key = jax.random.split(key)
    image, has_image = draw(text_embed, group, number, image_embed, group, temperature, image_key)
    text, has_text = draw(image_embed, group, number, text_embed, group, temperature, text_key)
    return {"image": image, "text": text}, {"image": has_image, "text": has_text}


def _draw(
    query: Array,
    group: Array,
    number: Array,
    candidates: Array,
    candidate_group: Array,
    temperature: Array,
    key: Array,
) -> tuple[Array, Array]:
    """For some rows of the batch: a candidate of another group each, and whether there is one."""

    def draw_row(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        query, group, number = row
        allowed = candidate_group != group
        logits = similarity(query[None], candidates)[0] / temperature
        noise = jax.random.gumbel(jax.random.fold_in(key, number), logits.shape)
        drawn = jnp.argmax(jnp.where(allowed, logits + noise, -jnp.inf))
        return drawn.astype(jnp.int32), jnp.any(allowed)

    block = max(1, min(len(number), _BLOCK // len(candidates)))
    return jax.lax.map(draw_row, (query, group, number), batch_size=block)


def itm_logits(
    match: Callable[..., Array],
    token_ids: Array,
    token_mask: Array,
    image_tokens: Array,
    negatives: dict[str, Array],
    key: Array | None,
    *,
    mesh: Mesh | None = None,
    parts: int = 1,
) -> Array:
    """The fused pass: every pair, every text with a negative image, every image with another text.

    Three rows of the pass stand together for each row of the batch, so that on a mesh each device
    computes its own, with the keys and values of two images: its own and the one fetched for it.

    Args:
      match: `Flip.match`.
      token_ids: int32 [B, S]; token_mask: bool [B, S]; image_tokens: [B, Si, D].
      negatives: see `sample_hard_negatives`.
      key: dropout; None = deterministic.
      mesh: has the rows on all of its devices; None = one device.
      parts: the pass runs in so many parts, see `in_parts`.

    Returns:
      float32 [B, 3, 2]: row b's own pair, text b with its negative image, image b with its negative
      text; class 1 = match.
    """

    def three_texts(own: Array) -> Array:
        return jnp.stack([own, own, own[negatives["text"]]], axis=1)

    def flat(a: Array) -> Array:
        return a.reshape(-1, *a.shape[2:])

    def fused(token_ids, token_mask, images, image_index, key):
        logits = match(flat(token_ids), flat(token_mask), images, image_index, key)
        return logits.reshape(-1, 3, 2)

    texts = three_texts(token_ids), three_texts(token_mask)
    if parts == 1 and (mesh is None or mesh.size == 1):
        # All images are here: texts share the keys and values of the one they look at. Two of a
        # row look at its own: their gradients are added without a scatter.
        return fused(*texts, image_tokens, (0, negatives["image"], 0), key)

    def fused_rows(key, token_ids, token_mask, own, negative):
        images = flat(jnp.stack([own, negative], axis=1))
        return fused(token_ids, token_mask, images, (0, 1, 0), key)

    negative_tokens = fetch_rows(image_tokens, negatives["image"], mesh)
    return in_parts(fused_rows, parts)(key, *texts, image_tokens, negative_tokens)


def itm_loss(logits: Array, valid: dict[str, Array]) -> tuple[Array, Array]:
    """Two-class cross-entropy over the rows of `itm_logits`, a plain mean without balancing.

    Args:
      logits: float32 [B, 3, 2]; class 1 = match, which only the first of three does.
      valid: {"image", "text": bool [B]}; rows without a negative are left out of the mean.

    Returns:
      (loss, accuracy), scalars over the rows that count.
    """
    matches = jnp.arange(3) == 0
    weight = jnp.stack([jnp.ones_like(valid["image"]), valid["image"], valid["text"]], axis=1)
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    picked = jnp.where(matches, log_p[..., 1], log_p[..., 0])
    total = jnp.sum(weight)
    loss = -jnp.sum(jnp.where(weight, picked, 0.0)) / total
    correct = ((jnp.argmax(logits, axis=-1) == 1) == matches) & weight
    return loss, jnp.sum(correct) / total
