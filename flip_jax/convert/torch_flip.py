"""The official FLIP state dict against our tree: names, layouts, both ways, bit for bit.

Source: key list of the official PyTorch checkpoint (`checkpoint_*.pth`, key `model`). Linear
weights are (out, in) there and [in, out] here; the patch convolution (out, rgb, y, x) there is
[(y, x, rgb), out] here; blocks are separate there and stacked on a leading layer axis here; the
queues are (E, Q) there and [Q, E] here. The keys' order is the official one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from flip_jax.config import ModelConfig
from flip_jax.models import flip
from flip_jax.named_arrays import named_leaves, nested

_VISION, _TEXT = "visual_encoder", "text_encoder"
QUEUE_NAMES = ("image_queue", "text_queue", "idx_queue", "ptr_queue")
_VISION_BLOCK = {
    "self_attn.k_proj": "attn/key",
    "self_attn.v_proj": "attn/value",
    "self_attn.q_proj": "attn/query",
    "self_attn.out_proj": "attn/out",
    "layer_norm1": "ln_attn",
    "mlp.fc1": "mlp/up",
    "mlp.fc2": "mlp/down",
    "layer_norm2": "ln_mlp",
}
_TEXT_BLOCK = {
    "attention.self.query": "attn/query",
    "attention.self.key": "attn/key",
    "attention.self.value": "attn/value",
    "attention.output.dense": "attn/out",
    "attention.output.LayerNorm": "ln_attn",
    "crossattention.self.query": "cross/query",
    "crossattention.self.key": "cross/key",
    "crossattention.self.value": "cross/value",
    "crossattention.output.dense": "cross/out",
    "crossattention.output.LayerNorm": "ln_cross",
    "intermediate.dense": "mlp/up",
    "output.dense": "mlp/down",
    "output.LayerNorm": "ln_mlp",
}


@dataclass(frozen=True)
class Entry:
    """One official tensor and its place in our tree."""

    official: str  # without the `_m` of a momentum twin
    path: str  # our path, `/` between names
    layer: int | None = None  # index on the layer axis
    layout: str = "same"  # same | linear | patch

    def official_name(self, twin: bool) -> str:
        if not twin:
            return self.official
        module, _, rest = self.official.partition(".")
        return f"{module}_m.{rest}"


def _module(official: str, path: str, layer: int | None = None) -> Iterator[Entry]:
    """weight and bias of a Linear or a LayerNorm."""
    is_norm = "norm" in official.lower()
    weight = "scale" if is_norm else "kernel"
    layout = "same" if is_norm else "linear"
    yield Entry(f"{official}.weight", f"{path}/{weight}", layer, layout)
    yield Entry(f"{official}.bias", f"{path}/bias", layer)


def _vision(cfg: ModelConfig) -> Iterator[Entry]:
    root = f"{_VISION}.vision_model"
    yield Entry(f"{root}.embeddings.class_embedding", "vit/class_embed")
    yield Entry(
        f"{root}.embeddings.patch_embedding.weight", "vit/patch_embed/kernel", layout="patch"
    )
    yield Entry(f"{root}.embeddings.position_embedding.weight", "vit/position_embed")
    yield from _module(f"{root}.pre_layrnorm", "vit/pre_norm")
    for layer in range(cfg.vision.depth):
        for name, path in _VISION_BLOCK.items():
            yield from _module(f"{root}.encoder.layers.{layer}.{name}", f"vit/blocks/{path}", layer)
    yield from _module(f"{root}.post_layrnorm", "vit/post_norm")


def _text(cfg: ModelConfig) -> Iterator[Entry]:
    yield Entry(f"{_TEXT}.embeddings.word_embeddings.weight", "bert/word_embed")
    yield Entry(f"{_TEXT}.embeddings.position_embeddings.weight", "bert/position_embed")
    yield from _module(f"{_TEXT}.embeddings.LayerNorm", "bert/ln_embed")
    for layer in range(cfg.text.depth):
        for name, path in _TEXT_BLOCK.items():
            yield from _module(
                f"{_TEXT}.encoder.layer.{layer}.{name}", f"bert/blocks/{path}", layer
            )


def entries(cfg: ModelConfig, *, twin: bool = False) -> list[Entry]:
    """Every trained tensor in the official order; `twin` = those of the momentum copies."""
    found = [] if twin else [Entry("temp", "temperature")]
    found += [*_vision(cfg), *_text(cfg)]
    found += [*_module("vision_proj", "image_proj"), *_module("text_proj", "text_proj")]
    return found if twin else [*found, *_module("itm_head", "itm_head")]


def _to_ours(value: np.ndarray, layout: str) -> np.ndarray:
    if layout == "linear":
        return value.T
    if layout == "patch":
        return value.transpose(2, 3, 1, 0).reshape(-1, len(value))
    return value


def _to_official(value: np.ndarray, layout: str) -> np.ndarray:
    if layout == "linear":
        return value.T
    if layout == "patch":
        side = int((len(value) // 3) ** 0.5)
        return value.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)
    return value


def official_shapes(cfg: ModelConfig, *, twin: bool = False) -> dict[str, tuple[int, ...]]:
    """Official name -> official shape of every trained tensor, in the official order."""
    ours = named_leaves(jax.eval_shape(lambda: flip.init_params(cfg, 0.07, jax.random.key(0))))

    def shape(entry: Entry) -> tuple[int, ...]:
        own = ours[entry.path].shape
        view = np.broadcast_to(np.int8(0), own if entry.layer is None else own[1:])
        return _to_official(view, entry.layout).shape

    return {entry.official_name(twin): shape(entry) for entry in entries(cfg, twin=twin)}


def tree_from_official(
    state: Mapping[str, np.ndarray], wanted: list[Entry], *, twin: bool = False
) -> dict:
    """Our nested dict of the `wanted` entries from an official state dict.

    Raises:
      KeyError: listing every official name that is missing.
    """
    missing = [n for e in wanted if (n := e.official_name(twin)) not in state]
    if missing:
        raise KeyError(f"official state dict lacks {len(missing)} tensors: {', '.join(missing)}")
    leaves: dict[str, list[np.ndarray]] = {}
    for entry in wanted:
        value = _to_ours(np.asarray(state[entry.official_name(twin)]), entry.layout)
        leaves.setdefault(entry.path, []).append(value)
    stacked = {e.path for e in wanted if e.layer is not None}
    return nested(
        {
            path: np.stack(leaves[path])
            if path in stacked
            else np.array(leaves[path][0], order="C")
            for path in list(leaves)
        }
    )


def params_from_official(
    state: Mapping[str, np.ndarray], cfg: ModelConfig, *, twin: bool = False
) -> dict:
    """Our nested dict of (online or twin) parameters from an official state dict.

    Args:
      state: official names -> arrays; other keys are left alone.
      cfg: the sizes; decides which keys are read.

    Raises:
      KeyError: listing every official name that is missing.
    """
    return tree_from_official(state, entries(cfg, twin=twin), twin=twin)


def params_to_official(
    params: Mapping, cfg: ModelConfig, *, twin: bool = False, wanted: list[Entry] | None = None
) -> dict:
    """The inverse of `params_from_official`: official names -> numpy arrays, official order.

    `wanted`: None = all entries.
    """
    state = {}
    for entry in entries(cfg, twin=twin) if wanted is None else wanted:
        value = params
        for name in entry.path.split("/"):
            value = value[name]
        # The whole stack first: to cut a layer out of it on the device takes milliseconds.
        value = np.asarray(value)
        if entry.layer is not None:
            value = value[entry.layer]
        # Not np.ascontiguousarray: it gives the 0-dim temperature one dimension.
        state[entry.official_name(twin)] = np.asarray(_to_official(value, entry.layout), order="C")
    return state


def queue_from_official(state: Mapping[str, np.ndarray]) -> dict:
    """Our queue from `image_queue`, `text_queue` (E, Q), `idx_queue` (1, Q), `ptr_queue` (1,)."""
    return {
        "image": np.ascontiguousarray(np.asarray(state["image_queue"]).T),
        "text": np.ascontiguousarray(np.asarray(state["text_queue"]).T),
        "group": np.asarray(state["idx_queue"])[0].astype(np.int32),
        "pointer": np.asarray(state["ptr_queue"][0], np.int32),
    }


def queue_to_official(queue: dict) -> dict:
    """The inverse of `queue_from_official`."""
    return {
        "image_queue": np.ascontiguousarray(np.asarray(queue["image"]).T),
        "text_queue": np.ascontiguousarray(np.asarray(queue["text"]).T),
        "idx_queue": np.asarray(queue["group"], np.int64)[None],
        "ptr_queue": np.asarray(queue["pointer"], np.int64)[None],
    }


def state_to_official(params: dict, twins: dict, queue: dict, cfg: ModelConfig) -> dict:
    """The whole official state dict: names, order, layouts, dtypes, `position_ids` included."""
    state = params_to_official(params, cfg)
    ordered = {"temp": state.pop("temp")} | queue_to_official(queue)
    ordered |= state | params_to_official(twins, cfg, twin=True)
    ids = position_ids(cfg)
    return {
        name: value
        for key, tensor in ordered.items()
        for name, value in _with_position_ids(key, tensor, ids)
    }


def position_ids(cfg: ModelConfig) -> dict[str, np.ndarray]:
    """The constant int64 buffers (1, n) of the four towers: 0 .. n-1."""
    lengths = {
        f"{_VISION}{{}}.vision_model.embeddings.position_ids": cfg.vision.patches + 1,
        f"{_TEXT}{{}}.embeddings.position_ids": cfg.text.positions,
    }
    return {
        name.format(suffix): np.arange(length, dtype=np.int64)[None]
        for suffix in ("", "_m")
        for name, length in lengths.items()
    }


def _with_position_ids(
    key: str, tensor: np.ndarray, ids: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """`key` and, where torch puts it, its embedding's `position_ids`.

    A module's own tensors come before those of its children: after `class_embedding`, which is
    the image embedding's own, and before `word_embeddings`, the text embedding's first child.
    """
    module, _, leaf = key.partition("embeddings.")
    name = f"{module}embeddings.position_ids"
    if leaf == "word_embeddings.weight":
        yield name, ids[name]
    yield key, tensor
    if leaf == "class_embedding":
        yield name, ids[name]
