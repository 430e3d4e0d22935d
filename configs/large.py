"""ViT-L/14 and a BERT-large text tower; everything else as `base.py`. Not measured."""

from dataclasses import replace

from flip_jax.config import Config, ModelConfig, TextConfig, VisionConfig


def get_config() -> Config:
    vision = VisionConfig(patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096)
    text = TextConfig(width=1024, depth=24, heads=16, mlp_width=4096)
    model = ModelConfig(vision=vision, text=text, remat="dots")
    return replace(Config(), model=model)
