"""The decoder of masked image modelling: tokens of a picture with hidden patches -> those patches.

Source: arXiv 2112.03109 (FaRL): a few more transformer blocks after the image tower, of its kind, a
norm and a linear layer, read at hidden patches only. What is predicted are the codes of a discrete
tokenizer, as there, or normalised pixels (arXiv 2111.06377, section 4.1). A second linear layer, if
there, says how badly each patch will be guessed (arXiv 2304.05919, where it has blocks of its own).
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.config import ModelConfig
from flip_jax.models.layers import LayerNorm, normal, scan_blocks, stack_blocks
from flip_jax.models.vit import EPSILON, VisionBlock

Array = jax.Array

# Of the decoder: what the momentum twin needs to say which patches are hard.
TEACHER = ("blocks", "norm", "loss_head")


class MimDecoder(nnx.Module):
    """B pictures, N patches, M of them hidden, D width of the image tower, P side of a patch.

    O is what is predicted of one patch: logits of `mim_vocab` codes, or P*P*3 pixels.
    """

    def __init__(self, cfg: ModelConfig, *, dtype: jnp.dtype, remat: str, rngs: nnx.Rngs):
        own, width = replace(cfg.vision, depth=cfg.mim_depth), cfg.vision.width
        self.remat = remat
        self.mask_token = nnx.Param(normal(0.02)(rngs.params(), (width,)))
        self.blocks = stack_blocks(lambda r: VisionBlock(own, dtype, r), cfg.mim_depth, rngs)
        self.norm = LayerNorm(width, EPSILON, dtype, rngs)
        out = cfg.mim_vocab or 3 * own.patch_size**2
        self.out = nnx.Linear(width, out, kernel_init=normal(0.02), rngs=rngs)
        if cfg.mim_loss_head:
            # No bias: only the order of its outputs is learnt, so it would have no gradient.
            self.loss_head = nnx.Linear(
                width, 1, use_bias=False, kernel_init=normal(0.02), rngs=rngs
            )

    def __call__(self, tokens: Array, hidden: Array) -> dict[str, Array]:
        """Predicts the hidden patches.

        Args:
          tokens: [B, 1 + N, D], see `VisionTransformer.encode_hidden`.
          hidden: int32 [B, M], which patches.

        Returns:
          `patches` float32 [B, M, O]; with the loss head also `losses` float32 [B, M], higher where
          a patch is harder; only their order within a picture means something.
        """
        x = jnp.take_along_axis(self._blocks(tokens), 1 + hidden[:, :, None], axis=1)
        x = self.norm(x).astype(jnp.float32)
        guess = {"patches": self.out(x)}
        return guess | ({"losses": self._losses(x)} if hasattr(self, "loss_head") else {})

    def expected_losses(self, tokens: Array) -> Array:
        """`losses` of all patches, float32 [B, N]."""
        return self._losses(self.norm(self._blocks(tokens)[:, 1:]).astype(jnp.float32))

    def _losses(self, x: Array) -> Array:
        return self.loss_head(x)[..., 0]

    def _blocks(self, tokens: Array) -> Array:
        x, _ = scan_blocks(
            self.blocks, tokens, lambda block, x, _: block(x), key=None, remat=self.remat
        )
        return x
