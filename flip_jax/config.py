"""Every setting of a run: frozen dataclasses with all defaults, checks and overrides.

The defaults are the reference recipe (`configs/base.py`); a file under `configs/` changes a few
fields with `dataclasses.replace`, the command line changes more with `--config.optim.lr=1e-4`.
Field names carry their unit (`_steps`, `_epochs`, `_minutes`); `batch_size` counts image-text
pairs over all devices.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib.util
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True)
class VisionConfig:
    """CLIP-layout ViT. Default: ViT-B/16 at 224 px."""

    image_size: int = 224  # pixels, square
    patch_size: int = 16
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    # Patch masking (arXiv 2212.00794): number of patches the training pass keeps; None = all.
    # Evaluation and momentum twins always see all patches.
    keep_patches: int | None = None

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Post-LN BERT with cross-attention in every layer. Default: bert-base-uncased."""

    vocab_size: int = 30524  # the tokenizer's entries with [DEC] and [ENC]
    max_length: int = 65  # tokens a caption is padded or cut to, [CLS] and [SEP] included
    positions: int = 512
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_width: int = 3072
    dropout: float = 0.1

    @property
    def enc_id(self) -> int:
        """[ENC], the first token of an image-grounded text; the last entry of the vocabulary."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256
    # Compute type of matrix products; parameters, norms, softmax and losses stay float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass recomputes: nothing, all but matrix products, or whole blocks.
    remat: Literal["none", "dots", "full"] = "none"


@dataclass(frozen=True)
class LossConfig:
    momentum: float = 0.995  # of the twin encoders
    queue_size: int = 61_440
    alpha: float = 0.4  # weight of the momentum targets, ramped linearly from 0
    alpha_ramp_epochs: float = 2.0
    temperature: float = 0.07  # start value of the trained temperature
    temperature_min: float = 0.001
    temperature_max: float = 0.5
    # Momentum candidates of a row besides the queue: `local` = its own group of `local_batch`
    # consecutive rows (the reference: the 80 rows of one GPU), `global` = the whole batch.
    # Groups are rows of the batch, not devices, so a run does not change with the device count.
    candidates: Literal["local", "global"] = "local"
    local_batch: int = 80
    # What an equal group_id (same person or same picture) means in ITC. `negative`: nothing, two
    # pictures of one person push each other away (the reference, hence the default); `ignore`:
    # the pair is left out; `positive`: the target mass is shared among the group (ALBEF, BLIP).
    same_group: Literal["negative", "ignore", "positive"] = "negative"


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. The learning rate is for the whole batch."""

    lr: float = 3e-5
    min_lr: float = 1e-6
    warmup_lr: float = 1e-6
    warmup_steps: int = 20_000
    # `step`: reference; linear warm-up inside epoch 0, then lr * decay_rate**epoch, floor min_lr.
    # `cosine`: linear warm-up, then half a cosine per step to min_lr. `constant`: lr.
    schedule: Literal["step", "cosine", "constant"] = "step"
    decay_rate: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.05
    # Which parameters decay: `all` (reference: norms, biases and temperature too) or `kernels`.
    decay: Literal["all", "kernels"] = "all"
    clip_norm: float | None = None  # global gradient norm; the reference does not clip


@dataclass(frozen=True)
class DrawnConfig:
    """The embedded default data: drawn faces, rendered into records on first use."""

    train_identities: int = 0  # 0 = not used
    test_identities: int = 0
    pictures: int = 4  # per identity
    captions: int = 4  # per picture
    size: int = 128  # pixels
    seed: int = 0


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None  # folder with manifest.json, written by `python -m flip_jax.data`
    drawn: DrawnConfig = field(default_factory=DrawnConfig)
    train_split: str = "train"
    eval_split: str = "test"
    batch_size: int = 640
    # A vocabulary: hub name or local folder of a BERT tokenizer, a vocab.txt, or `grammar`, the
    # small one that ships with the package and covers the caption grammar.
    tokenizer: str = "bert-base-uncased"
    flip: bool = True  # mirror half of the training images
    randaugment_ops: int = 2  # 0 = off
    randaugment_level: int = 5  # of 10
    threads: int = 2  # decoding threads per process
    workers: int = 0  # decoding processes; 0 = threads of this process only
    prefetch: int = 4  # batches
    max_bad_fraction: float = 0.01  # undecodable records above this share stop the run


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: float = 1.0  # 0 = only at the end
    batch_size: int = 64
    max_images: int | None = 5000  # gallery size, the first records of the split; None = all
    captions: int = 1  # per image
    rerank: int = 256  # candidates per query that ITM re-ranks (k)
    # First token at re-ranking: `enc` as in training, `cls` as the reference evaluated.
    first_token: Literal["enc", "cls"] = "enc"


@dataclass(frozen=True)
class CheckpointConfig:
    every_steps: int | None = 5000
    every_minutes: float | None = 30.0
    keep_last: int = 2
    keep_best: int = 1  # by evaluation mean recall
    keep_every_steps: int | None = None


@dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # -1 = all devices that fsdp leaves
    fsdp: int = 1


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    epochs: float = 15.0
    seed: int = 42
    log_every_steps: int = 50
