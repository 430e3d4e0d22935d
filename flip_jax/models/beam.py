"""Beam search for the likeliest caption of each picture; one beam is greedy.

Dims: N pictures, b beams, T places, V words.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flip_jax.models import captioner
from flip_jax.models.flip import Flip

Array = jax.Array


def write_captions(
    model: Flip,
    image_tokens: Array,
    allowed: Array,
    *,
    sep_id: int,
    pad_id: int,
    places: int,
    beams: int = 1,
    length_penalty: float = 0.0,
) -> tuple[Array, Array]:
    """The captions that beam search finds.

    A beam that has written [SEP] keeps its score and its place among the others until better ones
    push it out, and the best caption that ever ended is remembered, because those may fall behind
    it later; the search ends when all beams have ended, or no place is left.

    Args:
      image_tokens: [N, Si, D] from `encode_image`.
      allowed: bool [V], the words that may be written; [SEP] must be one.
      places: T, the longest caption with [DEC] and [SEP]; one that has not ended by then is cut.
      beams: b.
      length_penalty: a beam's log-probability is divided by its number of words to this power
        before the best one is chosen, of those that ended and those that were cut; 0 = as it is,
        which favours short captions.

    Returns:
      (token_ids int32 [N, T], [DEC] first and [PAD] after [SEP]; log-probability float32 [N])
    """
    rows, words = len(image_tokens), len(allowed)
    memory = captioner.begin(model.bert, image_tokens, places, texts=rows * beams)
    ids = jnp.full((rows, beams, places), pad_id, jnp.int32).at[:, :, 0].set(model.dec_id)
    # One beam at first: equal ones would find the same.
    scores = jnp.full((rows, beams), -jnp.inf).at[:, 0].set(0.0)
    ended = jnp.zeros((rows, beams), bool)
    only_pad = jnp.where(jnp.arange(words) == pad_id, 0.0, -jnp.inf)

    def best_of(ids, scores, candidates):
        """Ids, log-probability and what is compared, [N, T], [N], [N], of the best candidate."""
        lengths = jnp.sum(ids[:, :, 1:] != pad_id, axis=-1).astype(jnp.float32)
        values = jnp.where(candidates, scores / jnp.maximum(lengths, 1) ** length_penalty, -jnp.inf)
        take = jnp.arange(rows), jnp.argmax(values, axis=1)
        return ids[take], scores[take], values[take]

    def better_of(one, other):
        wins = other[2] > one[2]
        ids = jnp.where(wins[:, None], other[0], one[0])
        return ids, *(jnp.where(wins, b, a) for a, b in zip(one[1:], other[1:], strict=True))

    def unfinished(state):
        place, _, _, ended, *_ = state
        return (place < places - 1) & ~ended.all()

    def write(state):
        place, ids, scores, ended, kept, memory = state
        last = jax.lax.dynamic_index_in_dim(ids, place, axis=2, keepdims=False)
        states, memory = captioner.step(model.bert, last.reshape(-1), place, memory)
        logits = model.caption_head(states, model.bert.word_embed[...])
        shares = jnp.where(allowed, jax.nn.log_softmax(logits), -jnp.inf)
        shares = jnp.where(ended[..., None], only_pad, shares.reshape(rows, beams, words))
        totals = (scores[..., None] + shares).reshape(rows, -1)
        scores, best = jax.lax.top_k(totals, beams)
        parent, word = best // words, (best % words).astype(jnp.int32)
        ids = jnp.take_along_axis(ids, parent[..., None], axis=1)
        ids = jax.lax.dynamic_update_index_in_dim(ids, word, place + 1, axis=2)
        ended = jnp.take_along_axis(ended, parent, axis=1) | (word == sep_id)
        kept = better_of(kept, best_of(ids, scores, ended))
        row = (jnp.arange(rows)[:, None] * beams + parent).reshape(-1)
        memory = memory._replace(words=jax.tree.map(lambda a: a[:, row], memory.words))
        return place + 1, ids, scores, ended, kept, memory

    kept = ids[:, 0], jnp.full(rows, -jnp.inf), jnp.full(rows, -jnp.inf)
    start = jnp.zeros((), jnp.int32), ids, scores, ended, kept, memory
    _, ids, scores, ended, kept, _ = jax.lax.while_loop(unfinished, write, start)
    ids, scores, _ = better_of(kept, best_of(ids, scores, ~ended))
    return ids, scores
