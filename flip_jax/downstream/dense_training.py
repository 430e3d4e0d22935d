"""Training a dense head on an image tower, frozen or fine-tuned with it: parsing and alignment.

    net = DenseNet(backbone, output, size=448, channels=768, finetune=False)
    found = train_dense(net, recipe, batches, loss, score, seed=0)
    for maps in net.predict(found.arrays, squares): ...     # float32 [n, 4G, 4G, K]

Source: arXiv 2112.03109 (FaRL): AdamW, learning rates of their own for tower, neck, decoder and
output, x 0.1 after two thirds of the epochs, an average of the weights that is what is evaluated.
Departure: the epoch is chosen on validation, see docs/dense.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.config import MeshConfig
from flip_jax.downstream.backbone import Backbone, Rows, stream_batches
from flip_jax.downstream.dense_pictures import DenseBatches
from flip_jax.models.heads import DenseHead, dense_blocks, dense_features
from flip_jax.models.position_table import resize_position_table
from flip_jax.models.vit import VisionTransformer

Array = jax.Array
Batch = dict[str, Array]
Output = Callable[[int, nnx.Rngs], nnx.Module]  # (channels, rngs) -> see `DenseHead`
# (what the head says, float32 [B, ...]; the batch) -> scalar, a mean over the batch.
Loss = Callable[[Array, Batch], Array]
Predict = Callable[[Rows], Iterator[np.ndarray]]

PARTS = ("backbone", "neck", "decoder", "output")


@dataclass(frozen=True)
class DenseRecipe:
    """How a head is trained."""

    epochs: int
    batch_size: int
    # Learning rates of `PARTS`; that of the backbone counts where it is fine-tuned.
    rates: tuple[float, float, float, float] = (1e-4, 1e-3, 1e-3, 1e-3)
    weight_decay: float = 1e-5  # on everything
    decay_at: float = 2 / 3  # share of the epochs after which rates are a tenth
    average: float = 0.999  # of the weights; reached slowly, see `_average`
    evaluate_every: int = 1  # epochs; the last one is evaluated in any case


class DenseArrays(NamedTuple):
    """What training changes, as nested dicts.

    Attributes:
      params: `neck`, `decoder`, `output`; with fine-tuning `backbone`, too.
      stats: running statistics of BatchNorm.
    """

    params: dict[str, Any]
    stats: dict[str, Any]


@dataclass(frozen=True)
class TrainedDense:
    """What came of a training. Scores are as `score` gives them, higher is better.

    Attributes:
      arrays: averaged weights of the epoch that did best on validation, on the host.
      epoch: that epoch, counted from 1.
      epochs: int [E], those that were evaluated, the last one included.
      loss: float [E], mean over the steps since the one before.
      val, test: float [E].
    """

    arrays: DenseArrays
    epoch: int
    epochs: np.ndarray
    loss: np.ndarray
    val: np.ndarray
    test: np.ndarray

    @property
    def best_on_test(self) -> float:
        """Of any epoch: chosen on the test set, so no result, but what published tables print."""
        return float(self.test.max())


@dataclass(frozen=True)
class _Graph:
    """What of a net is compiled in: equal nets share it."""

    tower: nnx.GraphDef
    head: nnx.GraphDef
    blocks: tuple[int, ...]

    def __call__(
        self, tower: dict, arrays: DenseArrays, image: Array, train: bool, key: Array | None
    ) -> tuple[Array, dict]:
        """(what the head says, running statistics)"""
        params = dict(arrays.params)
        vit = nnx.merge(self.tower, params.pop("backbone", tower))
        head = nnx.merge(self.head, params, arrays.stats)
        out = head(dense_features(vit, image, self.blocks), train, key)
        return out, nnx.to_pure_dict(nnx.state(head, nnx.BatchStat))


class DenseNet:
    """An image tower at an input size of its own, and a head whose arrays it does not hold.

    Attributes:
      size: S, pixels of the input.
      backbone: where the tower is from.
      finetune: whether the tower is part of what is trained.
    """

    def __init__(
        self, backbone: Backbone, output: Output, *, size: int, channels: int, finetune: bool
    ):
        """Args:
        output: see `DenseHead`; give the same object again, what is compiled depends on it.
        size: a multiple of the patch size; the position table is resized to it.
        channels: C, width of the decoder.

        Raises:
          ValueError: a size that does not fit.
        """
        vision = backbone.cfg.model.vision
        if size % vision.patch_size or size < 2 * vision.patch_size:
            raise ValueError(
                f"settings.size={size}: must be a multiple of the patch size "
                f"{vision.patch_size}, and at least twice that"
            )
        if channels < 1:
            raise ValueError(f"settings.channels={channels}: must be at least 1")
        self.size, self.channels, self.backbone = size, channels, backbone
        self.finetune, self._output = finetune, output
        self._graph = _graph(vision, backbone.dtype, output, channels)
        tower = dict(jax.device_get(backbone.params["vit"]))
        side = size // vision.patch_size
        tower["position_embed"] = resize_position_table(tower["position_embed"], side)
        self._tower = tower

    def init(self, seed: int) -> DenseArrays:
        """Start values, on the host."""
        width = self.backbone.cfg.model.vision.width
        params, stats = _init(width, self.channels, self._output, jax.random.key(seed))
        if self.finetune:
            params["backbone"] = self._tower
        return jax.device_get(DenseArrays(params, stats))

    def predict(
        self, arrays: DenseArrays, squares: Rows, batch_size: int = 16
    ) -> Iterator[np.ndarray]:
        """What the head says of pictures: float32 [n, ...] batch by batch, in order.

        Args:
          squares: uint8 [N, S, S, 3], at least one, see `Backbone.map_rows`.
          batch_size: pictures that run at once.
        """
        # Not a whole batch for a picture or two.
        batch_size = min(batch_size, 1 << (len(squares) - 1).bit_length())
        mesh = self.mesh_of(batch_size)
        arrays = jax.device_put(arrays, NamedSharding(mesh, P()))
        tower = self.tower_on(mesh)
        apply = functools.partial(_say, self._graph, tower, arrays)
        yield from stream_batches(apply, mesh, batch_size, squares, one_shape=True)

    def mesh_of(self, batch_size: int) -> jax.sharding.Mesh:
        """As many devices of this process as divide a batch."""
        devices = jax.local_devices()
        count = max(n for n in range(1, len(devices) + 1) if batch_size % n == 0)
        return partition.make_mesh(MeshConfig(), devices[:count])

    def tower_on(self, mesh: jax.sharding.Mesh) -> dict[str, Any]:
        """The frozen tower's arrays on the devices; none where the tower is trained."""
        return {} if self.finetune else jax.device_put(self._tower, NamedSharding(mesh, P()))


def train_dense(
    net: DenseNet,
    recipe: DenseRecipe,
    batches: DenseBatches,
    loss: Loss,
    score: Callable[[Predict], tuple[float, float]],
    seed: int,
    log: Callable[[str], None] = print,
) -> TrainedDense:
    """Trains, evaluates averaged weights every so many epochs, keeps the best on validation.

    Args:
      batches: `image` uint8 [B, S, S, 3] and what `loss` needs.
      loss: give the same object again, what is compiled depends on it.
      score: (predict) -> scores on validation and test, where `predict(squares)` gives what the
        head says of pictures; higher is better.
      seed: of start values and dropout.
      log: is told of every evaluation.

    Raises:
      FloatingPointError: the training diverged.
      OSError, ValueError: a picture cannot be read.
    """
    mesh = net.mesh_of(batches.batch_size)
    start = net.init(seed)
    state = _State(start, start, _adam(recipe).init(start.params), jnp.int32(0))
    # Copies, because a step gives its input's memory to its output.
    state = jax.tree.map(jnp.copy, jax.device_put(state, NamedSharding(mesh, P())))
    tower, key, each = net.tower_on(mesh), jax.random.key(seed), batches.steps_per_epoch
    step = functools.partial(_step, net._graph, recipe, loss)
    best, best_epoch, rows, losses = start, 0, [], []
    for t, batch in enumerate(batches.stream(recipe.epochs * each)):
        epoch = t // each
        share = 1.0 if epoch < recipe.decay_at * recipe.epochs else 0.1
        placed = jax.device_put(batch, partition.batch_sharding(mesh))
        state, found = step(state, tower, placed, jnp.float32(share), key)
        losses.append(found)
        done = epoch + 1
        if (t + 1) % each or (done % recipe.evaluate_every and done != recipe.epochs):
            continue
        mean = float(np.mean(jax.device_get(losses)))
        if not np.isfinite(mean):
            raise FloatingPointError(
                f"settings.rates={recipe.rates}: the loss of epoch {done} is {mean}; try lower ones"
            )
        averaged = jax.device_get(state.averaged)
        val, test = score(functools.partial(net.predict, averaged, batch_size=batches.batch_size))
        if not rows or val > max(row[2] for row in rows):
            best, best_epoch = averaged, done
        rows.append((done, mean, val, test))
        losses = []
        log(f"epoch {done} of {recipe.epochs}: loss {mean:.4f}, val {val:.2f}, test {test:.2f}")
    epochs, loss_values, val, test = map(np.array, zip(*rows, strict=True))
    return TrainedDense(best, best_epoch, epochs, loss_values, val, test)


class _State(NamedTuple):
    arrays: DenseArrays
    averaged: DenseArrays
    moments: optax.OptState
    step: Array  # int32


def _adam(recipe: DenseRecipe) -> optax.GradientTransformation:
    return optax.chain(optax.scale_by_adam(), optax.add_decayed_weights(recipe.weight_decay))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _step(
    graph: _Graph,
    recipe: DenseRecipe,
    loss: Loss,
    state: _State,
    tower: dict[str, Any],
    batch: Batch,
    share: Array,
    key: Array,
) -> tuple[_State, Array]:
    """Args: share: of the learning rates."""
    arrays = state.arrays

    def objective(params: dict[str, Any]) -> tuple[Array, dict[str, Any]]:
        own = jax.random.fold_in(key, state.step)
        out, stats = graph(tower, DenseArrays(params, arrays.stats), batch["image"], True, own)
        return loss(out, batch), stats

    (value, stats), grads = jax.value_and_grad(objective, has_aux=True)(arrays.params)
    updates, moments = _adam(recipe).update(grads, state.moments, arrays.params)
    rates = dict(zip(PARTS, recipe.rates, strict=True))
    params = {
        part: jax.tree.map(lambda p, u, r=rates[part]: p - r * share * u, old, updates[part])
        for part, old in arrays.params.items()
    }
    new = DenseArrays(params, stats)
    averaged = _average(recipe.average, state.step, state.averaged, new)
    return _State(new, averaged, moments, state.step + 1), value


def _average(most: float, step: Array, averaged: DenseArrays, new: DenseArrays) -> DenseArrays:
    """Moving average of weights and statistics.

    0.999 looks back over a thousand steps, and a run of a few hundred would be evaluated mostly on
    its start values: the decay of step t is at most (1 + t) / (10 + t), about a ninth of the steps
    so far.
    """
    t = step.astype(jnp.float32)
    decay = jnp.minimum(most, (1 + t) / (10 + t))
    return jax.tree.map(lambda old, one: decay * old + (1 - decay) * one, averaged, new)


@functools.partial(jax.jit, static_argnums=0)
def _say(graph: _Graph, tower: dict[str, Any], arrays: DenseArrays, image: Array) -> Array:
    return graph(tower, arrays, image, False, None)[0]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _init(width: int, channels: int, output: Output, key: Array) -> tuple[dict, dict]:
    head = DenseHead(width, channels, output, nnx.Rngs(key))
    parts = nnx.split(head, nnx.Param, nnx.BatchStat)[1:]
    return tuple(nnx.to_pure_dict(part) for part in parts)


@functools.cache
def _graph(vision: Any, dtype: str, output: Output, channels: int) -> _Graph:
    def tower() -> VisionTransformer:
        kind = {"dtype": jnp.dtype(dtype), "remat": "none", "rngs": nnx.Rngs(0)}
        return VisionTransformer(dataclasses.replace(vision, keep_patches=None), **kind)

    head = nnx.eval_shape(lambda: DenseHead(vision.width, channels, output, nnx.Rngs(0)))
    return _Graph(
        nnx.split(nnx.eval_shape(tower))[0],
        nnx.split(head, nnx.Param, nnx.BatchStat)[0],
        dense_blocks(vision.depth),
    )
