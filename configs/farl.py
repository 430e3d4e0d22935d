"""Masked image modelling beside the contrastive loss, as FaRL (arXiv 2112.03109); no ITM.

What differs from FaRL: ITC with momentum twins and a queue as in `base.py`, where FaRL compares
within the batch; the hidden patches' normalised pixels are predicted, where FaRL predicts the codes
of a discrete tokenizer. One block of decoder; 78 of 196 patches are hidden. Not measured at this
size.
"""

from dataclasses import replace

from flip_jax.config import Config, LossConfig, LossWeights, ModelConfig


def get_config() -> Config:
    loss = LossConfig(weights=LossWeights(itm=0.0, mim=1.0), candidates="global")
    return replace(Config(), model=ModelConfig(mim_depth=1), loss=loss)
