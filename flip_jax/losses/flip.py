"""THE loss of a training step: its parts, each times its weight in `LossWeights`."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from flip_jax.config import Config
from flip_jax.losses.caption import next_word_losses
from flip_jax.losses.itc_sharded import sharded_itc_loss
from flip_jax.losses.itm import itm_logits, itm_loss, sample_hard_negatives
from flip_jax.losses.mim import mim_part
from flip_jax.losses.sigmoid import sharded_sigmoid_loss
from flip_jax.models import flip
from flip_jax.models.visual_tokenizer import VisualTokenizer
from flip_jax.parts import in_parts

Array = jax.Array
Pair = dict[str, Array]  # "image" and "text", of equal shapes


def flip_loss(
    params: flip.Params,
    momentum: flip.Params,
    queue: dict[str, Array],
    batch: dict[str, Array],
    alpha: Array | float,
    key: Array | None,
    *,
    cfg: Config,
    graphdef: nnx.GraphDef,
    mesh: Mesh | None = None,
    negatives: Pair | None = None,
    tokenizer: VisualTokenizer | None = None,
    hard_share: Array | float = 0.0,
) -> tuple[Array, dict[str, Any]]:
    """Contrastive loss (ITC or sigmoid) + ITM + MIM + captions.

    Args:
      params, momentum: online parameters and twins, the twins already updated.
      queue: before this batch is added. Like the twins it is empty without ITC.
      batch: image uint8 [B, H, W, 3] (or float32, normalised), token_ids int32 [B, S],
        token_mask bool [B, S], group int32 [B]; part_ids, part_mask [B, S] if the contrastive loss
        reads another text than ITM; regions, see `mim_part`.
      alpha: weight of the momentum targets.
      key: dropout, patch masking, negatives and hidden patches; None = deterministic, then
        `negatives` is needed and MIM is not possible.
      mesh: has the rows of the batch on all of its devices; None = one device.
      negatives: {"image", "text": int32 [B]} instead of drawn ones.
      tokenizer, hard_share: of MIM, see `mim_part`.

    Returns:
      (loss, {"metrics": scalars; "twin_embeds": for the queue, empty without ITC;
      "itm_logits": float32 [3B, 2] where ITM has a weight})
    """
    keys = [None] * 5 if key is None else jax.random.split(key, 5)
    image, weights = batch["image"], cfg.loss.weights
    texts = batch["token_ids"], batch["token_mask"]
    compared = (batch["part_ids"], batch["part_mask"]) if "part_ids" in batch else texts
    model = nnx.merge(graphdef, params)

    def encode(keys, image, texts):
        if weights.itm or weights.caption:
            image_tokens, image_embed = model.encode_image(image, keys[0])
        else:
            image_tokens, image_embed = None, model.embed_image(image, keys[0])
        return image_tokens, {"image": image_embed, "text": model.embed_text(*texts, keys[1])}

    twin = nnx.merge(graphdef, flip.with_twins(params, momentum)) if momentum else None

    def encode_twin(key, image, texts):
        # As in the reference the twins run in train mode: their text dropout is active.
        return {"image": twin.embed_image(image), "text": twin.embed_text(*texts, key)}

    parts = cfg.optim.accum_steps
    # What no loss below reads is not in the compiled step.
    image_tokens, embeds = in_parts(encode, parts)(tuple(keys[:2]), image, compared)
    losses, metrics, twin_embeds = {}, {}, {}
    if twin is not None:
        twin_embeds = jax.lax.stop_gradient(in_parts(encode_twin, parts)(keys[2], image, compared))
    aux = {"twin_embeds": twin_embeds}
    if weights.contrastive:
        name = cfg.loss.contrastive
        metrics[f"loss_{name}"], metrics["same_group"] = _contrastive(
            embeds, twin_embeds, queue, batch["group"], params, alpha, cfg, mesh
        )
        losses[name] = weights.contrastive * metrics[f"loss_{name}"]
    if weights.itm:
        valid = {name: jnp.ones(len(image), bool) for name in embeds}
        if negatives is None:
            drawn = embeds["image"], embeds["text"], batch["group"], params["temperature"]
            negatives, valid = sample_hard_negatives(*drawn, keys[3], mesh)
        logits = itm_logits(
            model.match, *texts, image_tokens, negatives, keys[4], mesh=mesh, parts=parts
        )
        metrics["loss_itm"], metrics["itm_accuracy"] = itm_loss(logits, valid)
        metrics["itm_without_negative"] = jnp.sum(~valid["image"])
        losses["itm"] = weights.itm * metrics["loss_itm"]
        # In the reference's order: all pairs, all negative images, all negative texts.
        aux["itm_logits"] = logits.swapaxes(0, 1).reshape(-1, 2)
    if weights.mim:
        # Not one more of the keys above, so that the others do not depend on MIM.
        mim_key = jax.random.fold_in(key, len(keys))
        given = {"tokenizer": tokenizer, "hard_share": hard_share}
        mim, values = mim_part(model, twin, batch, mim_key, cfg, **given)
        metrics |= values
        losses["mim"] = weights.mim * mim
    if weights.caption:
        caption_key = None if key is None else jax.random.fold_in(key, len(keys) + 1)
        metrics["loss_caption"] = _caption(model, texts, image_tokens, caption_key, cfg)
        losses["caption"] = weights.caption * metrics["loss_caption"]

    metrics["loss"] = sum(losses.values())
    return metrics["loss"], aux | {"metrics": metrics}


def _contrastive(
    embeds: Pair,
    twin_embeds: Pair,
    queue: dict[str, Array],
    group: Array,
    params: flip.Params,
    alpha: Array | float,
    cfg: Config,
    mesh: Mesh | None,
) -> tuple[Array, Array]:
    """(loss, mean number of same-group candidates per row)."""
    temperature, same_group = params["temperature"], cfg.loss.same_group
    if cfg.loss.contrastive == "sigmoid":
        bias = params["logit_bias"]
        return sharded_sigmoid_loss(embeds, group, temperature, bias, same_group, mesh)
    local = cfg.loss.local_batch if cfg.loss.candidates == "local" else len(group)
    return sharded_itc_loss(
        embeds, twin_embeds, queue, group, temperature, alpha, same_group, local, mesh
    )


def _caption(
    model: flip.Flip,
    texts: tuple[Array, Array],
    image_tokens: Array,
    key: Array | None,
    cfg: Config,
) -> Array:
    """Mean over all words of the batch."""

    def tell(key, token_ids, token_mask, image_tokens):
        logits = model.caption_logits(token_ids, token_mask, image_tokens, key)
        return next_word_losses(logits, token_ids, token_mask, cfg.loss.caption_smoothing)

    losses, words = in_parts(tell, cfg.optim.accum_steps)(key, *texts, image_tokens)
    return jnp.sum(losses) / jnp.sum(words)
