"""Patch masking (arXiv 2212.00794): training sees half of the patches, the last epoch all of them.

The online image tower keeps 98 of 196 patches, drawn anew for each picture and step; momentum twins
and evaluation see all. Everything else as `base.py`. Not measured at this size.
"""

from dataclasses import replace

from flip_jax.config import Config, ModelConfig, VisionConfig


def get_config() -> Config:
    model = ModelConfig(vision=VisionConfig(keep_patches=98))
    return replace(Config(), model=model, unmasked_epochs=1.0)
