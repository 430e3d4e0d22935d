"""Masked image modelling (MIM): how well the hidden patches of a picture were guessed.

Dims: B pictures, a grid of G x G patches, N = G * G, M of them hidden.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from flip_jax.config import Config
from flip_jax.losses.masking import hidden_patches
from flip_jax.models.flip import Flip
from flip_jax.models.visual_tokenizer import VisualTokenizer
from flip_jax.models.vit import pixels_of
from flip_jax.parts import in_parts

Array = jax.Array


def mim_part(
    model: Flip,
    twin: Flip | None,
    batch: dict[str, Array],
    key: Array,
    cfg: Config,
    *,
    tokenizer: VisualTokenizer | None = None,
    hard_share: Array | float = 0.0,
) -> tuple[Array, dict[str, Array]]:
    """Guess hidden patches from the others, in a pass of its own.

    Args:
      twin: the momentum model, which ranks the patches with `loss.mim_masking=hard`.
      batch: image [B, H, W, 3], see `flip_loss`; `regions` uint32 [B, N] with `region`.
      key: draws what is hidden.
      tokenizer: gives the codes of the very picture that the image tower sees, with
        `loss.mim_target=tokens`.
      hard_share: see `hidden_patches`.

    Returns:
      (loss, metrics: `loss_mim`; `mim_accuracy` with codes; `loss_mim_rank` with `hard`, which is
      part of the loss)
    """
    image, parts, vision = batch["image"], cfg.optim.accum_steps, cfg.model.vision
    grid, count = vision.image_size // vision.patch_size, round(cfg.loss.mim_share * vision.patches)
    difficulty = None
    if cfg.loss.mim_masking == "hard":
        rank = in_parts(lambda _, image: twin.expected_losses(image), parts)
        difficulty = jax.lax.stop_gradient(rank(None, image))
    hidden = hidden_patches(
        key,
        len(image),
        grid,
        count,
        cfg.loss.mim_masking,
        regions=batch.get("regions"),
        difficulty=difficulty,
        hard_share=hard_share,
    )

    def guess(_, image: Array, hidden: Array) -> dict[str, Array]:
        """float32 [B, M] each; what is as long as the vocabulary stays within a part."""
        guessed = model.predict_hidden(image, hidden)
        if tokenizer is not None:
            codes = jnp.take_along_axis(tokenizer.codes(image, grid), hidden, axis=1)
            found = code_errors(guessed["patches"], codes)
        else:
            targets = pixel_targets(model.vit.patches(pixels_of(image)), hidden)
            found = {"errors": pixel_errors(guessed["patches"], targets)}
        return found | ({"losses": guessed["losses"]} if "losses" in guessed else {})

    found = in_parts(guess, parts)(None, image, hidden)
    loss = jnp.mean(found["errors"])
    metrics = {"loss_mim": loss}
    if tokenizer is not None:
        metrics["mim_accuracy"] = jnp.mean(found["right"])
    if cfg.loss.mim_masking == "hard":
        metrics["loss_mim_rank"] = rank_loss(found["losses"], found["errors"])
        loss += metrics["loss_mim_rank"]
    return loss, metrics


def pixel_targets(patches: Array, hidden: Array) -> Array:
    """Hidden patches with mean 0 and variance 1 each, float32 [B, M, P*P*3].

    Args:
      patches: float32 [B, N, P*P*3], see `VisionTransformer.patches`; hidden: int32 [B, M].

    Source: arXiv 2111.06377 (MAE), section 4.1, normalised pixels.
    """
    shown = jnp.take_along_axis(patches.astype(jnp.float32), hidden[:, :, None], axis=1)
    mean = jnp.mean(shown, axis=-1, keepdims=True)
    variance = jnp.var(shown, axis=-1, keepdims=True, ddof=1)
    return (shown - mean) * jax.lax.rsqrt(variance + 1e-6)


def pixel_errors(predicted: Array, targets: Array) -> Array:
    """Mean squared error of each patch, [B, M]; both float32 [B, M, P*P*3]. Guessing 0 gives 1."""
    return jnp.mean(jnp.square(predicted - jax.lax.stop_gradient(targets)), axis=-1)


def code_errors(logits: Array, codes: Array) -> dict[str, Array]:
    """`errors`, the cross-entropy of each patch, and `right`, 1 where the best code is the code.

    Args:
      logits: float32 [B, M, V]; codes: int32 [B, M].

    Source: arXiv 2106.08254 (BEiT), equation 2.
    """
    log_probabilities = jax.nn.log_softmax(logits)
    errors = -jnp.take_along_axis(log_probabilities, codes[..., None], axis=-1)[..., 0]
    return {"errors": errors, "right": (jnp.argmax(logits, -1) == codes).astype(jnp.float32)}


def rank_loss(predicted: Array, errors: Array) -> Array:
    """How well the order of the patches of a picture is told: binary cross-entropy over pairs.

    For two hidden patches i, j of one picture whose errors differ, sigmoid(p_i - p_j) is the
    predicted probability that i is the harder one; the loss is the mean over all such pairs.

    Args:
      predicted: float32 [B, M], `losses` of the decoder; errors: [B, M], not differentiated.

    Source: arXiv 2304.05919 (HPM), equation 5.
    """
    errors = jax.lax.stop_gradient(errors)
    harder = errors[:, :, None] > errors[:, None, :]  # (i, j): each pair once, the harder one first
    apart = predicted[:, :, None] - predicted[:, None, :]
    lost = jnp.where(harder, jax.nn.softplus(-apart), 0.0)
    return jnp.sum(lost) / jnp.maximum(jnp.sum(harder), 1)
