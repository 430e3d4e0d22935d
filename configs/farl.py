"""Masked image modelling beside the contrastive loss, as FaRL (arXiv 2112.03109); no ITM.

78 of 196 patches are hidden in rectangles (`block`), one block of decoder. FaRL predicts the codes
of a discrete tokenizer; so that this file runs as it is, the hidden patches' normalised pixels are
predicted. FaRL's target takes a tokenizer, of `python -m flip_jax.visual_tokenizer` or DALL-E's:
  --config.loss.mim_target=tokens --config.loss.mim_tokenizer=DIR --config.model.mim_vocab=CODES
What also differs: ITC with momentum twins and a queue as in `base.py`, where FaRL compares within
the batch. Not measured at this size.
"""

from dataclasses import replace

from flip_jax.config import Config, LossConfig, LossWeights, ModelConfig


def get_config() -> Config:
    loss = LossConfig(weights=LossWeights(itm=0.0, mim=1.0), candidates="global")
    return replace(Config(), model=ModelConfig(mim_depth=1), loss=loss)
