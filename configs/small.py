"""Real photographs, from scratch, on two CPU cores in about half an hour.

Made for a few thousand to some ten thousand faces with grammar captions, such as CelebA:
`python -m flip_jax.data build --help`. The recipe of `demo.py` with a larger image tower.
"""

from flip_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TextConfig,
    VisionConfig,
)


def get_config() -> Config:
    return Config(
        model=ModelConfig(
            vision=VisionConfig(
                image_size=96, patch_size=16, width=192, depth=6, heads=6, mlp_width=768
            ),
            text=TextConfig(
                vocab_size=529,
                max_length=40,
                positions=40,
                width=128,
                depth=2,
                heads=4,
                mlp_width=256,
                dropout=0.0,
                init_std=0.1,
            ),
            embed_dim=128,
            dtype="float32",
        ),
        loss=LossConfig(
            momentum=0.995,
            queue_size=128,
            alpha=0.2,
            alpha_ramp_epochs=4.0,
            temperature_min=0.05,
            candidates="global",
            same_group="ignore",
        ),
        optim=OptimConfig(
            lr=1e-3,
            min_lr=1e-5,
            warmup_lr=1e-5,
            warmup_steps=100,
            schedule="cosine",
            clip_norm=1.0,
        ),
        data=DataConfig(batch_size=64, tokenizer="grammar"),
        eval=EvalConfig(every_epochs=6.0, max_images=None, rerank=16),
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=5.0),
        epochs=12.0,
        log_every_steps=50,
    )
