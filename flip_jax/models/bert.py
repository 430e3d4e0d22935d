"""The text tower: post-LN BERT whose every layer can also look at an image.

Source: models/mm.py of the official FLIP; arXiv 1810.04805. No token-type embedding, no pooler. The
cross-attention block sits between self-attention and feed-forward and is skipped when no image is
given (text mode). Self-attention is bidirectional; in causal mode, for captions, a token sees
itself and those before it, with the same weights (BLIP, arXiv 2201.12086, has others for that).
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.config import TextConfig
from flip_jax.models.attention import Attention
from flip_jax.models.layers import (
    LayerNorm,
    Mlp,
    dropout,
    exact_gelu,
    normal,
    scan_blocks,
    stack_blocks,
    take_rows,
)

Array = jax.Array

EPSILON = 1e-12

# The image that each text looks at: int32 [G], its row among the images, the same for each N / G
# consecutive texts (with G = N for one text alone); or a tuple with an entry for each text of a
# group of consecutive ones: a place among the group's own images, the same for every group, or
# int32 [groups], rows among all images; or None, each N / M consecutive texts look at the next one.
ImageIndex = Array | tuple[int | Array, ...] | None

# What texts look at: image tokens [M, Si, Dv], or keys and values that were made of them
# ([M, H, Si, K] each of one layer, [L, M, H, Si, K] of all).
Images = Array | tuple[Array, Array]


def of_each_text(a: Array, image_index: ImageIndex) -> Array:
    """Keys or values of the images [M, ...] -> of the image that each text, or each group of them,
    looks at [N or G, ...]."""
    if isinstance(image_index, tuple):
        places = tuple(i if isinstance(i, int) else None for i in image_index)
        return _of_groups(a, [i for i in image_index if not isinstance(i, int)], places)
    # With one image there is nothing to gather: all texts are its group. (XLA's CPU backend of
    # jaxlib 0.10.2 also returns wrong values for that gather inside a scan.)
    return a if image_index is None or len(a) == 1 else take_rows(a, image_index)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _of_groups(a: Array, rows: list[Array], places: tuple[int | None, ...]) -> Array:
    """`of_each_text` of groups; `rows` are those of its entries, in order, that `places` has not.

    Its gradient adds what comes from texts of an image's own group before it scatters the rest.
    """
    groups = a.reshape(-1, _own_images(places), *a.shape[1:])
    taken = (a if len(a) == 1 else a[index] for index in rows)
    texts = [next(taken) if place is None else groups[:, place] for place in places]
    return jnp.stack(texts, axis=1).reshape(-1, *a.shape[1:])


def _own_images(places: tuple[int | None, ...]) -> int:
    return 1 + max(place for place in places if place is not None)


def _gradient_of_groups(places: tuple[int | None, ...], rows: list[Array], grad: Array):
    each = grad.reshape(-1, len(places), *grad.shape[1:]).astype(jnp.float32)
    own = [
        sum(each[:, text] for text, at in enumerate(places) if at == place)
        for place in range(_own_images(places))
    ]
    total = jnp.stack(own, axis=1).reshape(-1, *grad.shape[1:])
    scattered = [text for text, place in enumerate(places) if place is None]
    for text, index in zip(scattered, rows, strict=True):
        total = total.at[index].add(each[:, text])
    return total.astype(grad.dtype), [None] * len(rows)


_of_groups.defvjp(lambda a, rows, places: (_of_groups(a, rows, places), rows), _gradient_of_groups)


class TextBlock(nnx.Module):
    """norm(x + attn(x)), norm(x + cross(x, image)) if there is one, norm(x + mlp(x))."""

    def __init__(self, cfg: TextConfig, image_width: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.dropout = cfg.dropout
        std = {"in_std": cfg.init_std, "out_std": cfg.init_std}
        self.attn = Attention(cfg.width, cfg.heads, **std, dtype=dtype, rngs=rngs)
        self.ln_attn = LayerNorm(cfg.width, EPSILON, dtype, rngs)
        self.cross = Attention(
            cfg.width, cfg.heads, kv_width=image_width, **std, dtype=dtype, rngs=rngs
        )
        self.ln_cross = LayerNorm(cfg.width, EPSILON, dtype, rngs)
        self.mlp = Mlp(
            cfg.width,
            cfg.mlp_width,
            exact_gelu,
            up_std=cfg.init_std,
            down_std=cfg.init_std,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_mlp = LayerNorm(cfg.width, EPSILON, dtype, rngs)

    def __call__(
        self,
        x: Array,
        mask: Array,
        images: Images | None,
        image_index: ImageIndex,
        key: Array | None,
        *,
        first_only: bool = False,
    ) -> Array:
        """[N, S, D] -> [N, S, D], or of the first token alone, [N, 1, D], with `first_only`."""
        keys_values = self.attn.keys_values(x)
        image_kv = None
        if images is not None:
            # Keys and values once per image; the rows that look at it share them.
            image_kv = images if isinstance(images, tuple) else self.cross.keys_values(images)
            image_kv = jax.tree.map(lambda a: of_each_text(a, image_index), image_kv)
        return self.forward(x[:, :1] if first_only else x, keys_values, mask, image_kv, key)

    def forward(
        self,
        x: Array,
        keys_values: tuple[Array, Array],
        mask: Array,
        image_kv: tuple[Array, Array] | None,
        key: Array | None = None,
    ) -> Array:
        """x [N, Sq, D] -> [N, Sq, D]; it looks at keys and values [N, H, S, K]."""
        keys = [None] * 5 if key is None else jax.random.split(key, 5)
        attended = self.attn(x, keys_values, mask, dropout_rate=self.dropout, dropout_key=keys[0])
        x = self.ln_attn(x + dropout(attended, self.dropout, keys[1]))
        if image_kv is not None:
            crossed = self.cross(x, image_kv, dropout_rate=self.dropout, dropout_key=keys[2])
            x = self.ln_cross(x + dropout(crossed, self.dropout, keys[3]))
        return self.ln_mlp(x + dropout(self.mlp(x), self.dropout, keys[4]))


class Bert(nnx.Module):
    """Token ids -> hidden states, alone or grounded in an image."""

    def __init__(
        self, cfg: TextConfig, image_width: int, *, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs
    ):
        self.dropout, self.remat = cfg.dropout, remat
        self.word_embed = nnx.Param(
            normal(cfg.init_std)(rngs.params(), (cfg.vocab_size, cfg.width))
        )
        self.position_embed = nnx.Param(
            normal(cfg.init_std)(rngs.params(), (cfg.positions, cfg.width))
        )
        self.ln_embed = LayerNorm(cfg.width, EPSILON, dtype, rngs)
        self.blocks = stack_blocks(lambda r: TextBlock(cfg, image_width, dtype, r), cfg.depth, rngs)

    def image_keys_values(self, image_tokens: Array) -> tuple[Array, Array]:
        """Keys and values [L, M, H, Si, K] of image tokens [M, Si, Dv], for all layers."""
        graphdef, state = nnx.split(self.blocks.cross)
        return jax.lax.map(lambda s: nnx.merge(graphdef, s).keys_values(image_tokens), state)

    def __call__(
        self,
        token_ids: Array,
        token_mask: Array,
        image_tokens: Images | None = None,
        image_index: ImageIndex = None,
        key: Array | None = None,
        *,
        causal: bool = False,
        first_only: bool = False,
        return_blocks: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Encode texts.

        Args:
          token_ids: int32 [N, S], S <= positions.
          token_mask: bool [N, S], True = real token; the first token must be real.
          image_tokens: [M, Si, Dv], or what `image_keys_values` made of them; None = text mode,
            cross-attention is skipped.
          image_index: the image that each text looks at, see `ImageIndex`.
          key: dropout; None = deterministic.
          causal: a token sees itself and those before it only.
          first_only: compute the hidden state of the first token alone: the last block need not
            look at the others again. Not with `causal`.
          return_blocks: also return the output of every block; not with `first_only`.

        Returns:
          hidden states [N, S, D], with `first_only` [N, 1, D]; with `return_blocks` also
          [L, N, S, D].
        """
        embed_key, blocks_key = (None, None) if key is None else jax.random.split(key)
        tokens = token_ids.shape[1]
        x = self.word_embed[...][token_ids] + self.position_embed[:tokens]
        x = dropout(self.ln_embed(x), self.dropout, embed_key)
        mask = token_mask
        if causal:
            mask = token_mask[:, None] & jnp.tril(jnp.ones((tokens, tokens), bool))

        def apply(block: TextBlock, x: Array, key: Array | None, images=image_tokens, **options):
            return block(x, mask, images, image_index, key, **options)

        x, blocks = scan_blocks(
            self.blocks,
            x,
            apply,
            key=blocks_key,
            remat=self.remat,
            collect=return_blocks,
            last=partial(apply, first_only=True) if first_only else None,
            inputs=(image_tokens,) if isinstance(image_tokens, tuple) else (),
        )
        return (x, blocks) if return_blocks else x
