"""The decoder of masked image modelling: tokens of a picture with hidden patches -> those patches.

Source: arXiv 2112.03109 (FaRL): a few more transformer blocks after the image tower, of its kind, a
norm and a linear layer, read at hidden patches only. What is predicted are normalised pixels (arXiv
2111.06377, section 4.1); FaRL itself predicts the codes of a discrete tokenizer.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.config import VisionConfig
from flip_jax.models.layers import layer_norm, normal, scan_blocks, stack_blocks
from flip_jax.models.vit import EPSILON, VisionBlock

Array = jax.Array


class MimDecoder(nnx.Module):
    """B pictures, M hidden patches each, D width of the image tower, P side of a patch."""

    def __init__(
        self, cfg: VisionConfig, depth: int, *, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs
    ):
        own = replace(cfg, depth=depth)
        self.remat = remat
        self.mask_token = nnx.Param(normal(0.02)(rngs.params(), (cfg.width,)))
        self.blocks = stack_blocks(lambda r: VisionBlock(own, dtype, r), depth, rngs)
        self.norm = layer_norm(cfg.width, EPSILON, dtype, rngs)
        self.out = nnx.Linear(cfg.width, 3 * cfg.patch_size**2, kernel_init=normal(0.02), rngs=rngs)

    def __call__(self, tokens: Array, hidden: Array) -> Array:
        """Predicts the hidden patches.

        Args:
          tokens: [B, 1 + patches, D], see `VisionTransformer.encode_hidden`.
          hidden: int32 [B, M], which patches.

        Returns:
          float32 [B, M, P*P*3]
        """
        x, _ = scan_blocks(
            self.blocks, tokens, lambda block, x, _: block(x), key=None, remat=self.remat
        )
        x = jnp.take_along_axis(x, 1 + hidden[:, :, None], axis=1)
        return self.out(self.norm(x).astype(jnp.float32))
