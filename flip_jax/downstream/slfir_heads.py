"""The heads of SLFIR and their training: linear layers over frozen features.

Source: arXiv 2407.08515 (frozen encoders, a linear layer each on sketch, image and text;
image-sketch contrastive + ITC + ITM; its training code and settings are not published) and
ddw2AIGROUP2CQUPT/FVLP:models/model.py for queries of sketch and caption together. Departures:
docs/slfir.md.

Shapes: N pairs, K steps of each sketch, C captions, M draws of negatives, B rows of a batch, W
feature, Dt text width, E joint embedding.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flip_jax.downstream.slfir_features import Matches, PairFeatures
from flip_jax.losses.itc import itc_loss, similarity
from flip_jax.losses.itm import itm_loss
from flip_jax.models.flip import unit_norm

Array = jax.Array
# {"photo", "sketch": {"kernel": [W, E], "bias": [E]}, "text": {"kernel": [Dt, E], "bias": [E]},
# "match": {"kernel": [Dt, 2], "bias": [2]}, "temperature": scalar}, float32
Heads = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How heads are trained."""

    epochs: int
    batch_size: int
    weight_decay: float
    temperature_min: float
    temperature_max: float


@dataclass(frozen=True)
class TrainedHeads:
    """The heads that did best on validation, and how the training went.

    Attributes:
      heads: numpy arrays.
      rate, epoch: the learning rate and the epoch that they are of; 0 = as they started.
      val_score: float [epochs + 1] of that rate, see `train_heads`.
      losses: part -> float [epochs] of that rate.
    """

    heads: Heads
    rate: float
    epoch: int
    val_score: np.ndarray
    losses: dict[str, np.ndarray]


def project(layer: dict[str, Array], features: Array) -> Array:
    """Linear layer and unit norm: [..., W] of any float type -> float32 [..., E]."""
    return unit_norm(features.astype(jnp.float32) @ layer["kernel"] + layer["bias"])


def embed(heads: Heads, features: PairFeatures) -> dict[str, np.ndarray]:
    """Unit vectors, float32: photo [N, E], sketch [N, K, E], text [N, C, E]."""

    def rows(name: str, array: np.ndarray) -> np.ndarray:
        # In blocks: the sketches of a test split may take a gigabyte as they are stored.
        starts = range(0, len(array), _BLOCK)
        parts = [_project(heads[name], array[start : start + _BLOCK]) for start in starts]
        return np.concatenate([np.asarray(part) for part in parts])

    return {name: rows(name, getattr(features, name)) for name in ("photo", "sketch", "text")}


def together(sketch: Any, text: Any) -> Any:
    """The query of a sketch and a caption: the sum of both, unit norm; arrays [..., E]."""
    return unit_norm(sketch + text)


_project = jax.jit(project)
_BLOCK = 64


def train_heads(
    recipe: Recipe,
    rates: tuple[float, ...],
    start: Heads,
    train: PairFeatures,
    matches: Matches,
    val: PairFeatures,
    seed: int,
) -> TrainedHeads:
    """Trains one set of heads per learning rate and keeps the best on validation.

    The score is the mean of 1 / rank, in percent, over the validation pairs and the steps of their
    sketches, half by the sketch alone and half by sketch and caption together. What training starts
    from takes part.

    Args:
      start: the heads to start from.
      train, matches: of the training pairs, in the same order; val: one pair per person.
      seed: of the order and of the steps, captions and negatives drawn.

    Raises:
      FloatingPointError: a loss is not a number.
    """
    size = min(recipe.batch_size, len(train.photo))
    arrays = jax.tree.map(jnp.asarray, (start, vars(train), vars(matches), vars(val)))
    rate = jnp.asarray(rates, jnp.float32)
    heads, scores, losses = jax.device_get(
        _train(recipe, size, rate, *arrays, jax.random.key(seed))
    )
    broken = ~np.isfinite(losses["total"]).all(axis=1)
    if broken.any():
        worst = ", ".join(f"{rates[n]:g}" for n in np.flatnonzero(broken))
        raise FloatingPointError(f"a loss is not a number at the learning rate {worst}")
    best = int(scores.max(axis=1).argmax())
    return TrainedHeads(
        heads=jax.tree.map(lambda array: array[best], heads),
        rate=rates[best],
        epoch=int(scores[best].argmax()),
        val_score=scores[best],
        losses={name: values[best] for name, values in losses.items()},
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    recipe: Recipe,
    batch_size: int,
    rates: Array,
    start: Heads,
    train: dict[str, Array],
    matches: dict[str, Array],
    val: dict[str, Array],
    key: Array,
) -> tuple[Heads, Array, dict[str, Array]]:
    """Heads [R, ...] at their best epoch, scores [R, epochs + 1], mean losses [R, epochs]."""
    count = len(train["photo"])
    steps = count // batch_size
    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(recipe.weight_decay))

    def one(rate: Array) -> tuple[Heads, Array, dict[str, Array]]:
        def step(carry, item):
            heads, moments, share = carry
            rows, step_key = item
            batch = _draw_batch(train, matches, rows, step_key)
            grads, parts = jax.grad(_loss, has_aux=True)(heads, batch)
            updates, moments = adam.update(grads, moments, heads)
            heads = jax.tree.map(lambda p, u: p - rate * share * u, heads, updates)
            bounds = recipe.temperature_min, recipe.temperature_max
            heads["temperature"] = jnp.clip(heads["temperature"], *bounds)
            return (heads, moments, share), parts

        def epoch(carry, number):
            heads, moments, best, best_score = carry
            share = 0.5 * (1.0 + jnp.cos(jnp.pi * number / recipe.epochs))
            order_key, step_key = jax.random.split(jax.random.fold_in(key, number))
            order = jax.random.permutation(order_key, count)
            rows = order[: steps * batch_size].reshape(steps, batch_size)
            items = rows, jax.random.split(step_key, steps)
            (heads, moments, _), parts = jax.lax.scan(step, (heads, moments, share), items)
            score = _val_score(heads, val)
            better = score > best_score
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), heads, best)
            carry = heads, moments, best, jnp.maximum(score, best_score)
            return carry, (score, jax.tree.map(jnp.mean, parts))

        first = _val_score(start, val)
        carry = start, adam.init(start), start, first
        (_, _, best, _), (scores, losses) = jax.lax.scan(epoch, carry, jnp.arange(recipe.epochs))
        return best, jnp.concatenate([first[None], scores]), losses

    return jax.vmap(one)(rates)


def _draw_batch(
    train: dict[str, Array], matches: dict[str, Array], rows: Array, key: Array
) -> dict[str, Array]:
    """One step of the sketch, one caption and one draw of negatives for every row."""

    def pick(key: Array, array: Array) -> Array:
        return array[rows, jax.random.randint(key, rows.shape, 0, array.shape[1])]

    keys = jax.random.split(key, 3)
    return {
        "photo": train["photo"][rows],
        "sketch": pick(keys[0], train["sketch"]),
        "text": pick(keys[1], train["text"]),
        "fused": pick(keys[2], matches["fused"]),
        "valid": matches["valid"][rows],
        "group": train["group"][rows],
    }


def _loss(heads: Heads, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Sum of four losses: photo against sketch, caption and both; ITM. All weigh the same."""
    photo, sketch, text = (project(heads[n], batch[n]) for n in ("photo", "sketch", "text"))
    queries = {"sketch": sketch, "caption": text, "both": together(sketch, text)}
    parts = {
        name: contrastive_loss(photo, query, batch["group"], heads["temperature"])
        for name, query in queries.items()
    }
    logits = batch["fused"] @ heads["match"]["kernel"] + heads["match"]["bias"]
    parts["match"] = itm_loss(logits, {"image": batch["valid"], "text": batch["valid"]})[0]
    total = sum(parts.values())
    return total, parts | {"total": total}


def contrastive_loss(photo: Array, query: Array, group: Array, temperature: Array) -> Array:
    """`itc_loss` inside the batch: the encoders stand still, so it needs neither twins nor queue.

    Args:
      photo, query: float32 [B, E], unit norm; group: int32 [B], other pairs of the own group are
        no candidates; temperature: scalar.
    """
    embeds = {"image": photo, "text": query}
    none = jnp.zeros((0, photo.shape[1]), jnp.float32)
    queue = {"image": none, "text": none, "group": jnp.zeros(0, jnp.int32)}
    return itc_loss(embeds, embeds, queue, group, temperature, 0.0, same_group="ignore")[0]


def _val_score(heads: Heads, val: dict[str, Array]) -> Array:
    """See `train_heads`."""
    photo = project(heads["photo"], val["photo"])
    text = project(heads["text"], val["text"][:, 0])

    def one(row: tuple[Array, Array, Array]) -> Array:
        sketch, text, number = row
        sketch = project(heads["sketch"], sketch)
        cosines = similarity(jnp.stack([sketch, together(sketch, text)]), photo)
        own = jnp.take(cosines, number, axis=-1)[..., None]
        # Not `>=`: a cosine that is not a number counts against the heads, too.
        return jnp.mean(1.0 / jnp.sum(~(cosines < own), axis=-1))

    rows = val["sketch"], text, jnp.arange(len(photo))
    return 100.0 * jnp.mean(jax.lax.map(one, rows, batch_size=64))
