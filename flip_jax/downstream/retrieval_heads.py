"""Training projections, ITM head and temperature over frozen towers.

Source: celeba_caption_retrieval.py, celeba_dialog_retrieval.py and their models in the official
FLIP; arXiv 2407.08515, table 1. The losses are those of pretraining; what differs from the official
scripts, and why, is in docs/downstream.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flip_jax import partition
from flip_jax.config import Config, LossConfig
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.retrieval import Retrieval
from flip_jax.downstream.retrieval_features import (
    Heads,
    TrainPairs,
    heads_of,
    linear,
)
from flip_jax.losses.itc_sharded import sharded_itc_loss
from flip_jax.losses.itm import itm_loss, sample_hard_negatives
from flip_jax.models import flip
from flip_jax.optim import learning_rate, make_optimizer, target_alpha

Array = jax.Array


class HeadState(TypedDict):
    """What goes from step to step; arrays only."""

    step: Array
    heads: Heads
    twin: Heads  # momentum projections; a frozen tower is its own twin
    opt_state: optax.OptState
    queue: dict[str, Array]


@dataclass(frozen=True)
class TrainedHeads:
    """The heads that did best on validation, and how it went. Recalls in percent.

    Attributes:
      heads: arrays on the host.
      epoch: that they are of, from 1.
      val_recall: float [epochs], mean recall of the final order.
      test_recall: float [epochs]; its maximum is chosen on the test split, so no result, but what
        published tables print.
      losses: float [epochs, 2], mean ITC and ITM loss.
    """

    heads: Heads
    epoch: int
    val_recall: np.ndarray
    test_recall: np.ndarray
    losses: np.ndarray


def train_heads(
    cfg: Config,
    backbone: Backbone,
    pairs: TrainPairs,
    rank_val: Callable[[Heads], Retrieval],
    rank_test: Callable[[Heads], Retrieval],
    log: Callable[[str], None] = print,
) -> TrainedHeads:
    """Trains for `cfg.epochs` and keeps the epoch that is best on validation.

    Args:
      cfg: `loss`, `optim`, `data.batch_size`, `epochs` and `seed` count.
      rank_val, rank_test: evaluate heads; `rank_test` decides nothing.
      log: is told of every epoch.

    Raises:
      ValueError: fewer pictures than a batch, or than two groups.
      FloatingPointError: a loss is not a number.
    """
    size, epochs = cfg.data.batch_size, int(cfg.epochs)
    steps = len(pairs) // size
    groups = len(np.unique(pairs.faces.groups))
    if not steps or groups < 2:
        raise ValueError(
            f"{len(pairs)} pictures of {groups} groups: a batch of {size} and two groups are needed"
        )
    step = make_step(cfg, backbone, steps)
    state = init_state(cfg, heads_of(backbone), steps)
    kept, recalls, losses = [], [], []
    for epoch in range(epochs):
        seen = []
        for batch in _batches(pairs, size, cfg.seed, epoch):
            placed = jax.device_put(batch, partition.batch_sharding(backbone.mesh))
            state, metrics = step(backbone.params, state, placed)
            seen.append(metrics)
        losses.append(np.mean(jax.device_get(seen), axis=0))
        if not np.isfinite(losses[-1]).all():
            raise FloatingPointError(
                f"epoch {epoch + 1}: a loss is not a number; settings.lr={cfg.optim.lr:g} may be "
                "too high"
            )
        kept.append(jax.device_get(state["heads"]))
        recalls.append([mean_recall(rank(kept[-1])) for rank in (rank_val, rank_test)])
        log(
            f"epoch {epoch + 1}/{epochs}: ITC {losses[-1][0]:.4f}, ITM {losses[-1][1]:.4f}, mean "
            f"recall on validation {recalls[-1][0]:.2f} %"
        )
    val_recall, test_recall = np.array(recalls).T
    best = int(val_recall.argmax())
    return TrainedHeads(kept[best], best + 1, val_recall, test_recall, np.array(losses))


def mean_recall(found: Retrieval) -> float:
    """Mean of R@1, R@5 and R@10 in both directions, final order, percent."""
    return found.metrics()["mean_recall"]


def init_state(cfg: Config, heads: Heads, steps: int) -> HeadState:
    """Args: steps: of an epoch."""
    heads = jax.tree.map(jnp.array, heads)  # copies: a step gives its state's buffers away
    tx = make_optimizer(cfg.optim, learning_rate(cfg.optim, steps, int(cfg.epochs) * steps))
    width = heads["image_proj"]["bias"].shape[0]
    return HeadState(
        step=jnp.zeros((), jnp.int32),
        heads=heads,
        twin=jax.tree.map(jnp.copy, flip.twin_params(heads)),
        opt_state=tx.init(heads),
        queue=flip.init_queue(cfg.loss.queue_size, width, jax.random.key(cfg.seed)),
    )


def make_step(
    cfg: Config, backbone: Backbone, steps: int
) -> Callable[[Any, HeadState, dict[str, Array]], tuple[HeadState, Array]]:
    """(params, state, batch) -> (state, [ITC, ITM loss]), jitted; the order is that of pretraining.

    Of the towers only two fused passes per pair are left to do, for the negatives: their gradient
    ends at the heads.

    Args:
      steps: of an epoch.
    """
    graphdef = backbone.graphdef
    rate = learning_rate(cfg.optim, steps, int(cfg.epochs) * steps)
    tx, alpha = make_optimizer(cfg.optim, rate), target_alpha(cfg, steps)

    def step(params: Any, state: HeadState, batch: dict[str, Array]) -> tuple[HeadState, Array]:
        number = state["step"]
        heads = state["heads"] | {"temperature": _clipped(cfg.loss, state["heads"]["temperature"])}
        twin = flip.update_twin(state["twin"], heads, cfg.loss.momentum)
        twin_embeds = _embeds(twin, batch)
        embeds = _embeds(heads, batch)
        key = jax.random.fold_in(jax.random.key(cfg.seed), number)
        negatives, valid = sample_hard_negatives(
            embeds["image"], embeds["text"], batch["group"], heads["temperature"], key
        )
        fused = jax.lax.stop_gradient(_fused_three(nnx.merge(graphdef, params), batch, negatives))

        def loss_of(heads: Heads) -> tuple[Array, Array]:
            itc, _ = sharded_itc_loss(
                _embeds(heads, batch),
                twin_embeds,
                state["queue"],
                batch["group"],
                heads["temperature"],
                alpha(number),
                cfg.loss.same_group,
                len(batch["group"]),
                None,
            )
            itm, _ = itm_loss(linear(heads["itm_head"], fused), valid)
            return itc + itm, jnp.stack([itc, itm])

        grads, losses = jax.grad(loss_of, has_aux=True)(heads)
        updates, opt_state = tx.update(grads, state["opt_state"], heads)
        new = HeadState(
            step=number + 1,
            heads=optax.apply_updates(heads, updates),
            twin=twin,
            opt_state=opt_state,
            queue=flip.enqueue(
                state["queue"], twin_embeds["image"], twin_embeds["text"], batch["group"]
            ),
        )
        return new, losses

    return jax.jit(step, donate_argnums=1)


def _clipped(loss: LossConfig, temperature: Array) -> Array:
    return jnp.clip(temperature, loss.temperature_min, loss.temperature_max)


def _embeds(heads: Heads, batch: dict[str, Array]) -> dict[str, Array]:
    return {
        name: flip.unit_norm(linear(heads[f"{name}_proj"], batch[f"{name}_class"]))
        for name in ("image", "text")
    }


def _fused_three(model: flip.Flip, batch: dict[str, Array], negatives: dict[str, Array]) -> Array:
    """First tokens float32 [B, 3, Dt] in the order of `flip_jax.losses.itm.itm_logits`: the pair,
    the text with another picture, the picture with another text."""
    tokens, _ = model.encode_image(batch["image"])
    own = jnp.arange(len(tokens), dtype=jnp.int32)
    other = negatives["text"]
    fused = model.fuse(
        *(jnp.concatenate([batch[n], batch[n][other]]) for n in ("token_ids", "token_mask")),
        tokens,
        jnp.concatenate([negatives["image"], own]),
    )
    return jnp.stack([batch["fused"], *jnp.split(fused, 2)], axis=1)


def _batches(
    pairs: TrainPairs, size: int, seed: int, epoch: int
) -> Iterator[dict[str, np.ndarray]]:
    """Every picture once, in an order of the epoch, with one of its captions; what is left of the
    last batch is dropped. One batch is made ahead."""
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(pairs))[: len(pairs) // size * size].reshape(-1, size)
    captions = rng.integers(pairs.counts[order])
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(pairs.batch, order[0], captions[0])
        for number in range(len(order)):
            batch = ahead.result()
            if number + 1 < len(order):
                ahead = pool.submit(pairs.batch, order[number + 1], captions[number + 1])
            yield batch
