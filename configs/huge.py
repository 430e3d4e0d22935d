"""ViT-H/14 and a BERT-large text tower; everything else as `base.py`. Not measured.

1.08 billion parameters: with optimizer and twins 16 GiB, hence cut in four.
"""

from dataclasses import replace
from pathlib import Path

from flip_jax.config import Config, MeshConfig, VisionConfig, load


def get_config() -> Config:
    large = load(Path(__file__).with_name("large.py"))
    vision = VisionConfig(patch_size=14, width=1280, depth=32, heads=16, mlp_width=5120)
    model = replace(large.model, vision=vision, remat="full")
    return replace(large, model=model, mesh=MeshConfig(fsdp=4))
