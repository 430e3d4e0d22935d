"""Writing captions beside ITC and ITM, as BLIP (arXiv 2201.12086); the rest is `base.py`.

The text tower in causal mode shares all weights with the encoder, self-attention too, where BLIP
keeps it apart. One more pass of the text tower and a product with the vocabulary per pair. Not
measured at this size; on drawn faces see docs/caption.md.
"""

from dataclasses import replace

from flip_jax.config import Config, LossConfig, LossWeights, ModelConfig


def get_config() -> Config:
    loss = LossConfig(weights=LossWeights(caption=1.0))
    return replace(Config(), model=ModelConfig(caption_head=True), loss=loss)
