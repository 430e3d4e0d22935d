"""A checkpoint of someone else, brought under the official FLIP names.

A format says, as a table of slots, which of its tensors is which official one. From there on all
formats go the same way (`importer.py`).
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np

from flip_jax.config import LossConfig, ModelConfig, TextConfig, VisionConfig
from flip_jax.convert import torch_flip
from flip_jax.convert.check import Inputs, Outputs
from flip_jax.convert.conversion import ConversionError
from flip_jax.models import flip

Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Options:
    """What the user may choose when importing.

    Attributes:
      image_size: pixels of the result, square; None = as in the source.
      vision_heads, text_heads: None = what the source's config says, else width / 64.
      tokenizer: as `Tokenizer.load` takes it; None = the source's own, or bert-base-uncased.
      as_reference: treat CLIP and BERT weights as the official implementation did.
      allow_missing, allow_unexpected: globs over the source's names.
      seed: of values that the source does not have.
    """

    image_size: int | None = None
    vision_heads: int | None = None
    text_heads: int | None = None
    tokenizer: str | None = None
    as_reference: bool = False
    allow_missing: Sequence[str] = ()
    allow_unexpected: Sequence[str] = ()
    seed: int = 0


@dataclass(frozen=True)
class Slot:
    """Where an official tensor lies in the source: a whole tensor, or a third of its rows."""

    name: str
    third: int | None = None  # of OpenAI's fused query, key, value

    def take(self, tensors: Tensors) -> np.ndarray:
        value = tensors[self.name]
        if self.third is None:
            return value
        rows = len(value) // 3
        return value[self.third * rows : (self.third + 1) * rows]


@dataclass
class Foreign:
    """A source after reading.

    Attributes:
      state: official names -> arrays of the sizes of `model`; may be only a part of all names.
      model: the sizes; those of absent parts are the defaults.
      run: the source's own outputs on given inputs, by another implementation.
      tokens: number of token ids the source knows; None = it has no text tower.
      tokenizer: name of the vocabulary; None = it has no text tower.
      notes: what was done to the weights, for the user.
    """

    state: dict[str, np.ndarray]
    model: ModelConfig
    run: Callable[[Inputs], Outputs] | None
    tokens: int | None = None
    tokenizer: str | None = None
    notes: list[str] = field(default_factory=list)

    def release(self) -> None:
        """Gives back the memory of the tensors, a gigabyte and more at base size."""
        self.state, self.run = {}, None


def gather(
    tensors: Tensors,
    slots: Mapping[str, Slot],
    shapes: Mapping[str, tuple[int, ...]],
    options: Options,
    fresh: Callable[[str], np.ndarray],
    *,
    ignored: Iterable[str] = (),
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The official tensors out of the source.

    Args:
      slots, shapes: official name -> place in the source, expected shape.
      fresh: official name -> initial value, for what `options.allow_missing` lets pass.
      ignored: globs over source names that FLIP has no place for.

    Returns:
      (official name -> array, source name -> array of all that was used, fresh values included)

    Raises:
      ConversionError: listing every missing, unexpected and misshapen tensor by name.
    """
    problems: dict[str, dict[str, str]] = {"missing": {}, "misshapen": {}, "unexpected": {}}
    used = {slot.name for slot in slots.values()}
    for name in tensors:
        if name not in used and not _matches(name, (*ignored, *options.allow_unexpected)):
            problems["unexpected"][name] = name
    state, source, left_open = {}, {}, {}
    for official, slot in slots.items():
        value = slot.take(tensors) if slot.name in tensors else None
        if value is not None and value.shape == shapes[official]:
            state[official], source[slot.name] = value, tensors[slot.name]
        elif _matches(slot.name, options.allow_missing):
            state[official] = fresh(official)
            left_open.setdefault(slot.name, {})[slot.third or 0] = state[official]
        elif value is None:
            problems["missing"][slot.name] = slot.name
        else:
            text = f"{slot.name} {value.shape}, needed is {shapes[official]}"
            problems["misshapen"][slot.name] = text
    if any(problems.values()):
        lines = [
            f"  {len(texts)} {kind}: {', '.join(texts.values())}"
            for kind, texts in problems.items()
            if texts
        ]
        raise ConversionError(
            "the tensors do not fit:\n" + "\n".join(lines) + "\nWhat may be missing or misshapen "
            "(and then starts afresh) or unexpected (and is dropped) can be named with "
            "--allow-missing GLOB and --allow-unexpected GLOB"
        )
    for name, thirds in left_open.items():
        parts = [thirds[third] for third in sorted(thirds)]
        source[name] = np.concatenate(parts) if len(parts) > 1 else parts[0]
    return state, source


class InitialValues:
    """Official name -> the value a fresh model starts from; computed at the first call."""

    def __init__(self, model: ModelConfig, seed: int):
        self._model, self._seed = model, seed

    def __call__(self, official: str) -> np.ndarray:
        return self._state[official]

    @functools.cached_property
    def _state(self) -> dict[str, np.ndarray]:
        key = jax.random.key(self._seed)
        params = jax.jit(lambda: flip.init_params(self._model, LossConfig.temperature, key))()
        return torch_flip.params_to_official(params, self._model)


def vision_sizes(
    tensors: Tensors, *, patch: str, table: str, up: str, heads: int | None
) -> VisionConfig:
    """Sizes of an image tower from its tensors.

    Args:
      patch, table: names of the patch convolution and of the position table.
      up: name of the first MLP weight, with `{}` in place of the layer.
      heads: None = one per 64 of the width.

    Raises:
      ConversionError: one of them is missing, the patches are no square, or `heads` does not
        divide the width.
    """
    width, _, patch_size, columns = _shape(tensors, patch, 4)
    if patch_size != columns:
        raise ConversionError(f"{patch} has patches of {patch_size} x {columns}: no squares")
    rows = _shape(tensors, table, 2)[0]
    side = round((rows - 1) ** 0.5)
    if side * side != rows - 1:
        raise ConversionError(f"{table} has {rows} rows, which is not 1 + n*n: no square image")
    return VisionConfig(
        image_size=side * patch_size,
        patch_size=patch_size,
        width=width,
        depth=_layers(tensors, up),
        heads=_heads_of(width, heads, "--vision-heads"),
        mlp_width=_shape(tensors, up.format(0), 2)[0],
    )


def text_sizes(tensors: Tensors, *, prefix: str, heads: int | None) -> TextConfig:
    """Sizes of a text tower with BERT's names after `prefix`; see `vision_sizes`."""
    up = prefix + "encoder.layer.{}.intermediate.dense.weight"
    rows, width = _shape(tensors, f"{prefix}embeddings.word_embeddings.weight", 2)
    positions = _shape(tensors, f"{prefix}embeddings.position_embeddings.weight", 2)[0]
    return TextConfig(
        vocab_size=rows,
        max_length=min(TextConfig.max_length, positions),
        positions=positions,
        width=width,
        depth=_layers(tensors, up),
        heads=_heads_of(width, heads, "--text-heads"),
        mlp_width=_shape(tensors, up.format(0), 2)[0],
    )


def _shape(tensors: Tensors, name: str, dims: int) -> tuple[int, ...]:
    if name not in tensors:
        raise ConversionError(
            f"the source has no tensor {name}, from which a size is read; it has {len(tensors)} "
            f"tensors, such as {', '.join(sorted(tensors)[:5])}. Is it of the format given with "
            "--from?"
        )
    if tensors[name].ndim != dims:
        raise ConversionError(f"{name} has shape {tensors[name].shape}; {dims} dims are needed")
    return tensors[name].shape


def _layers(tensors: Tensors, up: str) -> int:
    pattern = re.compile(re.escape(up).replace(r"\{\}", r"(\d+)"))
    return 1 + max((int(m[1]) for name in tensors if (m := pattern.fullmatch(name))), default=0)


def _heads_of(width: int, heads: int | None, flag: str) -> int:
    if heads is not None:
        if heads < 1 or width % heads:
            raise ConversionError(f"{flag}={heads}: must divide the width of the tower, {width}")
        return heads
    if width % 64:
        raise ConversionError(
            f"the number of attention heads is not stored and the width {width} is no multiple of "
            f"64, the usual width of a head; give {flag}"
        )
    return width // 64


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)
