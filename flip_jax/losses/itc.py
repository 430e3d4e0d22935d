"""Image-text contrastive loss (ITC) with momentum candidates, a queue and soft targets.

This is the plain, dense form: it writes out the similarities of every row to every candidate and
is the oracle of any faster one. Source: arXiv 2407.08515; models/fflip_pretrain.py of the
official code; arXiv 2107.07651 (ALBEF), equations 4-6.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

Array = jax.Array

# Far below any logit (|cosine| / temperature <= 1000), far above the float32 minimum.
_EXCLUDED = -1e9


def similarity(rows: Array, columns: Array) -> Array:
    """rows [..., B, E] against columns [..., N, E] -> [..., B, N], float32 whatever the backend."""
    return jnp.matmul(rows, columns.swapaxes(-1, -2), precision=jax.lax.Precision.HIGHEST)


def soft_targets(teacher_logits: Array, hard: Array, alpha: Array | float) -> Array:
    """alpha * softmax(teacher) + (1 - alpha) * hard, without gradient; all [B, N] float32."""
    teacher = jax.nn.softmax(teacher_logits, axis=-1)
    return jax.lax.stop_gradient(alpha * teacher + (1.0 - alpha) * hard)


def cross_entropy(logits: Array, targets: Array) -> Array:
    """Mean over rows of -sum(targets * log_softmax(logits)); [B, N] float32 -> scalar."""
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits, axis=-1), axis=-1))


def itc_loss(
    embeds: dict[str, Array],
    twin_embeds: dict[str, Array],
    queue: dict[str, Array],
    group: Array,
    temperature: Array,
    alpha: Array | float,
    same_group: Literal["negative", "ignore", "positive"] = "negative",
) -> tuple[Array, dict[str, Array]]:
    """Both directions of ITC for the rows given, against those rows' twins and the queue.

    With t = temperature, candidates c = [twin embeds of the batch | queue], e = online embeds,
    e' = twin embeds, for image to text (text to image alike):

        logits = e_image @ c_text.T / t          teacher = e'_image @ c_text.T / t
        targets = alpha * softmax(teacher) + (1 - alpha) * hard
        loss_i2t = mean over rows of cross-entropy(softmax(logits), targets)

    and the loss is the mean of the two directions. `hard` is the row's own pair. Gradients flow
    into the online embeddings and the temperature, never into candidates or targets.

    Args:
      embeds, twin_embeds: {"image": [B, E], "text": [B, E]}, float32, unit norm.
      queue: {"image": [Q, E], "text": [Q, E], "group": int32 [Q]}, before this batch is added.
      group: int32 [B]; equal numbers = same person or same picture.
      temperature: scalar, divides the cosines.
      alpha: weight of the teacher in the targets, 0..1.
      same_group: what a candidate of the row's own group is besides its own pair. `negative`: a
        negative (the reference, which computes the mask and never uses it); `ignore`: no
        candidate at all; `positive`: shares the hard target in equal parts (ALBEF).

    Returns:
      (loss, {"sim_i2t", "sim_t2i": logits [B, B+Q]; "targets_i2t", "targets_t2i": [B, B+Q];
      "same_group": mean number of other candidates of a row's group})
    """
    rows = len(group)
    candidate_group = jnp.concatenate([group, queue["group"]])
    same = group[:, None] == candidate_group[None, :]
    own = jnp.eye(rows, same.shape[1], dtype=bool)
    hard = own.astype(jnp.float32)
    if same_group == "positive":
        hard = same / jnp.sum(same, axis=-1, keepdims=True)

    aux = {"same_group": jnp.mean(jnp.sum(same & ~own, axis=-1, dtype=jnp.float32))}
    losses = []
    for name, query, key in (("i2t", "image", "text"), ("t2i", "text", "image")):
        candidates = jax.lax.stop_gradient(jnp.concatenate([twin_embeds[key], queue[key]]))
        logits = similarity(embeds[query], candidates) / temperature
        teacher = similarity(twin_embeds[query], candidates) / temperature
        if same_group == "ignore":
            logits = jnp.where(same & ~own, _EXCLUDED, logits)
            teacher = jnp.where(same & ~own, _EXCLUDED, teacher)
        targets = soft_targets(teacher, hard, alpha)
        losses.append(cross_entropy(logits, targets))
        aux |= {f"sim_{name}": logits, f"targets_{name}": targets}
    return (losses[0] + losses[1]) / 2, aux


def grouped_itc_loss(
    embeds: dict[str, Array],
    twin_embeds: dict[str, Array],
    queue: dict[str, Array],
    group: Array,
    temperature: Array,
    alpha: Array | float,
    same_group: Literal["negative", "ignore", "positive"],
    local_batch: int,
) -> tuple[Array, Array]:
    """Mean of `itc_loss` over groups of `local_batch` consecutive rows that share a queue.

    A row sees the twins of its own group only, as on one GPU of the reference;
    `local_batch` = B makes the whole batch candidates.

    Returns:
      (loss, mean number of same-group candidates per row)
    """

    def split(x: Array) -> Array:
        return x.reshape(-1, local_batch, *x.shape[1:])

    def one(embeds, twin_embeds, group):
        loss, aux = itc_loss(embeds, twin_embeds, queue, group, temperature, alpha, same_group)
        return loss, aux["same_group"]

    arguments = jax.tree.map(split, (embeds, twin_embeds, group))
    loss, same = jax.vmap(one)(*arguments)
    return jnp.mean(loss), jnp.mean(same)
