"""Captions from attributes, by the grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flip_jax.curate.config import CaptionsConfig
from flip_jax.curate.stages import Sample, Stage, Tally
from flip_jax.data.attributes import UNKNOWN
from flip_jax.data.captions import captions
from flip_jax.data.records import group_number


class GrammarStage(Stage):
    """Fills `captions`, which depend on the labels, the id and the seed only.

    Drops: `no caption`.
    """

    name = "captions"

    def __init__(self, cfg: CaptionsConfig):
        super().__init__(cfg)

    def process(self, batch: Sequence[Sample], tally: Tally) -> list[Sample]:
        kept = []
        for sample in batch:
            texts = list(sample.texts) if self.cfg.keep_texts else []
            labels = sample.attributes
            if self.cfg.count and labels is not None and np.any(labels != UNKNOWN):
                seed = group_number(f"{self.cfg.seed}:{sample.id}")
                made = captions(labels, seed, self.cfg.count)
                tally.count(self.name, "made by grammar", len(made))
                texts += made
            if not texts and (self.cfg.count or self.cfg.keep_texts):
                tally.drop(self.name, sample, "no caption", "no text and no known attribute")
                continue
            kept.append(replace(sample, captions=tuple(texts)))
        return kept
