"""The parts both towers share: linear maps, LayerNorm, MLP, dropout, and a scanned stack of blocks.

Modules are containers of named arrays (`flax.nnx`); every transform is plain JAX. Arrays are
stored float32 and cast to the compute dtype where they are used. Softmax, LayerNorm and activations
are float32 inside, and so are sums over rows in the backward pass: a sum of many bfloat16 numbers
loses the small ones. Dims: B rows, S tokens, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

Array = jax.Array


# What `remat="dots"` keeps: products, that of a `Linear` without its bias and what comes out of
# attention, and the two numbers that LayerNorm has of a row. With these to be summed anew XLA for
# GPUs would write the gradient of `scale` to memory, in float32, before it sums it over rows.
PRODUCT, _STATISTIC = "product", "statistic"


def normal(std: float) -> Callable[..., Array]:
    """Initialiser: normal with standard deviation `std`, not truncated (as torch)."""
    return jax.nn.initializers.normal(std)


class LayerNorm(nnx.LayerNorm):
    """LayerNorm over the last axis of x [..., width], in float32; what comes out is `dtype`.

    Exact two-pass variance, since E[x²]-E[x]² cancels.
    """

    def __init__(self, width: int, epsilon: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, rngs=rngs)
        self.out_dtype = dtype

    def __call__(self, x: Array) -> Array:
        normed = _normed(x, self.scale[...], self.bias[...], self.epsilon)
        return normed.astype(self.out_dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _normed(x: Array, scale: Array, bias: Array, epsilon: float) -> Array:
    """Float32 [..., width]; for the gradient it keeps x, in its dtype, and two numbers of a row."""
    return _normed_forward(x, scale, bias, epsilon)[0]


def _normed_forward(x: Array, scale: Array, bias: Array, epsilon: float):
    wide = x.astype(jnp.float32)
    mean = jnp.mean(wide, axis=-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.mean((wide - mean) ** 2, axis=-1, keepdims=True) + epsilon)
    mean, factor = checkpoint_name(mean, _STATISTIC), checkpoint_name(factor, _STATISTIC)
    return (wide - mean) * (factor * scale) + bias, (x, mean, factor, scale)


def _normed_gradient(epsilon: float, kept: tuple[Array, ...], grad: Array):
    x, mean, factor, scale = kept
    unit = (x.astype(jnp.float32) - mean) * factor
    inner = grad * scale
    along = jnp.mean(inner * unit, axis=-1, keepdims=True)
    rows = tuple(range(grad.ndim - 1))
    to_x = factor * (inner - jnp.mean(inner, axis=-1, keepdims=True) - unit * along)
    return to_x.astype(x.dtype), jnp.sum(grad * unit, axis=rows), jnp.sum(grad, axis=rows)


_normed.defvjp(_normed_forward, _normed_gradient)


def precision_of(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """Of products of this type. By itself JAX multiplies float32 in TF32 on GPUs and in bfloat16 on
    TPUs, and the numbers of a checkpoint would not be the same everywhere."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


class Linear(nnx.Linear):
    """x [..., in] @ kernel + bias in `dtype`; the gradient of the bias is summed in float32."""

    def __call__(self, x: Array) -> Array:
        y = product(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.dtype)
        return add_bias(checkpoint_name(y, PRODUCT), self.bias[...])


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """x [..., M, I] @ y [I, N] or [..., I, N] -> [..., M, N] in `dtype`.

    Its gradients are products in the dtype of x and y, which is one: by itself JAX would take them
    for float32 where `dtype` is.
    """
    return _multiply(jnp.matmul, x, y, dtype)


def _multiply(multiply: Callable[..., Array], x: Array, y: Array, dtype: jnp.dtype) -> Array:
    """A product in `dtype`, which on CPUs is rounded from float32: those of bfloat16 in XLA for
    CPUs are fast for that alone. XLA for GPUs would write the float32 to memory. One of float32 is
    of float32 everywhere, see `precision_of`."""

    def wide(x: Array, y: Array) -> Array:
        return multiply(x, y, preferred_element_type=jnp.float32).astype(dtype)

    def direct(x: Array, y: Array) -> Array:
        return multiply(x, y, preferred_element_type=dtype, precision=precision_of(x.dtype))

    if dtype == jnp.float32:
        return direct(x, y)
    return jax.lax.platform_dependent(x, y, cpu=wide, default=direct)


def _product_gradient(dtype: jnp.dtype, saved: tuple[Array, Array], grad: Array):
    x, y = saved
    grad = grad.astype(x.dtype)
    to_x = product(grad, y.swapaxes(-1, -2), x.dtype)
    if y.ndim > 2:
        return to_x, product(x.swapaxes(-1, -2), grad, y.dtype)
    rows = tuple(range(x.ndim - 1))
    over_rows = partial(jax.lax.dot_general, dimension_numbers=((rows, rows), ((), ())))
    return to_x, _multiply(over_rows, x, grad, y.dtype)


product.defvjp(lambda x, y, dtype: (product(x, y, dtype), (x, y)), _product_gradient)


@jax.custom_vjp
def add_bias(x: Array, bias: Array) -> Array:
    """x [..., D] + bias float32 [D] in the dtype of x; see the top for its gradient."""
    return x + bias.astype(x.dtype)


def _bias_gradient(_, grad: Array) -> tuple[Array, Array]:
    # As an array of its own: XLA for GPUs would keep a copy of it in float32 for the sum.
    grad = jax.lax.optimization_barrier(grad)
    return grad, jnp.sum(grad, axis=tuple(range(grad.ndim - 1)), dtype=jnp.float32)


add_bias.defvjp(lambda x, bias: (add_bias(x, bias), None), _bias_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _take_rows(x: Array, index: Array, rows: int) -> Array:
    return x[index]


def take_rows(x: Array, index: Array) -> Array:
    """x[index] of x [M, ...], index int32 [N]; see the top for its gradient."""
    return _take_rows(x, index, len(x))


def add_rows(values: Array, index: Array, rows: int) -> Array:
    """Zeros [rows, ...] with values[n] added to row index[n], summed in float32, in the dtype of
    `values` [N, ...]."""
    total = jnp.zeros((rows, *values.shape[1:]), jnp.float32)
    return total.at[index].add(values.astype(jnp.float32)).astype(values.dtype)


_take_rows.defvjp(
    lambda x, index, rows: (_take_rows(x, index, rows), index),
    lambda rows, index, grad: (add_rows(grad, index, rows), None),
)


def rows_over_devices(x: Array) -> Array:
    """x with its rows cut over all devices of the mesh it is traced for; without a mesh, x.

    Left to itself, XLA lets the cut of the parameters (`fsdp`) spread to the activations.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(mesh.axis_names))


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Inverted dropout of x [...]. `key` None means deterministic: x comes back unchanged.

    `rate` is below 1, in multiples of 2^-32. What is dropped is the same on any number of devices.
    """
    if key is None or rate == 0.0:
        return x
    return _dropped(x, jax.random.key_data(key), rate)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dropped(x: Array, words: Array, rate: float) -> Array:
    """x / (1 - rate), or 0; its gradient keeps the key's words and draws again."""
    # Not in bfloat16, in which 1 - 0.1 is 0.898.
    scaled = (x.astype(jnp.float32) / (1.0 - rate)).astype(x.dtype)
    keep = random_words(words, x.shape) >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    # Not `where`: its zeros are the same in all layers, so that a scan fills an array with them
    # once and reads it in each.
    return scaled * keep.astype(x.dtype)


_dropped.defvjp(
    lambda x, words, rate: (_dropped(x, words, rate), words),
    lambda rate, words, grad: (_dropped(grad, words, rate), None),
)


def random_words(words: Array, shape: tuple[int, ...]) -> Array:
    """uint32 of this shape from the first two `words`, uint32 [2 or more], of a key: its elements'
    numbers, mixed twice.

    Enough for dropout, and for nothing that must withstand more than statistics. It is arithmetic
    that XLA puts into what reads it. Threefry, with which `jax.random` draws, was a loop for each
    shape and an array of words: a thirtieth of a step on CPU, and two fifths of compiling it.
    """
    # The constant, or number 0 of a key of zeros would be mixed into 0. It begins with the key, or
    # a scan would make the numbers of all elements once, and each layer read them.
    number, stride = words[0] + jnp.uint32(0x9E3779B9), 1
    for after, size in enumerate(reversed(shape)):
        along = jnp.arange(size, dtype=jnp.uint32) * jnp.uint32(stride % 2**32)
        number = number + along.reshape(-1, *[1] * after)
        stride *= size
    return _mix(_mix(number) ^ words[1])


def _mix(x: Array) -> Array:
    """A bijection of uint32 that changes about half of all bits with any one of them.

    Source: C. Wellons, hash-prospector, its best function of two rounds.
    """
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ (x >> 15)) * jnp.uint32(0xD35A2D97)
    return x ^ (x >> 15)


class Mlp(nnx.Module):
    """width -> mlp_width -> width with the activation of the tower."""

    def __init__(
        self,
        width: int,
        mlp_width: int,
        activation: Callable[[Array], Array],
        *,
        up_std: float,
        down_std: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        self.activation = activation
        self.up = Linear(width, mlp_width, kernel_init=normal(up_std), dtype=dtype, rngs=rngs)
        self.down = Linear(mlp_width, width, kernel_init=normal(down_std), dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.down(self.activation(self.up(x)))


def _activation(inside: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """An elementwise function, float32 inside, that keeps its argument alone for the gradient."""

    @wraps(inside)
    def call(x: Array) -> Array:
        return inside(x.astype(jnp.float32)).astype(x.dtype)

    kept = jax.custom_vjp(call)
    kept.defvjp(lambda x: (call(x), x), lambda x, grad: jax.vjp(call, x)[1](grad))
    return kept


@_activation
def quick_gelu(x: Array) -> Array:
    """x * sigmoid(1.702 x), CLIP's activation."""
    return x * jax.nn.sigmoid(1.702 * x)


@_activation
def exact_gelu(x: Array) -> Array:
    """The erf form, BERT's activation (jax.nn.gelu defaults to the tanh form)."""
    return jax.nn.gelu(x, approximate=False)


def stack_blocks(make_block: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs):
    """One module whose arrays hold `depth` blocks on a leading layer axis [L, ...]."""
    graphdef = nnx.split(nnx.eval_shape(lambda: make_block(nnx.Rngs(0))))[0]
    keys = jax.random.split(rngs.params(), depth)
    return nnx.merge(graphdef, jax.vmap(lambda k: nnx.split(make_block(nnx.Rngs(k)))[1])(keys))


_REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT, _STATISTIC),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@jax.custom_vjp
def split_last(stacks: Any) -> tuple[Any, Any]:
    """A tree of [L, ...] -> of all layers but the last [L - 1, ...], and of the last one [...].

    Its gradient is put together once; that of two slices are two arrays filled up with zeros.
    """
    return jax.tree.map(lambda a: a[:-1], stacks), jax.tree.map(lambda a: a[-1], stacks)


def _join_last(_, grads: tuple[Any, Any]) -> tuple[Any]:
    return (jax.tree.map(lambda a, last: jnp.concatenate([a, last[None]]), *grads),)


split_last.defvjp(lambda stacks: (split_last(stacks), None), _join_last)


@jax.custom_jvp
def in_place_of(equal: Any, values: Any) -> Any:
    """`values`, a tree of arrays; their gradient goes to `equal`, a tree of the same numbers.

    Nothing reads `equal`, so that XLA need not compute it.
    """
    return values


@in_place_of.defjvp
def _in_place_of_jvp(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return primals[1], tangents[0]


def scan_blocks(
    blocks: nnx.Module,
    x: Array,
    apply: Callable[..., Array],
    *,
    key: Array | None,
    remat: str,
    collect: bool = False,
    last: Callable[..., Array] | None = None,
    inputs: tuple = (),
) -> tuple[Array, Array | None]:
    """Run stacked blocks one after another with `lax.scan`.

    Args:
      blocks: result of `stack_blocks`.
      x: [B, S, D], input of the first block.
      apply: (block, x, key, *inputs of the layer) -> x of the same shape and dtype.
      key: split into one key per layer; None = deterministic.
      remat: `none`, `dots` (keeps matrix products) or `full` (recomputes whole blocks).
      collect: also return every block's output.
      last: what to do with the last block instead of `apply`, where not all of its output is
        needed; the result may have fewer tokens. Not with `collect`.
      inputs: trees of [L, ...]; each layer reads its own.

    Returns:
      (output of the last block, outputs of all blocks [L, B, S, D] or None)
    """
    graphdef, state = nnx.split(blocks)
    depth = jax.tree.leaves(state)[0].shape[0]
    keys = None if key is None else jax.random.split(key, depth)

    def run(apply: Callable[..., Array], x: Array, params: Any, layer_key: Array | None, *inputs):
        x = rows_over_devices(apply(nnx.merge(graphdef, params), x, layer_key, *inputs))
        return x, (x if collect else None)

    # In a scan, which cannot undo the recomputation, nothing need prevent that (`prevent_cse`).
    def rematted(body: Callable[..., Any], **options: bool) -> Callable[..., Any]:
        if remat == "none":
            return body
        return jax.checkpoint(body, policy=_REMAT_POLICIES[remat], **options)

    x = rows_over_devices(x)
    if last is None:
        body = rematted(lambda x, layer: run(apply, x, *layer), prevent_cse=False)
        return jax.lax.scan(body, x, (state, keys, *inputs))

    # Each layer is read from the whole stack: all but the last of it would be a copy.
    stacks = jax.lax.stop_gradient(state)
    others, ending = split_last(state)

    def body(x: Array, layer):
        i, params, layer_key = layer
        in_stack, *read = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, i, keepdims=False), (stacks, *inputs)
        )
        params = in_place_of(params, in_stack)
        return run(apply, x, params, layer_key, *read)

    layers = jnp.arange(depth - 1), others, None if keys is None else keys[:-1]
    x, _ = jax.lax.scan(rematted(body, prevent_cse=False), x, layers)
    ending_inputs = jax.tree.map(lambda a: a[-1], inputs)
    ending_key = None if keys is None else keys[-1]
    return rematted(partial(run, last))(x, ending, ending_key, *ending_inputs)
