"""What of a config can be checked without data or devices."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from flip_jax.settings import check_types

if TYPE_CHECKING:  # `config.py` offers `validate` as its own
    from flip_jax.config import Config, LossConfig, ModelConfig, OptimConfig


def validate(cfg: Config) -> Config:
    """Check what can be checked without data or devices.

    Raises:
      ValueError: naming the field, its value, what is allowed and what to change.
    """
    check_types(cfg, "config")
    validate_model(cfg.model)
    _validate_training(cfg)
    return cfg


def _require(ok: bool, name: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ValueError(f"config.{name}={value!r}: {allowed}")


def _at_least(cfg: Config, least: int, *names: str) -> None:
    for name in names:
        value = operator.attrgetter(name)(cfg)
        _require(value is None or value >= least, name, value, f"must be at least {least}")


def validate_model(model: ModelConfig) -> None:
    """As `validate`, of the model alone, whose fields have the types that they must have."""
    vision, text = model.vision, model.text
    for name, tower in (("vision", vision), ("text", text)):
        for field_name in ("width", "depth", "heads", "mlp_width"):
            value = getattr(tower, field_name)
            _require(value >= 1, f"model.{name}.{field_name}", value, "must be at least 1")
    patch = vision.patch_size
    _require(patch >= 1, "model.vision.patch_size", patch, "must be at least 1")
    _require(
        vision.image_size > 0 and vision.image_size % vision.patch_size == 0,
        "model.vision.image_size",
        vision.image_size,
        f"must be a multiple of model.vision.patch_size={vision.patch_size}",
    )
    keep = vision.keep_patches
    _require(
        keep is None or 0 < keep <= vision.patches,
        "model.vision.keep_patches",
        keep,
        f"must be None or 1..{vision.patches}, the number of patches",
    )
    for name, tower in (("vision", vision), ("text", text)):
        _require(
            tower.width % tower.heads == 0,
            f"model.{name}.heads",
            tower.heads,
            f"must divide model.{name}.width={tower.width}",
        )
    _require(
        3 <= text.max_length <= text.positions,
        "model.text.max_length",
        text.max_length,
        f"must be 3..{text.positions}, the number of text positions",
    )
    _require(0 <= text.dropout < 1, "model.text.dropout", text.dropout, "must be in [0, 1)")
    _require(text.init_std >= 0, "model.text.init_std", text.init_std, "must be at least 0")
    _require(text.vocab_size >= 1, "model.text.vocab_size", text.vocab_size, "must be at least 1")


def _validate_training(cfg: Config) -> None:
    _at_least(cfg, 1, "eval.batch_size", "eval.captions", "mesh.fsdp")
    _at_least(cfg, 1, "log_every_steps", "checkpoint.every_steps", "checkpoint.keep_last")
    _at_least(cfg, 1, "checkpoint.keep_every_steps")
    _at_least(cfg, 0, "optim.warmup_steps", "optim.weight_decay")
    _at_least(cfg, 0, "optim.min_lr", "optim.warmup_lr")
    _at_least(cfg, 0, "eval.every_epochs", "eval.rerank", "checkpoint.keep_best")
    _require(0 <= cfg.seed < 2**32, "seed", cfg.seed, f"must be in 0..{2**32 - 1}")
    decay = cfg.optim.decay_rate
    _require(0 < decay <= 1, "optim.decay_rate", decay, "must be above 0 and at most 1")
    _at_least(cfg, 1, "eval.max_images")
    for name in ("optim.lr", "optim.eps", "optim.clip_norm", "checkpoint.every_minutes"):
        value = operator.attrgetter(name)(cfg)
        off = ", or None" if name in ("optim.clip_norm", "checkpoint.every_minutes") else ""
        _require(value is None or value > 0, name, value, f"must be above 0{off}")
    _validate_rates(cfg.optim)
    for name in ("beta1", "beta2"):
        value = getattr(cfg.optim, name)
        _require(0 <= value < 1, f"optim.{name}", value, "must be in [0, 1)")
    _validate_data(cfg)
    _validate_loss(cfg)
    steps = cfg.profile.steps
    _require(
        steps is None or 1 <= steps[0] <= steps[1],
        "profile.steps",
        steps,
        "must be None or first,last with 1 <= first <= last",
    )
    _require(cfg.epochs > 0, "epochs", cfg.epochs, "must be above 0")
    masked = cfg.model.vision.keep_patches is not None
    _require(
        0 <= cfg.unmasked_epochs <= (cfg.epochs if masked else 0),
        "unmasked_epochs",
        cfg.unmasked_epochs,
        f"must be 0 up to epochs, which are {cfg.epochs}: set it lower, too"
        if masked
        else "must be 0 up to epochs, and above 0 only with model.vision.keep_patches",
    )


def _validate_rates(cfg: OptimConfig) -> None:
    """A schedule must not come from above `lr`, nor end above it."""
    unused = {
        "warmup_lr": cfg.warmup_steps == 0,
        "min_lr": cfg.schedule == "constant",
    }
    for name, is_unused in unused.items():
        _require(
            is_unused or getattr(cfg, name) <= cfg.lr,
            f"optim.{name}",
            getattr(cfg, name),
            f"must be at most optim.lr, which is {cfg.lr}: set it lower, too",
        )


def _validate_data(cfg: Config) -> None:
    data = cfg.data
    _at_least(cfg, 1, "data.prefetch", "optim.accum_steps")
    _at_least(cfg, 0, "data.threads", "data.workers")
    _at_least(cfg, 0, "data.randaugment_ops", "data.max_bad_fraction")
    _at_least(cfg, 0, "data.drawn.train_identities", "data.drawn.test_identities")
    level = data.randaugment_level
    _require(0 <= level <= 10, "data.randaugment_level", level, "must be in 0..10")
    _require(data.path != "", "data.path", "", "must be a folder of records, or None")
    for name in ("init.checkpoint", "init.vision", "init.text", "loss.mim_tokenizer"):
        _require(operator.attrgetter(name)(cfg) != "", name, "", "must be a folder, or None")
    address = "://" in (data.path or "")
    _require(not address, "data.path", data.path, "must be a folder; see docs/scale.md")
    batch, share = data.batch_size, data.sketch_share
    _require(batch >= 2, "data.batch_size", batch, "must be at least 2: ITM needs a negative")
    _require(0 <= share <= 1, "data.sketch_share", share, "must be in [0, 1]")
    _require(
        batch % cfg.optim.accum_steps == 0,
        "optim.accum_steps",
        cfg.optim.accum_steps,
        f"must divide data.batch_size={batch}",
    )
    buckets, most = data.text_buckets, cfg.model.text.max_length
    _require(
        all(a < b for a, b in zip((2, *buckets), (*buckets, most), strict=True)),
        "data.text_buckets",
        buckets,
        f"must ascend, from 3 to less than model.text.max_length={most}",
    )


def _validate_loss(cfg: Config) -> None:
    loss = cfg.loss
    _at_least(cfg, 1, "loss.local_batch", "model.embed_dim")
    _at_least(cfg, 0, "loss.alpha_ramp_epochs")
    _require(
        0 < loss.temperature_min <= loss.temperature <= loss.temperature_max,
        "loss.temperature",
        loss.temperature,
        f"must be in [temperature_min, temperature_max] = "
        f"[{loss.temperature_min}, {loss.temperature_max}], above 0",
    )
    for name in ("momentum", "alpha"):
        value = getattr(loss, name)
        _require(0 <= value <= 1, f"loss.{name}", value, "must be in [0, 1]")
    needed = loss.contrastive == "sigmoid"
    _require(
        (cfg.model.logit_bias is not None) == needed,
        "model.logit_bias",
        cfg.model.logit_bias,
        f"must be {'a number' if needed else 'None'} with loss.contrastive={loss.contrastive}",
    )
    if loss.has_twins:
        _validate_candidates(loss, cfg.data.batch_size)
    _validate_weights(cfg)
    head, needed = cfg.model.caption_head, loss.weights.caption > 0
    allowed = f"must be {needed} with loss.weights.caption={loss.weights.caption}"
    _require(head == needed, "model.caption_head", head, allowed)
    smoothing = loss.caption_smoothing
    _require(0 <= smoothing < 1, "loss.caption_smoothing", smoothing, "must be in [0, 1)")
    _validate_mim(cfg)


def _validate_weights(cfg: Config) -> None:
    weights, parts = cfg.loss.weights, vars(cfg.loss.weights)
    _at_least(cfg, 0, "model.mim_depth", *(f"loss.weights.{name}" for name in parts))
    _require(any(parts.values()), "loss.weights", weights, "at least one must be above 0")
    _require(
        weights.contrastive > 0 or not weights.itm,
        "loss.weights.itm",
        weights.itm,
        "must be 0 with loss.weights.contrastive=0: ITM's negatives are what that loss mixes up",
    )


def _validate_mim(cfg: Config) -> None:
    model, loss, patches = cfg.model, cfg.loss, cfg.model.vision.patches
    depth, weight = model.mim_depth, loss.weights.mim
    allowed = f"must be {'1 or more' if weight else '0'} with loss.weights.mim={weight}"
    _require((depth > 0) == (weight > 0), "model.mim_depth", depth, allowed)
    allowed = f"must hide 1 to all but 1 of the {patches} patches"
    hidden = not weight or 1 <= loss.mim_share * patches <= patches - 1
    _require(hidden, "loss.mim_share", loss.mim_share, allowed)
    tokens, path, vocab = loss.mim_target == "tokens", loss.mim_tokenizer, model.mim_vocab
    allowed = "the folder of a visual tokenizer" if tokens else "None"
    allowed = f"must be {allowed} with loss.mim_target={loss.mim_target}"
    _require(bool(path) == tokens, "loss.mim_tokenizer", path, allowed)
    allowed = "the number of codes of loss.mim_tokenizer" if tokens else "0"
    allowed = f"must be {allowed} with loss.mim_target={loss.mim_target}"
    _require(vocab >= 2 if tokens else vocab == 0, "model.mim_vocab", vocab, allowed)
    hard = loss.mim_masking == "hard"
    allowed = f"must be {hard} with loss.mim_masking={loss.mim_masking}"
    _require(model.mim_loss_head == hard, "model.mim_loss_head", model.mim_loss_head, allowed)
    _require(
        not hard or loss.has_twins,
        "loss.mim_masking",
        "hard",
        "needs momentum twins, so loss.contrastive=itc and loss.weights.contrastive above 0",
    )


def _validate_candidates(loss: LossConfig, batch: int) -> None:
    if loss.candidates == "local":
        _require(
            batch % loss.local_batch == 0,
            "loss.local_batch",
            loss.local_batch,
            f"must divide data.batch_size={batch}; or set loss.candidates=global",
        )
    nearest = max(round(loss.queue_size / batch), 1) * batch
    _require(
        loss.queue_size >= batch and loss.queue_size % batch == 0,
        "loss.queue_size",
        loss.queue_size,
        f"must be a multiple of data.batch_size={batch}, for example {nearest}",
    )
