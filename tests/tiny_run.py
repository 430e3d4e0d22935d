"""A model of a few thousand parameters, its config and batches, for tests of whole steps."""

import dataclasses

import numpy as np

from flip_jax.config import Config, LossConfig, ModelConfig, TextConfig, VisionConfig

TINY = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=16, width=32, depth=2, heads=4, mlp_width=64),
    text=TextConfig(
        vocab_size=50, max_length=8, positions=8, width=32, depth=2, heads=4, mlp_width=64
    ),
    embed_dim=16,
    dtype="float32",
)
CFG = Config(
    model=TINY,
    loss=LossConfig(queue_size=32, local_batch=8, same_group="ignore"),
    data=dataclasses.replace(Config().data, batch_size=16),
)
SIGMOID = dataclasses.replace(
    CFG,
    model=dataclasses.replace(TINY, logit_bias=-2.0),
    loss=LossConfig(contrastive="sigmoid", temperature=0.1, same_group="positive"),
)


def batches(count):
    rng = np.random.default_rng(0)
    for _ in range(count):
        length = rng.integers(3, 9, size=(16, 1))
        yield {
            "image": rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8),
            "token_ids": rng.integers(0, 48, (16, 8)).astype(np.int32),
            "token_mask": np.arange(8)[None] < length,
            "group": rng.integers(0, 12, 16).astype(np.int32),
        }
