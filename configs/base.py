"""The reference recipe of FLIP: every value is a default of `flip_jax.config`.

ViT-B/16 at 224 px, BERT-base, global batch 640, 15 epochs. Source: arXiv 2407.08515 and
configs/pretrain.yaml of the official code. The published run took 3 d 22 h on 8 GPUs.
Hardware, time and metric of this code at this size: not measured.
"""

from flip_jax.config import Config


def get_config() -> Config:
    return Config()
