"""Attention: plain products, or the fused kernel of the devices that the step is compiled for.

Dims: B rows, S tokens (Sq of queries, Sk of keys), D width, H heads, K head width (D = H * K).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import (
    FullMask,
    MultiHeadMask,
)
from jax.sharding import PartitionSpec

from flip_jax.models.layers import PRODUCT, Linear, dropout, normal, product

Array = jax.Array

# Splash attention works on blocks of a multiple of this many tokens; up to so many make one block.
_LANES = 128
_LARGEST_BLOCK = 512


def attend(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None = None,
    *,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    flash: bool = False,
) -> Array:
    """Scaled dot-product attention; logits and softmax in float32.

    Args:
      query: [B, H, Sq, K]; key, value: [B, H, Sk, K], any float dtype.
      mask: bool [B, Sk], or [B, Sq, Sk] where it differs from query to query, True = may be
        attended to; None = all.
      dropout_rate, dropout_key: dropout on the attention probabilities.
      flash: use a fused kernel where there is one, see `fused_kernel`.

    Returns:
      [B, H, Sq, K] in the dtype of `query`.

    Raises:
      ValueError: a fused kernel with `mask`, dropout or queries of another shape than keys.
    """
    if flash and (kernel := fused_kernel(query.dtype)) is not None:
        if mask is not None or dropout_key is not None or query.shape != key.shape:
            raise ValueError("flash attention is for self-attention without mask and dropout")
        return kernel(query, key, value)
    scaled = query * query.shape[-1] ** -0.5
    return _plain(scaled, key, value, mask, dropout_key, dropout_rate)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _plain(
    query: Array,
    key: Array,
    value: Array,
    mask: Array | None,
    dropout_key: Array | None,
    dropout_rate: float,
) -> Array:
    """As `attend`, of scaled queries. For the gradient it keeps the weights in the dtype of
    `value`, before dropout, which is drawn again."""
    return _plain_forward(query, key, value, mask, dropout_key, dropout_rate)[0]


def _plain_forward(query, key, value, mask, dropout_key, dropout_rate):
    # Heads before tokens: on CPU these batched products are 2-3x faster than the bqhk form.
    logits = product(query, key.swapaxes(-1, -2), jnp.float32)
    if mask is not None:
        mask = mask[:, None, None, :] if mask.ndim == 2 else mask[:, None]
        # Added, not chosen: as a constant of all logits it would be an array in a scan, read anew
        # in every layer. A logit is too small beside it to change it.
        logits += jnp.where(mask, 0, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    # As an array of its own: XLA for GPUs would keep another in float32 for the gradient.
    weights = jax.lax.optimization_barrier(weights)
    out = product(dropout(weights, dropout_rate, dropout_key), value, value.dtype)
    out = checkpoint_name(out, PRODUCT)
    return out, (query, key, value, weights, dropout_key, out)


def _plain_gradient(dropout_rate, kept, grad):
    query, key, value, weights, dropout_key, out = kept
    dropped = dropout(weights, dropout_rate, dropout_key)
    to_value = product(dropped.swapaxes(-1, -2), grad, value.dtype)
    to_weights = product(grad, value.swapaxes(-1, -2), value.dtype)
    to_weights = dropout(to_weights, dropout_rate, dropout_key).astype(jnp.float32)
    # The sum of weights times `to_weights`, without reading them (arXiv 2205.14135, appendix B.2).
    along = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    to_logits = (weights.astype(jnp.float32) * (to_weights - along)).astype(query.dtype)
    to_query = product(to_logits, key, query.dtype)
    to_key = product(to_logits.swapaxes(-1, -2), query, key.dtype)
    return to_query, to_key, to_value, None, None


_plain.defvjp(_plain_forward, _plain_gradient)


def fused_kernel(dtype: jnp.dtype) -> Callable[[Array, Array, Array], Array] | None:
    """The fused kernel of the mesh that is traced for: the training step's; None = there is none.

    cuDNN's on GPUs, which takes 16 bits only, splash attention on TPUs. Without a mesh, as in
    evaluation, there is none: numbers of one checkpoint are the same whoever reads it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return None
    if device.platform == "tpu":
        return splash_attention
    if device.platform in ("gpu", "cuda") and jnp.dtype(dtype).itemsize == 2:
        return cudnn_attention
    return None


def cudnn_attention(query: Array, key: Array, value: Array) -> Array:
    """[B, H, S, K] of each -> [B, H, S, K], on NVIDIA GPUs, in float16 or bfloat16."""
    tokens = query.shape[2]
    # JAX has no gradient of it for an odd number of tokens, and 197 is one.
    heads_last = (_fill(x, 2).swapaxes(1, 2) for x in (query, key, value))
    lengths = jnp.full(len(query), tokens, jnp.int32) if tokens % 2 else None
    attended = jax.nn.dot_product_attention(
        *heads_last, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return attended.swapaxes(1, 2)[:, :, :tokens]


def splash_attention(query: Array, key: Array, value: Array) -> Array:
    """[B, H, S, K] of each -> [B, H, S, K], on TPUs, rows cut over all devices of the mesh."""
    _, heads, tokens, head_width = query.shape
    query, key, value = (_fill(x, _LANES) for x in (query * head_width**-0.5, key, value))
    filled = query.shape[2]
    block = filled if filled <= _LARGEST_BLOCK else _LANES
    kernel = splash.make_splash_mha_single_device(
        MultiHeadMask([FullMask((filled, filled))] * heads),
        block_sizes=splash.BlockSizes(
            **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), block),
            **dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dq"), block),
        ),
    )
    # Keys that fill the last block are of another segment than all queries.
    filling = (jnp.arange(filled) >= tokens).astype(jnp.int32)
    segments = splash.SegmentIds(q=jnp.zeros_like(filling), kv=filling)
    # XLA does not cut such a kernel over devices by itself.
    rows = PartitionSpec(jax.sharding.get_abstract_mesh().axis_names)
    of_each_row = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=segments))
    on_devices = jax.shard_map(of_each_row, in_specs=rows, out_specs=rows, check_vma=False)
    return on_devices(query, key, value)[:, :, :tokens]


def _fill(x: Array, multiple: int) -> Array:
    """x [B, H, S, K] with zeros after its tokens, up to a multiple of so many."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % multiple), (0, 0)))


class Attention(nnx.Module):
    """Multi-head attention with biases; keys and values may come from another width."""

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        kv_width: int | None = None,
        in_std: float,
        out_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        kv_width = kv_width or width
        self.heads = heads
        options = {"dtype": dtype, "rngs": rngs}
        self.query = Linear(width, width, kernel_init=normal(in_std), **options)
        self.key = Linear(kv_width, width, kernel_init=normal(in_std), **options)
        self.value = Linear(kv_width, width, kernel_init=normal(in_std), **options)
        self.out = Linear(width, width, kernel_init=normal(out_std), **options)

    def _split(self, x: Array) -> Array:
        """[B, S, D] -> [B, H, S, K]."""
        rows, tokens, width = x.shape
        return x.reshape(rows, tokens, self.heads, width // self.heads).swapaxes(1, 2)

    def keys_values(self, tokens: Array) -> tuple[Array, Array]:
        """Keys and values [B, H, S, K] of `tokens` [B, S, kv_width]."""
        return self._split(self.key(tokens)), self._split(self.value(tokens))

    def __call__(
        self,
        x: Array,
        keys_values: tuple[Array, Array],
        mask: Array | None = None,
        *,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
        flash: bool = False,
    ) -> Array:
        """Attend from x [N, Sq, D] to `keys_values` [B, H, S, K]; returns [N, Sq, D].

        N is a multiple of B: each N / B consecutive rows of x look at the same keys and values.
        Options as `attend`.

        Raises:
          ValueError: if it is not.
        """
        rows = len(keys_values[0])
        if len(x) % rows:
            raise ValueError(
                f"{len(x)} rows of queries cannot share {rows} rows of keys and values "
                f"evenly: make them a multiple of {rows}, or name each text's image (`image_index`)"
            )
        # Rows that look at the same keys are more queries of one row.
        queries = self.query(x).reshape(rows, -1, x.shape[-1])
        heads = attend(
            self._split(queries),
            *keys_values,
            mask,
            dropout_rate=dropout_rate,
            dropout_key=dropout_key,
            flash=flash,
        )
        return self.out(heads.swapaxes(1, 2).reshape(x.shape))
