"""A frozen encoder: what every downstream task starts from, trained or random of the same shape.

    backbone = Backbone.load("runs/demo")
    embed = backbone.embed_images(images)      # float32 [N, E]
    states = backbone.pooled_states(images)    # float32 [N, V, D]

Images are anything with a length whose slices are uint8 [n, S, S, 3], such as an array or
`Faces.images`; they are decoded while the devices work on the batch before. Rows are cut over all
devices of this process.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.config import Config, MeshConfig
from flip_jax.data.tokenizer import Tokenizer
from flip_jax.models import flip
from flip_jax.models.vit import VisionTransformer, pixels_of
from flip_jax.weights import params_digest, read_tokenizer, read_weights

Array = jax.Array


class Rows(Protocol):
    """Rows that are made when they are sliced."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> np.ndarray: ...


class Backbone:
    """Both towers, frozen. N rows, D vision width, E joint embedding, S text tokens.

    Attributes:
      cfg: the config of the run that the weights are from.
      params: nested dict of arrays, on the devices.
      graphdef: `nnx.merge(graphdef, params)` is the `Flip`.
      tokenizer: its vocabulary.
      origin: `name` (`trained` or `random`), `checkpoint`, `step`, `digest`: what a report says.
      blocks: the blocks, counted from 1, that `pooled_states` looks at before the last state.
      mesh: the devices of this process; batch_size: rows that run at once, a multiple of them.
    """

    def __init__(
        self,
        params: flip.Params,
        cfg: Config,
        tokenizer: Tokenizer,
        origin: dict[str, Any],
        *,
        batch_size: int = 64,
        dtype: str = "float32",
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={dtype!r}: must be 'float32' or 'bfloat16'")
        self.cfg, self.tokenizer, self.dtype = cfg, tokenizer, dtype
        self.origin = origin | {"digest": params_digest(params)}
        self.blocks = probe_blocks(cfg.model.vision.depth)
        self.graphdef = _graphdef(dataclasses.replace(cfg.model, dtype=dtype, remat="none"))
        self.mesh = partition.make_mesh(MeshConfig(), jax.local_devices())
        self.batch_size = -(-batch_size // self.mesh.size) * self.mesh.size
        self.params = jax.device_put(params, NamedSharding(self.mesh, P()))

    @classmethod
    def load(cls, path: Path | str, *, tokenizer: str | None = None, **options: Any) -> Backbone:
        """From a workdir, a checkpoint or an export, see `flip_jax.weights`.

        Args:
          tokenizer: the vocabulary, where the name in the config no longer leads to it.
          options: `batch_size`, rows that run at once; `dtype`, compute type.

        Raises:
          FileNotFoundError: nothing of the kind there.
          ValueError: only a part of a model, another version or vocabulary, or a bad option.
          OSError: stored data is damaged, or the vocabulary cannot be had.
        """
        path = Path(path)
        weights = read_weights(path)
        words = read_tokenizer(path, weights, tokenizer)
        origin = {"name": "trained", "checkpoint": str(path), "step": int(weights.meta["step"])}
        return cls(weights.params, weights.cfg, words, origin, **options)

    def random_twin(self, seed: int = 0) -> Backbone:
        """The same shape with fresh weights, as training starts from without `config.init`."""
        cfg = self.cfg
        params = jax.jit(flip.init_params, static_argnums=(0, 1))(
            cfg.model, cfg.loss.temperature, jax.random.key(seed)
        )
        origin = {"name": "random", "checkpoint": None, "step": 0, "seed": seed}
        options = {"batch_size": self.batch_size, "dtype": self.dtype}
        return Backbone(jax.device_get(params), cfg, self.tokenizer, origin, **options)

    @property
    def image_size(self) -> int:
        return self.cfg.model.vision.image_size

    @property
    def identity(self) -> dict[str, Any]:
        """What the outputs depend on, besides the rows."""
        return {"digest": self.origin["digest"], "dtype": self.dtype}

    def embed_images(self, images: Rows) -> np.ndarray:
        """Joint embeddings float32 [N, E], unit norm."""
        return self.map_rows(image_embedding, images)

    def embed_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Joint embeddings float32 [N, E], unit norm."""
        return self.map_rows(_embed_texts, *self.tokenizer(texts))

    def pooled_states(self, images: Rows) -> np.ndarray:
        """Float32 [N, V, D], see `pool_states`."""
        return self.map_rows(self.state_function(), images)

    def state_function(self, last_normed: bool = True) -> Callable[..., Array]:
        """The function of (model, images) behind `pooled_states`, for `stream_rows`."""
        return _state_function(self.blocks, last_normed)

    def image_tokens(self, images: Rows) -> np.ndarray:
        """Normed tokens [N, 1 + patches, D] in the compute dtype: what ITM looks at."""
        return self.map_rows(_image_tokens, images)

    def match(
        self, texts: Sequence[str], image_tokens: Rows, first_token: str = "enc"
    ) -> np.ndarray:
        """ITM logits float32 [N, 2] of text n against image n; class 1 = match.

        Args:
          texts: N captions; image_tokens: [N, 1 + patches, D].
          first_token: see `Flip.match`.
        """
        function = _match_enc if first_token == "enc" else _match_cls
        return self.map_rows(function, *self.tokenizer(texts), image_tokens)

    def map_rows(self, function: Callable[..., Any], *rows: Rows) -> Any:
        """`function(model, *batches)` over all rows: a tree of numpy arrays.

        Args:
          function: one row out per row in, no row's result depending on others. Compiled once per
            function, so give the same object again.
          rows: one or more of equal length, at least one row.

        Raises:
          ValueError: no row, or different lengths.
        """
        parts = list(self.stream_rows(function, *rows))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def stream_rows(self, function: Callable[..., Any], *rows: Rows) -> Iterator[Any]:
        """As `map_rows`, yielding the results batch by batch, in order."""

        def apply(*batch: Array) -> Any:
            return _apply(function, self.graphdef, self.params, *batch)

        yield from stream_batches(apply, self.mesh, self.batch_size, *rows)


def stream_batches(
    function: Callable[..., Any],
    mesh: jax.sharding.Mesh,
    batch_size: int,
    *rows: Rows,
    one_shape: bool = False,
) -> Iterator[Any]:
    """Yields `function(*batches)` as numpy trees, in order, rows cut over the devices of a mesh.

    The next batch is made while the devices work on the one before.

    Args:
      function: one row out per row in.
      batch_size: a multiple of the number of devices.
      rows: see `Backbone.map_rows`.
      one_shape: fill the last batch up to the size of the others, for functions that take long to
        compile; otherwise to a power of two.

    Raises:
      ValueError: no row, or different lengths.
    """
    total = len(rows[0])
    if not total or any(len(array) != total for array in rows):
        raise ValueError(
            f"rows of length {', '.join(str(len(array)) for array in rows)}: must be equal, "
            "and at least 1"
        )
    sharding = partition.batch_sharding(mesh)

    def load(start: int) -> tuple[list[np.ndarray], int]:
        batch = [np.asarray(array[start : start + batch_size]) for array in rows]
        count = len(batch[0])
        # Filled up, so few shapes are ever compiled.
        size = batch_size if one_shape else min(1 << (count - 1).bit_length(), batch_size)
        padding = -(-size // mesh.size) * mesh.size - count
        return [np.concatenate([b, np.repeat(b[-1:], padding, 0)]) for b in batch], count

    waiting = None
    with ThreadPoolExecutor(1) as pool:
        starts = range(0, total, batch_size)
        ahead = pool.submit(load, 0)
        for start in starts:
            batch, count = ahead.result()
            if start != starts[-1]:
                ahead = pool.submit(load, start + batch_size)
            result = function(*jax.device_put(batch, sharding))
            if waiting is not None:
                yield _on_host(*waiting)
            waiting = result, count
    yield _on_host(*waiting)


def probe_blocks(depth: int) -> tuple[int, ...]:
    """Blocks, counted from 1, whose raw outputs a probe looks at besides the last state.

    The official probe takes 4, 6 and 8 of 12 (models/fflip_celeba_recognition.py); towers of
    another depth the same thirds and half, without repetition: 8, 12, 16 of 24; 1, 2, 3 of 4.
    """
    wanted = {round(depth / 3), round(depth / 2), round(depth * 2 / 3)}
    return tuple(sorted(block for block in wanted if 1 <= block < depth))


def pool_states(
    vit: VisionTransformer, image: Array, blocks: tuple[int, ...], last_normed: bool = True
) -> Array:
    """Three vectors of each of some states of the image tower.

    Args:
      image: uint8 [B, H, W, 3], normalised here; or float32, normalised already.
      blocks: counted from 1; their raw outputs are states, and so is the last output.
      last_normed: the last state is after `post_norm`, as in the official probe; raw otherwise,
        as in facer's.

    Returns:
      float32 [B, V, D], V = 3 x states: of each the class token, mean and maximum over patches.
    """
    return pool_tokens(block_states(vit, image, blocks, last_normed))


def block_states(
    vit: VisionTransformer, image: Array, blocks: tuple[int, ...], last_normed: bool = True
) -> list[Array]:
    """The states of `pool_states` before pooling, float32 [B, 1 + patches, D] each."""
    tokens, outputs = vit(pixels_of(image), return_blocks=True)
    states = [outputs[block - 1] for block in blocks]
    states.append(tokens if last_normed else outputs[-1])
    return [state.astype(jnp.float32) for state in states]


def pool_tokens(states: list[Array]) -> Array:
    """Float32 [B, V, D], see `pool_states`."""
    vectors = []
    for state in states:
        patches = state[:, 1:]
        vectors += [state[:, 0], patches.mean(axis=1), patches.max(axis=1)]
    return jnp.stack(vectors, axis=1)


# Backbones of one shape share a graph, and with it what is compiled.
_graphdef = functools.cache(flip.build)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(
    function: Callable[..., Any], graphdef: nnx.GraphDef, params: flip.Params, *batch: Array
) -> Any:
    return function(nnx.merge(graphdef, params), *batch)


@functools.cache
def _state_function(blocks: tuple[int, ...], last_normed: bool) -> Callable[..., Array]:
    return lambda model, image: pool_states(model.vit, image, blocks, last_normed)


def image_embedding(model: flip.Flip, image: Array) -> Array:
    """Joint embeddings float32 [B, E], unit norm; a function for `Backbone.map_rows`."""
    return model.embed_image(image)


def _image_tokens(model: flip.Flip, image: Array) -> Array:
    return model.encode_image(image)[0]


def _embed_texts(model: flip.Flip, token_ids: Array, token_mask: Array) -> Array:
    return model.embed_text(token_ids, token_mask)


def _match_enc(model: flip.Flip, token_ids: Array, token_mask: Array, tokens: Array) -> Array:
    return model.match(token_ids, token_mask, tokens)


def _match_cls(model: flip.Flip, token_ids: Array, token_mask: Array, tokens: Array) -> Array:
    return model.match(token_ids, token_mask, tokens, first_token="cls")


def _on_host(result: Any, count: int) -> Any:
    return jax.tree.map(lambda array: np.asarray(array)[:count], result)
