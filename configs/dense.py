"""Masked image modelling alone, on drawn faces: a small image tower for parsing and alignment.

Captions do not say where an eye is, hidden patches do: 64 patches of 8 px, half of them hidden,
no text. Under an hour on two cores, with the drawing of 13,000 faces; what the frozen tower is then
worth is in docs/dense.md and docs/alignment.md.
"""

from dataclasses import replace
from pathlib import Path

from flip_jax.config import CheckpointConfig, Config, DrawnConfig, EvalConfig, LossWeights, load


def get_config() -> Config:
    demo = load(Path(__file__).with_name("demo.py"))
    vision = replace(demo.model.vision, keep_patches=None)
    weights = LossWeights(contrastive=0.0, itm=0.0, mim=1.0)
    return replace(
        demo,
        model=replace(demo.model, vision=vision),
        loss=replace(demo.loss, weights=weights, alpha_ramp_epochs=6.0),
        data=replace(
            demo.data,
            drawn=DrawnConfig(train_identities=6000, test_identities=500, pictures=2, size=96),
        ),
        eval=EvalConfig(every_epochs=0.0, max_images=100, rerank=0),
        checkpoint=CheckpointConfig(every_steps=None, every_minutes=5.0),
        epochs=20.0,
        unmasked_epochs=0.0,
    )
