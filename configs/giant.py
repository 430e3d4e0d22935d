"""ViT-g/14 and a BERT-large text tower; everything else as `base.py`. Not measured.

1.47 billion parameters, cut in four as in `huge.py`. Sizes of the image tower: arXiv 2106.04560.
"""

from dataclasses import replace
from pathlib import Path

from flip_jax.config import Config, VisionConfig, load


def get_config() -> Config:
    huge = load(Path(__file__).with_name("huge.py"))
    vision = VisionConfig(patch_size=14, width=1408, depth=40, heads=16, mlp_width=6144)
    return replace(huge, model=replace(huge.model, vision=vision))
