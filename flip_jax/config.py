"""Every setting of a run: frozen dataclasses with all defaults; their checks: `config_checks.py`.

The defaults are the reference recipe (`configs/base.py`); a file under `configs/` changes a few
fields with `dataclasses.replace`, the command line changes more with `--config.optim.lr=1e-4`.
Field names carry their unit (`_steps`, `_epochs`, `_minutes`); `batch_size` counts image-text
pairs over all devices.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flip_jax import settings
from flip_jax.config_checks import validate as validate

# What works on any dataclass of settings is found here, too.
from flip_jax.settings import check_types as check_types
from flip_jax.settings import from_arguments as from_arguments
from flip_jax.settings import override as override
from flip_jax.settings import to_dict as to_dict


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
    # How training computes attention among patches. `flash`: by a fused kernel, which keeps no
    # weights for the backward pass: cuDNN's on GPUs (with dtype bfloat16), splash attention on
    # TPUs; elsewhere, and in evaluation, it is `plain`.
    attention: Literal["plain", "flash"] = "plain"

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
    # Standard deviation of fresh weights. BERT's 0.02 suits its width; from scratch in a narrow
    # tower it makes all texts alike (cosine 0.9999 at width 128), take about 1 / sqrt(width).
    init_std: float = 0.02

    @property
    def dec_id(self) -> int:
        """[DEC], the first token of a caption that is being written."""
        return self.vocab_size - 2

    @property
    def enc_id(self) -> int:
        """[ENC], the first token of an image-grounded text; the last entry of the vocabulary."""
        return self.vocab_size - 1


@dataclass(frozen=True)
class ModelConfig:
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embed_dim: int = 256
    # Start of the trained bias of the pairs' logits, which `loss.contrastive=sigmoid` needs (-10 in
    # its paper); None = no such parameter.
    logit_bias: float | None = None
    # Blocks of the decoder of masked image modelling; 0 = none, see `LossWeights.mim`.
    mim_depth: int = 0
    # Entries of the visual tokenizer that this decoder tells apart, see `LossConfig.mim_target`;
    # 0 = it predicts pixels.
    mim_vocab: int = 0
    # Whether it also predicts how well each patch will be guessed, for `loss.mim_masking=hard`.
    mim_loss_head: bool = False
    # A head that tells the next word of a caption, see `LossWeights.caption`.
    caption_head: bool = False
    # Type of matrix products in training, and of what goes from block to block. Parameters, the
    # inside of norms and of softmax, losses and evaluation stay float32.
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    # What the backward pass recomputes: nothing, all but matrix products, or whole blocks.
    remat: Literal["none", "dots", "full"] = "none"


@dataclass(frozen=True)
class LossWeights:
    """The loss is the sum of these parts times their weights; one of weight 0 is not computed."""

    # See `LossConfig.contrastive`. Without it there is no ITM, and parameters that no other part
    # reads stay as they start, but for weight decay.
    contrastive: float = 1.0
    itm: float = 1.0  # image-text matching, with hard negatives of the contrastive loss
    # Masked image modelling (FaRL, arXiv 2112.03109): a second pass of the image tower, of which
    # some patches are hidden, and `model.mim_depth` more blocks that tell what was there.
    mim: float = 0.0
    # Writing the caption of a picture word by word (BLIP, arXiv 2201.12086): one more pass of the
    # text tower, in which a word sees the picture and the words before it.
    caption: float = 0.0


@dataclass(frozen=True)
class LossConfig:
    weights: LossWeights = field(default_factory=LossWeights)
    # `itc`: softmax over the batch's twins and a queue, with soft targets (the reference).
    # `sigmoid`: each pair of the batch is a yes-or-no question (SigLIP, arXiv 2303.15343). It has
    # neither twins nor queue: momentum, queue_size, alpha, candidates, local_batch do nothing.
    contrastive: Literal["itc", "sigmoid"] = "itc"
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
    # What an equal group_id (same person or same picture) means in the contrastive loss.
    # `negative`: nothing, two pictures of one person push each other away (the reference, hence
    # the default); `ignore`: the pair is left out; `positive`: the target mass is shared among the
    # group (ALBEF, BLIP).
    same_group: Literal["negative", "ignore", "positive"] = "negative"
    # What MIM predicts of a hidden patch: its normalised `pixels`, or the code that a frozen visual
    # tokenizer gives it (FaRL, BEiT): a folder of `python -m flip_jax.visual_tokenizer`, or of
    # `python -m flip_jax.convert --from dalle`.
    mim_target: Literal["pixels", "tokens"] = "pixels"
    mim_tokenizer: str | None = None
    # Share of the patches that MIM hides, and which: in rectangles (`block`; BEiT, arXiv
    # 2106.08254); anywhere (`random`); one whole part of the face and others anywhere (`region`,
    # from masks or landmarks of the records); some of those that the momentum twin expects to be
    # guessed worst, more and more up to half, and others anywhere (`hard`; arXiv 2304.05919).
    mim_share: float = 0.4
    mim_masking: Literal["block", "random", "region", "hard"] = "block"
    # Share of a word's target that goes to the whole vocabulary, as in BLIP: captions say the same
    # in many ways, and no word should be certain.
    caption_smoothing: float = 0.1

    @property
    def has_twins(self) -> bool:
        """Whether there are momentum twins and a queue."""
        return self.contrastive == "itc" and self.weights.contrastive > 0


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
    # The towers see the batch in so many parts, one after the other, to save memory. Losses,
    # candidates and negatives are those of the whole batch all the same.
    accum_steps: int = 1


@dataclass(frozen=True)
class InitConfig:
    """Weights to start from: folders of `python -m flip_jax.convert`, workdirs or step folders.

    A tower field wins over `checkpoint`; what none of them brings starts fresh. A run that has a
    checkpoint of its own goes on from that.
    """

    checkpoint: str | None = None  # all parameters, momentum twins and queue if there
    vision: str | None = None  # the image tower
    text: str | None = None  # the text tower


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
    # Share of the training pictures in whose place the sketch of the record is shown, drawn up to
    # a random stage, where there is one (the reference: none). Without, a model sees in a sketch
    # little of what the caption says, and finds no photo by one.
    sketch_share: float = 0.0
    # What of its caption a picture is held against in the contrastive loss, drawn anew at each
    # visit: all of it, one sentence, or a block of sentences in a row. ITM always reads all of it.
    contrastive_text: Literal["caption", "sentence", "block"] = "caption"
    # Lengths, in tokens, that texts are cut to where that cuts off nothing but padding: the first
    # one that holds the longest text of the batch, else all of `model.text.max_length`. The step is
    # compiled for each. With several processes they agree on it before every step.
    text_buckets: tuple[int, ...] = ()
    threads: int = 2  # decoding threads per process
    workers: int = 0  # decoding processes; 0 = threads of this process only
    prefetch: int = 4  # batches
    max_bad_fraction: float = 0.01  # undecodable records above this share stop the run


@dataclass(frozen=True)
class EvalConfig:
    every_epochs: float = 1.0  # 0 = only before the first step and after the last
    # Images at a time. Re-ranking keeps their keys and values on each device, at base size and
    # 224 px 14.5 MB of each.
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
class ProfileConfig:
    # First and last step of a trace in `workdir/profile`, `10,20` on the command line; None = off.
    steps: tuple[int, int] | None = None


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    init: InitConfig = field(default_factory=InitConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    epochs: float = 15.0
    # So many last epochs, of those above, train on all patches although
    # `model.vision.keep_patches` is set (unmasked tuning).
    unmasked_epochs: float = 0.0
    seed: int = 42
    log_every_steps: int = 50


def load(path: str | Path, kind: type = Config) -> Any:
    """`get_config()` of a file under `configs/`, see `settings.load`."""
    return settings.load(path, kind)


def from_dict(values: dict[str, Any], kind: type = Config) -> Any:
    """The inverse of `to_dict`, see `settings.from_dict`."""
    return settings.from_dict(values, kind)
