"""Every part of a run in seconds: for trying a change, not for learning anything."""

from dataclasses import replace

from flip_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    DrawnConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)


def get_config() -> Config:
    vision = VisionConfig(image_size=32, patch_size=16, width=32, depth=1, heads=2, mlp_width=64)
    text = TextConfig(
        vocab_size=529, max_length=24, positions=32, width=32, depth=1, heads=2, mlp_width=64
    )
    drawn = DrawnConfig(train_identities=24, test_identities=12, pictures=2, captions=2, size=64)
    return replace(
        Config(),
        model=ModelConfig(vision=vision, text=text, embed_dim=16, dtype="float32"),
        loss=LossConfig(queue_size=32, local_batch=4),
        data=DataConfig(drawn=drawn, batch_size=8, tokenizer="grammar"),
        eval=EvalConfig(batch_size=8, rerank=4),
        checkpoint=CheckpointConfig(every_steps=4, every_minutes=None),
        epochs=3.0,
        log_every_steps=3,
    )
