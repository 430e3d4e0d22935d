"""Training an attribute head on cached states: whole epochs on the device, one program.

Source of the recipe: celeba_recognition.py of the official FLIP, AdamW with decay on everything
and a cosine over epochs. Departures: several learning rates are trained side by side, and epoch
and rate are chosen on the validation split.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flip_jax.downstream.attribute_head import Head, head_logits, init_head, label_loss

Array = jax.Array

_EVAL_ROWS = 1024  # rows of an evaluation at a time


@dataclass(frozen=True)
class Recipe:
    """How a head is trained."""

    kind: str
    epochs: int
    batch_size: int
    weight_decay: float


@dataclass(frozen=True)
class TrainedHead:
    """The head that did best on validation, and how the training went. Accuracies in percent.

    Attributes:
      head: its arrays.
      rate, epoch: the learning rate and the epoch, counted from 1, that it is of.
      val_accuracy: float [E] of that rate, mean over attributes, of each over its known labels.
      test_accuracy: float [E] of that rate.
      best_on_test: the highest test accuracy of any rate and epoch: chosen on the test set, so no
        result, but what published tables print.
    """

    head: Head
    rate: float
    epoch: int
    val_accuracy: np.ndarray
    test_accuracy: np.ndarray
    best_on_test: float


def train_head(
    recipe: Recipe,
    rates: tuple[float, ...],
    train: tuple[np.ndarray, np.ndarray],
    val: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    seed: int,
) -> TrainedHead:
    """Trains one head per learning rate and keeps the best on validation.

    Args:
      train, val, test: (normalised states [N, V, D], labels int8 [N, labels]). `test` is only
        looked at.
      seed: of start values and order.

    Raises:
      FloatingPointError: every rate diverges.
    """
    size = min(recipe.batch_size, len(train[0]))
    arrays = jax.tree.map(jnp.asarray, (train, val, test))
    found = _train(recipe, size, jnp.asarray(rates, jnp.float32), *arrays, jax.random.key(seed))
    heads, val_accuracy, test_accuracy = jax.device_get(found)
    best = int(val_accuracy.max(axis=1).argmax())
    if val_accuracy[best].max() < 0:
        raise FloatingPointError(
            f"settings.rates={rates}: no head of finite values came of them; try lower ones"
        )
    return TrainedHead(
        head=jax.tree.map(lambda array: array[best], heads),
        rate=rates[best],
        epoch=int(val_accuracy[best].argmax()) + 1,
        val_accuracy=np.maximum(val_accuracy[best], 0),
        test_accuracy=np.maximum(test_accuracy[best], 0),
        best_on_test=float(test_accuracy.max()),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    recipe: Recipe,
    batch_size: int,
    rates: Array,
    train: tuple[Array, Array],
    val: tuple[Array, Array],
    test: tuple[Array, Array],
    key: Array,
) -> tuple[Head, Array, Array]:
    """Heads [R, ...] at their best epoch, accuracies [R, E] on validation and test; accuracies are
    -1 where a head has values that are not numbers."""
    states, labels = train
    steps = len(states) // batch_size
    adam = optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(recipe.weight_decay))

    def loss(head: Head, rows: Array) -> Array:
        return label_loss(head_logits(recipe.kind, head, states[rows]), labels[rows])

    def one(rate: Array) -> tuple[Head, Array, Array]:
        def epoch(carry, number):
            head, moments, best, best_accuracy = carry
            share = 0.5 * (1.0 + jnp.cos(jnp.pi * number / recipe.epochs))
            order = jax.random.permutation(jax.random.fold_in(key, number), len(states))

            def step(carry, rows):
                head, moments = carry
                updates, moments = adam.update(jax.grad(loss)(head, rows), moments, head)
                head = jax.tree.map(lambda p, u: p - rate * share * u, head, updates)
                return (head, moments), None

            rows = order[: steps * batch_size].reshape(steps, batch_size)
            (head, moments), _ = jax.lax.scan(step, (head, moments), rows)
            # Where a rate is too high: what is not a number says "no" of everything, which may be
            # right more often than not.
            finite = jnp.all(jnp.array([jnp.isfinite(p).all() for p in jax.tree.leaves(head)]))
            on_val, on_test = (
                jnp.where(finite, _accuracy(recipe.kind, head, *data), -1.0) for data in (val, test)
            )
            better = finite & (on_val > best_accuracy)
            best = jax.tree.map(lambda new, old: jnp.where(better, new, old), head, best)
            carry = head, moments, best, jnp.maximum(on_val, best_accuracy)
            return carry, (on_val, on_test)

        start = init_head(
            recipe.kind, *states.shape[1:], labels.shape[1], jax.random.fold_in(key, recipe.epochs)
        )
        carry = start, adam.init(start), start, jnp.float32(-1.0)
        (_, _, best, _), (on_val, on_test) = jax.lax.scan(epoch, carry, jnp.arange(recipe.epochs))
        return best, on_val, on_test

    return jax.vmap(one)(rates)


def _accuracy(kind: str, head: Head, states: Array, labels: Array) -> Array:
    """Mean over the attributes of which a label is known, in percent."""

    def right(row: tuple[Array, Array]) -> tuple[Array, Array]:
        states, labels = row
        present = head_logits(kind, head, states[None])[0] > 0
        known = labels >= 0
        return known & (present == (labels == 1)), known

    found = jax.lax.map(right, (states, labels), batch_size=_EVAL_ROWS)
    hits, known = (jnp.sum(one, axis=0) for one in found)
    # Weights are 1 where all labels are known: a sum of whole numbers, in which epochs can tie.
    most = jnp.maximum(jnp.max(known), 1)
    weights = jnp.where(known > 0, most / jnp.maximum(known, 1), 0.0)
    return 100.0 * jnp.sum(hits * weights) / (most * jnp.maximum(jnp.sum(known > 0), 1))
