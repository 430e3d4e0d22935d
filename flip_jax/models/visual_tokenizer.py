"""Visual tokenizers: a picture -> a grid of codes, one for every 8 x 8 pixels of it.

`vq`: a convolutional VQ-VAE (arXiv 1711.00937), trained by `python -m flip_jax.visual_tokenizer`.
`dalle`: the encoder of DALL-E's dVAE (arXiv 2102.12092), whose weights come from others.
Everything is float32. Dims: B pictures, G x G codes, C width of a code, V codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.models.vit import PIXEL_MEAN, PIXEL_STD

Array = jax.Array

CELL = 8  # pixels per code, each way


@dataclass(frozen=True)
class TokenizerConfig:
    """Sizes of a tokenizer.

    Attributes:
      codes: V, size of the vocabulary.
      width: channels of the inner convolutions; of `dalle` those of its first group.
      blocks: residual blocks, at the grid of codes (`vq`) or in each of the four groups (`dalle`).
      code_width: C, of `vq`.
    """

    kind: Literal["vq", "dalle"] = "vq"
    codes: int = 1024
    width: int = 64
    blocks: int = 2
    code_width: int = 32


@functools.partial(jax.tree_util.register_dataclass, data_fields=["params"], meta_fields=["cfg"])
@dataclass(frozen=True)
class VisualTokenizer:
    """A frozen tokenizer; a pytree, so that its arrays go into a compiled step as arguments.

    Attributes:
      params: `encoder`, and `codebook` [V, C] of `vq`; nested dict of float32 arrays.
    """

    params: dict[str, Any]
    cfg: TokenizerConfig

    def codes(self, image: Array, grid: int) -> Array:
        """The codes of pictures, int32 [B, grid * grid], row-major.

        Args:
          image: uint8 [B, H, W, 3], or float32, normalised by `normalize_pixels`; square. It is
            resized to `grid * CELL` pixels, whatever its size.
        """
        pixels = unit_pixels(image, grid * CELL)
        if self.cfg.kind == "dalle":
            found = jnp.argmax(dalle_logits(self, pixels), axis=-1)
        else:
            found = nearest(vq_states(self, pixels), self.params["codebook"])
        return found.reshape(len(image), grid * grid).astype(jnp.int32)


def unit_pixels(image: Array, size: int) -> Array:
    """float32 [B, size, size, 3] in 0..1, resized bicubically with antialiasing, as Pillow does."""
    if image.dtype == jnp.uint8:
        image = image.astype(jnp.float32) / 255.0
    else:
        image = image.astype(jnp.float32) * PIXEL_STD + PIXEL_MEAN
    resized = jax.image.resize(
        image, (len(image), size, size, 3), "cubic", precision=jax.lax.Precision.HIGHEST
    )
    return jnp.clip(resized, 0.0, 1.0)


def nearest(states: Array, codebook: Array) -> Array:
    """Index of the code with the least distance to each state: [..., C], [V, C] -> int [...]."""
    products = jnp.matmul(states, codebook.T, precision=jax.lax.Precision.HIGHEST)
    return jnp.argmin(jnp.sum(codebook * codebook, axis=-1) - 2.0 * products, axis=-1)


def straight_through(states: Array, codebook: Array) -> tuple[Array, Array]:
    """The nearest codes' vectors [..., C], whose gradient goes to `states`; and the codes."""
    codes = nearest(jax.lax.stop_gradient(states), codebook)
    return states + jax.lax.stop_gradient(codebook[codes] - states), codes


def vq_states(tokenizer: VisualTokenizer, pixels: Array) -> Array:
    """What `vq` sees before its codebook: [B, S, S, 3] in 0..1 -> float32 [B, S/8, S/8, C]."""
    return _merge(VqEncoder, tokenizer.cfg, tokenizer.params["encoder"])(pixels)


def vq_pixels(tokenizer: VisualTokenizer, states: Array) -> Array:
    """Vectors of codes [B, G, G, C] -> pixels float32 [B, 8G, 8G, 3], about 0..1."""
    return _merge(VqDecoder, tokenizer.cfg, tokenizer.params["decoder"])(states)


def dalle_logits(tokenizer: VisualTokenizer, pixels: Array) -> Array:
    """[B, S, S, 3] in 0..1 -> float32 [B, S/8, S/8, V]."""
    return _merge(DalleEncoder, tokenizer.cfg, tokenizer.params["encoder"])(pixels)


def init_tokenizer(cfg: TokenizerConfig, key: Array) -> dict[str, Any]:
    """Fresh parameters: `encoder` and, of `vq`, `decoder`; a codebook starts from states."""
    if cfg.kind == "dalle":
        return {"encoder": _init(DalleEncoder, cfg, key)}
    encoder_key, decoder_key = jax.random.split(key)
    return {
        "encoder": _init(VqEncoder, cfg, encoder_key),
        "decoder": _init(VqDecoder, cfg, decoder_key),
    }


def _init(module: type[nnx.Module], cfg: TokenizerConfig, key: Array) -> dict[str, Any]:
    return nnx.to_pure_dict(nnx.state(module(cfg, nnx.Rngs(key))))


def _merge(module: type[nnx.Module], cfg: TokenizerConfig, params: dict[str, Any]) -> Any:
    graphdef = nnx.split(nnx.eval_shape(lambda: module(cfg, nnx.Rngs(0))))[0]
    return nnx.merge(graphdef, params)


def _conv(inner: int, out: int, size: int, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    return nnx.Conv(
        inner,
        out,
        (size, size),
        strides=stride,
        precision=jax.lax.Precision.HIGHEST,
        rngs=rngs,
    )


def _numbered(make: Callable[[int], nnx.Module], count: int) -> nnx.Dict:
    """Modules by number, from 1; names are text, as they are when read back from a file."""
    return nnx.Dict({f"n{number}": make(number) for number in range(1, count + 1)})


def _in_order(modules: nnx.Dict) -> list[nnx.Module]:
    return [modules[f"n{number}"] for number in range(1, len(modules) + 1)]


class _Residual(nnx.Module):
    """x + conv1(relu(conv3(relu(x))))."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.wide, self.narrow = _conv(width, width, 3, rngs), _conv(width, width, 1, rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.narrow(jax.nn.relu(self.wide(jax.nn.relu(x))))


class VqEncoder(nnx.Module):
    """Three convolutions of stride 2, residual blocks, a 1 x 1 convolution to the code's width."""

    def __init__(self, cfg: TokenizerConfig, rngs: nnx.Rngs):
        half, width = max(cfg.width // 2, 1), cfg.width
        self.first = _conv(3, half, 4, rngs, stride=2)
        self.second = _conv(half, width, 4, rngs, stride=2)
        self.third = _conv(width, width, 4, rngs, stride=2)
        self.blocks = _numbered(lambda _: _Residual(width, rngs), cfg.blocks)
        self.out = _conv(width, cfg.code_width, 1, rngs)

    def __call__(self, pixels: Array) -> Array:
        x = 2.0 * pixels - 1.0
        x = self.second(jax.nn.relu(self.first(x)))
        x = self.third(jax.nn.relu(x))
        for block in _in_order(self.blocks):
            x = block(x)
        return self.out(jax.nn.relu(x))


class VqDecoder(nnx.Module):
    """The encoder backwards; each doubling is a convolution to 4 times the channels, rearranged."""

    def __init__(self, cfg: TokenizerConfig, rngs: nnx.Rngs):
        half, width = max(cfg.width // 2, 1), cfg.width
        self.first = _conv(cfg.code_width, width, 3, rngs)
        self.blocks = _numbered(lambda _: _Residual(width, rngs), cfg.blocks)
        self.second = _conv(width, 4 * width, 1, rngs)
        self.third = _conv(width, 4 * half, 3, rngs)
        self.out = _conv(half, 4 * 3, 3, rngs)

    def __call__(self, states: Array) -> Array:
        x = self.first(states)
        for block in _in_order(self.blocks):
            x = block(x)
        x = _doubled(self.second(jax.nn.relu(x)))
        x = _doubled(self.third(jax.nn.relu(x)))
        return 0.5 * _doubled(self.out(jax.nn.relu(x))) + 0.5


def _doubled(x: Array) -> Array:
    """[B, H, W, 4 C] -> [B, 2H, 2W, C]."""
    rows, height, width, channels = x.shape
    x = x.reshape(rows, height, width, 2, 2, channels // 4).swapaxes(2, 3)
    return x.reshape(rows, 2 * height, 2 * width, channels // 4)


class DalleEncoder(nnx.Module):
    """A 7 x 7 convolution, four groups of residual blocks, three of them halved, 1 x 1 to logits.

    Source: arXiv 2102.12092; `FlavaImageCodebook` of `transformers`, the same network.
    """

    def __init__(self, cfg: TokenizerConfig, rngs: nnx.Rngs):
        widths = [cfg.width * factor for factor in (1, 1, 2, 4, 8)]
        gain = 1.0 / (4 * cfg.blocks) ** 2
        self.input = _conv(3, cfg.width, 7, rngs)

        def group(number: int) -> nnx.Dict:
            before, width = widths[number - 1 : number + 1]
            return _numbered(
                lambda block: _DalleBlock(before if block == 1 else width, width, gain, rngs),
                cfg.blocks,
            )

        self.groups = _numbered(group, 4)
        self.out = _conv(widths[-1], cfg.codes, 1, rngs)

    def __call__(self, pixels: Array) -> Array:
        x = self.input((1.0 - 2 * _LOGIT_LAPLACE) * pixels + _LOGIT_LAPLACE)
        for number, group in enumerate(_in_order(self.groups)):
            for block in _in_order(group):
                x = block(x)
            if number < 3:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
        return self.out(jax.nn.relu(x))


# DALL-E maps pixels from 0..1 to 0.1..0.9 (its appendix A.2).
_LOGIT_LAPLACE = 0.1


class _DalleBlock(nnx.Module):
    def __init__(self, before: int, width: int, gain: float, rngs: nnx.Rngs):
        self.gain, inner = gain, width // 4
        if before != width:
            self.identity = _conv(before, width, 1, rngs)
        sizes = ((before, inner, 3), (inner, inner, 3), (inner, inner, 3), (inner, width, 1))
        self.convs = _numbered(lambda number: _conv(*sizes[number - 1], rngs), 4)

    def __call__(self, x: Array) -> Array:
        branch = x
        for conv in _in_order(self.convs):
            branch = conv(jax.nn.relu(branch))
        return (self.identity(x) if hasattr(self, "identity") else x) + self.gain * branch
