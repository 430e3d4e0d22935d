"""The image tower: CLIP's vision transformer, pre-LN, with the post-norm on every token.

Source: models/mm.py of the official FLIP; arXiv 2103.00020. Against Hugging Face's
`CLIPVisionModel`, `post_norm` is applied to all tokens, so that projection head and
cross-attention see normed tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flip_jax.config import VisionConfig
from flip_jax.models.attention import Attention
from flip_jax.models.layers import (
    LayerNorm,
    Mlp,
    normal,
    precision_of,
    quick_gelu,
    scan_blocks,
    stack_blocks,
)

Array = jax.Array

EPSILON = 1e-5
# CLIP's channel statistics of RGB in [0, 1].
PIXEL_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


def normalize_pixels(image: Array) -> Array:
    """uint8 RGB [..., 3] -> float32, CLIP mean and standard deviation."""
    return (image.astype(jnp.float32) / 255.0 - PIXEL_MEAN) / PIXEL_STD


def pixels_of(image: Array) -> Array:
    """Normalised pixels float32 of uint8 RGB [..., 3]; float32 are taken to be such already."""
    return normalize_pixels(image) if image.dtype == jnp.uint8 else image


class VisionBlock(nnx.Module):
    """x + attn(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, cfg: VisionConfig, dtype: jnp.dtype, rngs: nnx.Rngs):
        # CLIP's initial widths: the residual branches shrink with depth.
        branch_std = cfg.width**-0.5 * (2 * cfg.depth) ** -0.5
        self.flash = cfg.attention == "flash"
        self.ln_attn = LayerNorm(cfg.width, EPSILON, dtype, rngs)
        self.attn = Attention(
            cfg.width,
            cfg.heads,
            in_std=branch_std,
            out_std=cfg.width**-0.5,
            dtype=dtype,
            rngs=rngs,
        )
        self.ln_mlp = LayerNorm(cfg.width, EPSILON, dtype, rngs)
        self.mlp = Mlp(
            cfg.width,
            cfg.mlp_width,
            quick_gelu,
            up_std=(2 * cfg.width) ** -0.5,
            down_std=branch_std,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Array, *, first_only: bool = False) -> Array:
        """[B, S, D] -> [B, S, D], or of the first token alone, [B, 1, D], with `first_only`."""
        h = self.ln_attn(x)
        keys_values = self.attn.keys_values(h)
        if first_only:
            x, h = x[:, :1], h[:, :1]
        x = x + self.attn(h, keys_values, flash=self.flash and not first_only)
        return x + self.mlp(self.ln_mlp(x))


class VisionTransformer(nnx.Module):
    """Normalised pixels -> one token per patch, after a class token."""

    def __init__(self, cfg: VisionConfig, *, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs):
        self.patch_size, self.keep_patches = cfg.patch_size, cfg.keep_patches
        self.dtype, self.remat = dtype, remat
        self.patch_embed = nnx.Linear(
            3 * cfg.patch_size**2,
            cfg.width,
            use_bias=False,
            kernel_init=normal(0.02),
            dtype=dtype,
            precision=precision_of(dtype),
            rngs=rngs,
        )
        self.class_embed = nnx.Param(normal(cfg.width**-0.5)(rngs.params(), (cfg.width,)))
        self.position_embed = nnx.Param(normal(0.02)(rngs.params(), (cfg.patches + 1, cfg.width)))
        self.pre_norm = LayerNorm(cfg.width, EPSILON, dtype, rngs)
        self.blocks = stack_blocks(lambda r: VisionBlock(cfg, dtype, r), cfg.depth, rngs)
        self.post_norm = LayerNorm(cfg.width, EPSILON, dtype, rngs)

    def patches(self, image: Array) -> Array:
        """[B, H, W, 3] -> [B, patches, P*P*3]: patches row-major, inside a patch (y, x, rgb)."""
        rows, height, width, _ = image.shape
        p = self.patch_size
        grid = image.reshape(rows, height // p, p, width // p, p, 3)
        return grid.swapaxes(2, 3).reshape(rows, -1, p * p * 3)

    def __call__(
        self,
        image: Array,
        key: Array | None = None,
        *,
        first_only: bool = False,
        return_blocks: bool = False,
    ) -> Array | tuple[Array, Array]:
        """Encode images.

        Args:
          image: float32 [B, H, W, 3], normalised by `normalize_pixels`.
          key: draws the patches to keep when `keep_patches` is set; None keeps all of them.
          first_only: compute the class token alone: the last block need not look at the others
            again.
          return_blocks: also return the raw (not normed) output of every block; not with
            `first_only`.

        Returns:
          tokens [B, 1 + patches, D], class token first, after `post_norm`, with `first_only`
          [B, 1, D]; with `return_blocks` also [L, B, 1 + patches, D].
        """
        x = self.patch_embed(self.patches(image).astype(self.dtype))
        x, blocks = self._encode(x, key, collect=return_blocks, first_only=first_only)
        tokens = self.post_norm(x)
        return (tokens, blocks) if return_blocks else tokens

    def encode_hidden(self, image: Array, hidden: Array, mask_token: Array) -> Array:
        """Encode images of which some patches are hidden, not dropped.

        Args:
          image: as above; hidden: bool [B, patches]; mask_token: [D], in their place.

        Returns:
          tokens [B, 1 + patches, D], before `post_norm`.
        """
        x = self.patch_embed(self.patches(image).astype(self.dtype))
        x = jnp.where(hidden[..., None], mask_token, x)
        return self._encode(x, None)[0]

    def _encode(
        self, x: Array, key: Array | None, *, collect: bool = False, first_only: bool = False
    ) -> tuple[Array, Array | None]:
        """Embedded patches -> what comes out of the last block, and of every block.

        Float32 up to `pre_norm`, as what is added here to all rows has a sum over them as gradient.
        """
        position = self.position_embed[...]
        x = x + position[1:]
        if key is not None and self.keep_patches is not None:
            x = keep_random_patches(x, self.keep_patches, key)
        first = self.class_embed[...] + position[0]
        x = jnp.concatenate([jnp.broadcast_to(first, (len(x), 1, x.shape[-1])), x], axis=1)
        return scan_blocks(
            self.blocks,
            self.pre_norm(x),
            lambda block, x, _: block(x),
            key=None,
            remat=self.remat,
            collect=collect,
            last=(lambda block, x, _: block(x, first_only=True)) if first_only else None,
        )


def keep_random_patches(x: Array, count: int, key: Array) -> Array:
    """A random `count` of the patches of every row, in order: [B, N, D] -> [B, count, D].

    The number is static, so shapes are; patches carry their position already.
    Source: arXiv 2212.00794, section 3.
    """
    noise = jax.random.uniform(key, x.shape[:2])
    kept = jnp.sort(jnp.argsort(noise, axis=1)[:, :count], axis=1)
    return jnp.take_along_axis(x, kept[:, :, None], axis=1)
