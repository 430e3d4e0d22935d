"""Dense heads on an image tower: a map per picture, for parsing and alignment.

    features = dense_features(vit, image, dense_blocks(depth))     # four maps [B, G, G, D]
    output = head(features, train=True, key=key)                   # [B, 4G, 4G, K]

Source: arXiv 2112.03109 (FaRL), section 4: the outputs of four blocks become a pyramid
(`DenseNeck`, as in arXiv 2106.08254), UPerNet (arXiv 1807.10221) makes one map of it, a 1x1
convolution reads classes or points. Running statistics of BatchNorm are `nnx.BatchStat`, everything
else `nnx.Param`, so that `nnx.split(head, nnx.Param, nnx.BatchStat)` gives them as two dicts; a
call with `train=True` writes the new statistics into the module.

Dims: B pictures, G patches per side, D tower width, C channels of the head, K classes or points.
Maps are float32 [B, height, width, channels].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flip_jax.models.layers import normal
from flip_jax.models.vit import VisionTransformer, pixels_of

Array = jax.Array

POOL_SIDES = (1, 2, 3, 6)  # of the pyramid pooling
BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # of a new batch in the running statistics


def dense_blocks(depth: int) -> tuple[int, ...]:
    """The four blocks, counted from 1, whose outputs make the pyramid.

    Source: 4, 6, 8 and 12 of 12. Towers of another depth: a third, half, two thirds, the last; one
    of fewer than four blocks gives some of them twice.
    """
    return tuple(max(1, round(depth * share)) for share in (1 / 3, 1 / 2, 2 / 3, 1))


def dense_features(vit: VisionTransformer, image: Array, blocks: Sequence[int]) -> list[Array]:
    """Outputs of some blocks as maps.

    Args:
      vit: its position table must be of the picture's size, see `resize_position_table`.
      image: uint8 [B, S, S, 3], normalised here; or float32, normalised already.
      blocks: counted from 1; their raw (not normed) outputs.

    Returns:
      float32 [B, G, G, D] each, without the class token.
    """
    _, outputs = vit(pixels_of(image), return_blocks=True)
    side = image.shape[1] // vit.patch_size
    maps = outputs[:, :, 1:].reshape(*outputs.shape[:2], side, side, outputs.shape[-1])
    return [maps[block - 1].astype(jnp.float32) for block in blocks]


def resize_map(x: Array, height: int, width: int) -> Array:
    """Bilinear, pixel centres at half numbers, edges repeated, no antialiasing.

    Equals `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.
    """
    if x.shape[1:3] == (height, width):
        return x
    shape = (x.shape[0], height, width, x.shape[3])
    return jax.image.resize(x, shape, "linear", antialias=False, precision="highest")


def pool_map(x: Array, side: int) -> Array:
    """Means over side x side bins: [B, H, W, C] -> [B, side, side, C].

    Bin n of H pixels has those from floor(n H / side) up to ceil((n + 1) H / side), as torch's
    `adaptive_avg_pool2d`.
    """
    rows, columns = (_bins(size, side) for size in x.shape[1:3])
    return jnp.einsum("yh,xw,bhwc->byxc", rows, columns, x, precision="highest")


def _bins(size: int, side: int) -> np.ndarray:
    """float32 [side, size], rows of sum 1."""
    weights = np.zeros((side, size), np.float32)
    for n in range(side):
        start, end = n * size // side, -(-(n + 1) * size // side)
        weights[n, start:end] = 1 / (end - start)
    return weights


class BatchNorm(nnx.Module):
    """BatchNorm over all but the last axis.

    In training the statistics are those of the whole batch: under `jax.jit` an array is the global
    one, however it is cut over devices, which makes it SyncBN. The running variance takes the
    unbiased one, as torch's does.
    """

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.mean = nnx.BatchStat(jnp.zeros(width))
        self.var = nnx.BatchStat(jnp.ones(width))

    def __call__(self, x: Array, train: bool) -> Array:
        if train:
            axes = tuple(range(x.ndim - 1))
            mean, count = x.mean(axes), math.prod(x.shape[:-1])
            var = jnp.square(x - mean).mean(axes)  # two passes: E[x²]-E[x]² cancels
            momentum, unbiased = BATCH_NORM_MOMENTUM, count / max(count - 1, 1)
            self.mean[...] = (1 - momentum) * self.mean[...] + momentum * mean
            self.var[...] = (1 - momentum) * self.var[...] + momentum * unbiased * var
        else:
            mean, var = self.mean[...], self.var[...]
        scale = self.scale[...] * jax.lax.rsqrt(var + BATCH_NORM_EPSILON)
        return (x - mean) * scale + self.bias[...]


class ConvNorm(nnx.Module):
    """Convolution of odd size without bias, BatchNorm, ReLU; the map keeps its size."""

    def __init__(self, inputs: int, outputs: int, size: int, rngs: nnx.Rngs):
        # He's initial width: ReLU follows.
        std = math.sqrt(2 / (size * size * inputs))
        self.kernel = nnx.Param(normal(std)(rngs.params(), (size, size, inputs, outputs)))
        self.norm = BatchNorm(outputs)

    def __call__(self, x: Array, train: bool) -> Array:
        x = jax.lax.conv_general_dilated(
            x, self.kernel[...], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.nn.relu(self.norm(x, train))


class Upsample(nnx.Module):
    """Transposed convolution of size and stride 2 with a bias: [B, H, W, D] -> [B, 2H, 2W, D]."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(width**-0.5)(rngs.params(), (2, 2, width, width)))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Array) -> Array:
        rows, height, width, _ = x.shape
        # Size equals stride, so every output pixel comes from one input pixel: a matrix product.
        x = jnp.einsum("bhwi,yxio->bhywxo", x, self.kernel[...])
        return x.reshape(rows, 2 * height, 2 * width, -1) + self.bias[...]


class DenseNeck(nnx.Module):
    """Four maps [B, G, G, D] -> maps of side 4G, 2G, G and G // 2."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.up4_first = Upsample(width, rngs)
        self.up4_norm = BatchNorm(width)
        self.up4_second = Upsample(width, rngs)
        self.up2 = Upsample(width, rngs)

    def __call__(self, features: Sequence[Array], train: bool) -> list[Array]:
        first, second, third, last = features
        up = jax.nn.gelu(self.up4_norm(self.up4_first(first), train), approximate=False)
        window = (1, 2, 2, 1)
        half = jax.lax.reduce_window(last, -jnp.inf, jax.lax.max, window, window, "VALID")
        return [self.up4_second(up), self.up2(second), third, half]


class UPerHead(nnx.Module):
    """UPerNet: pyramid pooling of the smallest map, a feature pyramid, all fused into one map."""

    def __init__(self, width: int, channels: int, rngs: nnx.Rngs, levels: int = 4):
        def conv(inputs: int, size: int) -> ConvNorm:
            return ConvNorm(inputs, channels, size, rngs)

        self.pooled = nnx.Dict({f"side_{n}": conv(width, 1) for n in POOL_SIDES})
        self.context = conv(width + len(POOL_SIDES) * channels, 3)
        finer = range(levels - 1)
        self.lateral = nnx.Dict({f"level_{n}": conv(width, 1) for n in finer})
        self.smooth = nnx.Dict({f"level_{n}": conv(channels, 3) for n in finer})
        self.fuse = conv(levels * channels, 3)

    def __call__(self, pyramid: Sequence[Array], train: bool) -> Array:
        """Maps of D channels, largest first -> [B, height, width, C] of the largest."""
        *finer, last = pyramid
        size = last.shape[1:3]
        pooled = [
            resize_map(self.pooled[f"side_{n}"](pool_map(last, n), train), *size)
            for n in POOL_SIDES
        ]
        maps = [self.lateral[f"level_{n}"](x, train) for n, x in enumerate(finer)]
        maps.append(self.context(jnp.concatenate([last, *pooled], -1), train))
        for n in reversed(range(len(finer))):
            maps[n] = maps[n] + resize_map(maps[n + 1], *maps[n].shape[1:3])
        maps[:-1] = [self.smooth[f"level_{n}"](x, train) for n, x in enumerate(maps[:-1])]
        size = maps[0].shape[1:3]
        return self.fuse(jnp.concatenate([resize_map(x, *size) for x in maps], -1), train)


class SegmentationHead(nnx.Module):
    """Dropout of whole channels, then a 1x1 convolution: [B, H, W, C] -> logits [B, H, W, K]."""

    def __init__(self, channels: int, classes: int, rngs: nnx.Rngs, dropout: float = 0.1):
        self.rate = dropout
        self.kernel = nnx.Param(normal(0.01)(rngs.params(), (channels, classes)))
        self.bias = nnx.Param(jnp.zeros(classes))

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        """Args: key: of the dropout; None = off."""
        if key is not None and self.rate:
            kept = jax.random.bernoulli(key, 1 - self.rate, (len(x), 1, 1, x.shape[-1]))
            x = jnp.where(kept, x / (1 - self.rate), 0.0)
        return x @ self.kernel[...] + self.bias[...]


class HeatmapHead(SegmentationHead):
    """The same with K points as classes, resized to `side` x `side`: logits of heatmaps."""

    def __init__(
        self,
        channels: int,
        points: int,
        rngs: nnx.Rngs,
        dropout: float = 0.1,
        side: int = 128,
        bias: float = 0.0,
    ):
        """Args: bias: what all logits start near; low, because most of a heatmap is empty."""
        super().__init__(channels, points, rngs, dropout)
        self.bias = nnx.Param(jnp.full(points, bias))
        self.side = side

    def __call__(self, x: Array, key: Array | None = None) -> Array:
        return resize_map(super().__call__(x, key), self.side, self.side)


class MultitaskHead(SegmentationHead):
    """Classes, heatmaps and attributes in one map: logits [B, H, W, K + P + A].

    The logit of an attribute is the mean over its map, which is a linear layer on the mean of the
    features.
    """

    def __init__(
        self,
        channels: int,
        parts: tuple[int, int, int],
        rngs: nnx.Rngs,
        dropout: float = 0.1,
        bias: float = 0.0,
    ):
        """Args: parts: K, P, A; bias: what logits of heatmaps start near, see `HeatmapHead`."""
        super().__init__(channels, sum(parts), rngs, dropout)
        self.bias = nnx.Param(jnp.repeat(jnp.array([0.0, bias, 0.0]), np.array(parts)))


class DenseHead(nnx.Module):
    """Neck, decoder and output. Its three parts may have learning rates of their own."""

    def __init__(
        self,
        width: int,
        channels: int,
        output: Callable[[int, nnx.Rngs], nnx.Module],
        rngs: nnx.Rngs,
    ):
        """Args:
        width: D; channels: C.
        output: (channels, rngs) -> `SegmentationHead`, `HeatmapHead`, `MultitaskHead`.
        """
        self.neck = DenseNeck(width, rngs)
        self.decoder = UPerHead(width, channels, rngs)
        self.output = output(channels, rngs)

    def __call__(self, features: Sequence[Array], train: bool, key: Array | None = None) -> Array:
        """What `output` makes of four maps [B, G, G, D]; `key` is of its dropout."""
        return self.output(self.decoder(self.neck(features, train), train), key)
