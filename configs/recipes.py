"""The recipe of `base.py` in towers that two CPU cores train in minutes: for comparing recipes.

`benchmarks/recipes.py` starts from here and changes one thing per row. Local candidates are an
eighth of the batch and pictures of one person are negatives, as in `base.py`. Of
what `demo.py` needs to learn from scratch in narrow towers, all rows have the same: slow twins, a
queue of two batches, wider start weights of the text tower, a floor of the temperature, a cosine
schedule, clipping.
"""

from dataclasses import replace
from pathlib import Path

from flip_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DrawnConfig,
    EvalConfig,
    LossWeights,
    load,
)


def get_config() -> Config:
    demo = load(Path(__file__).with_name("demo.py"))
    vision = replace(demo.model.vision, patch_size=16, keep_patches=None)
    drawn = DrawnConfig(train_identities=750, test_identities=250, pictures=4, size=96)
    return replace(
        demo,
        model=replace(demo.model, vision=vision, mim_depth=0),
        loss=replace(
            demo.loss,
            weights=LossWeights(),
            mim_share=0.4,
            candidates="local",
            local_batch=8,
            same_group="negative",
            alpha=0.4,
            alpha_ramp_epochs=6.0,
        ),
        data=DataConfig(drawn=drawn, batch_size=64, tokenizer="grammar"),
        eval=EvalConfig(every_epochs=0.0, max_images=1000, rerank=8),
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=2.0, keep_last=1, keep_best=0),
        epochs=8.0,
        unmasked_epochs=0.0,
    )
