"""Captions word by word: the head that tells the next word, and a step that remembers.

Source: arXiv 2201.12086 (BLIP) and arXiv 1810.04805 (BERT's masked-word head). All else is the text
tower in causal mode. Dims: N texts, S places, D width, H heads, K head width, L layers, V words.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.config import TextConfig
from flip_jax.models.bert import EPSILON, Bert
from flip_jax.models.layers import LayerNorm, Linear, exact_gelu, normal, product

Array = jax.Array


class CaptionHead(nnx.Module):
    """norm(gelu(dense(x))) @ word embeddings + bias: tied, so that it is small."""

    def __init__(self, cfg: TextConfig, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dense = Linear(
            cfg.width, cfg.width, kernel_init=normal(cfg.init_std), dtype=dtype, rngs=rngs
        )
        self.norm = LayerNorm(cfg.width, EPSILON, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(cfg.vocab_size, jnp.float32))

    def __call__(self, x: Array, word_embed: Array) -> Array:
        """Args: x: [..., D]; word_embed: [V, D]. Returns logits float32 [..., V]."""
        x = self.norm(exact_gelu(self.dense(x)))
        table = word_embed.astype(x.dtype).T
        return product(x, table, jnp.float32) + self.bias[...]


class Memory(NamedTuple):
    """What a step need not compute again: (keys, values) of every layer."""

    words: tuple[Array, Array]  # [L, N, H, S, K], of the places so far
    image: tuple[Array, Array]  # [L, M, H, Si, K], each for N / M consecutive texts


def begin(bert: Bert, image_tokens: Array, places: int, texts: int) -> Memory:
    """The memory before the first word.

    Args:
      image_tokens: [M, Si, Dv]; places: S; texts: N, each N / M consecutive ones of one image.
    """
    graphdef, state = nnx.split(bert.blocks)

    def layer(_, params):
        return None, nnx.merge(graphdef, params).cross.keys_values(image_tokens)

    image = jax.lax.scan(layer, None, state)[1]
    layers, _, heads, _, head_width = image[0].shape
    empty = jnp.zeros((layers, texts, heads, places, head_width), image[0].dtype)
    return Memory((empty, empty), image)


def step(bert: Bert, token_ids: Array, place: Array, memory: Memory) -> tuple[Array, Memory]:
    """States [N, D] of the tokens int32 [N] that stand at `place`, and the memory with them."""
    graphdef, state = nnx.split(bert.blocks)
    x = bert.ln_embed(bert.word_embed[...][token_ids] + bert.position_embed[...][place])[:, None]
    places = memory.words[0].shape[3]
    mask = jnp.broadcast_to(jnp.arange(places) <= place, (len(x), places))

    def layer(x, inputs):
        params, words, image = inputs
        block = nnx.merge(graphdef, params)
        words = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, place, axis=2),
            words,
            block.attn.keys_values(x),
        )
        return block.forward(x, words, mask, image), words

    x, words = jax.lax.scan(layer, x, (state, *memory))
    return x[:, 0], memory._replace(words=words)
