"""Attention: plain products against it written out, fused kernels against these, which is used.

Neither fused kernel can run here. Splash attention is interpreted, cuDNN's is compiled as far as
the call of its library; its numbers are not tested.
"""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, use_abstract_mesh
from jax.sharding import PartitionSpec as P

from flip_jax.config import VisionConfig
from flip_jax.models import attention
from flip_jax.models.attention import attend, cudnn_attention, fused_kernel, splash_attention
from flip_jax.models.layers import dropout
from flip_jax.models.vit import VisionTransformer

ROWS = P(("data", "fsdp"))


def heads(tokens: int, width: int = 16, rows: int = 8, dtype: jnp.dtype = jnp.float32) -> list:
    keys = jax.random.split(jax.random.key(tokens), 3)
    return [jax.random.normal(key, (rows, 2, tokens, width), dtype) for key in keys]


def loss(kernel):
    """Depends on every element of the result, on each in another way."""

    def of(query, key, value):
        out = kernel(query, key, value).astype(jnp.float32)
        return jnp.sum(jnp.sin(out) * jnp.linspace(-1, 1, out.size).reshape(out.shape)), out

    return jax.value_and_grad(of, argnums=(0, 1, 2), has_aux=True)


def mesh_of(platform: str, devices: int = 8) -> AbstractMesh:
    return AbstractMesh(
        (devices // 2, 2),
        ("data", "fsdp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        abstract_device=AbstractDevice(platform, None, platform),
    )


@pytest.fixture
def interpreted(monkeypatch):
    make = attention.splash.make_splash_mha_single_device
    interpret = functools.partial(make, interpret=True)
    monkeypatch.setattr(attention.splash, "make_splash_mha_single_device", interpret)


@pytest.mark.parametrize(
    ("devices", "tokens"),
    [(1, 37), (2, 37), (8, 37), (8, 128), (8, 197), (1, 577)],  # less, just as much, two, five
)
def test_splash_attention_is_the_plain_one(interpreted, devices, tokens):
    mesh = Mesh(np.array(jax.devices()[:devices]).reshape(-1, min(devices, 2)), ("data", "fsdp"))
    inputs = heads(tokens)
    (_, out), gradients = loss(attend)(*inputs)
    with use_abstract_mesh(mesh.abstract_mesh):
        cut = NamedSharding(mesh, ROWS)
        fused = jax.jit(loss(splash_attention), in_shardings=cut)
        (_, found), found_gradients = fused(*inputs)
    np.testing.assert_allclose(found, out, atol=2e-6)
    for one, other in zip(found_gradients, gradients, strict=True):
        largest = float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, atol=2e-6 * largest)
        assert largest > 0.1


@pytest.mark.parametrize(("tokens", "mask"), [(196, "NO_MASK"), (197, "PADDING")])
def test_cudnn_attention_calls_the_library(monkeypatch, tokens, mask):
    """An odd number of tokens, too, of which JAX has no gradient."""
    library = "jax._src.cudnn.fused_attention_stablehlo."
    monkeypatch.setattr(library + "check_cudnn_version", lambda: 91_000)
    monkeypatch.setattr(library + "check_compute_capability", lambda least: True)
    monkeypatch.setattr(library + "is_cuda_compute_capability_equal", lambda value: False)
    inputs = heads(tokens, width=64, dtype=jnp.bfloat16)
    traced = jax.jit(loss(cudnn_attention)).trace(*inputs)
    assert [aval.shape for aval in traced.out_info[1]] == [x.shape for x in inputs]
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert set(re.findall(r"__cudnn\$\w+", text)) == {
        "__cudnn$fmhaSoftmax",
        "__cudnn$fmhaSoftmaxBackward",
    }
    assert set(re.findall(r"mask_type\W+22: \W+22(\w+)", text)) == {mask}


def test_which_kernel():
    assert fused_kernel(jnp.bfloat16) is None, "no mesh: evaluation"
    for platform, dtype, kernel in (
        ("cpu", jnp.bfloat16, None),
        ("gpu", jnp.bfloat16, cudnn_attention),
        ("gpu", jnp.float32, None),
        ("tpu", jnp.bfloat16, splash_attention),
        ("tpu", jnp.float32, splash_attention),
    ):
        with use_abstract_mesh(mesh_of(platform)):
            assert fused_kernel(dtype) is kernel, (platform, dtype)


def test_flash_is_refused_where_it_would_be_wrong():
    query, key, value = heads(5)
    with use_abstract_mesh(mesh_of("tpu")):
        for changed in (
            {"mask": jnp.ones((8, 5), bool)},
            {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
        ):
            with pytest.raises(ValueError, match="without mask and dropout"):
                attend(query, key, value, flash=True, **changed)
        with pytest.raises(ValueError, match="self-attention"):
            attend(query[:, :, :1], key, value, flash=True)


@pytest.mark.parametrize(
    ("first_only", "remat"), [(False, "none"), (True, "none"), (False, "dots"), (True, "full")]
)
def test_the_image_tower_with_flash_attention(interpreted, monkeypatch, first_only, remat):
    """The same tokens and gradients; the last block, of its first token alone, stays plain."""
    cfg = VisionConfig(image_size=32, patch_size=8, width=32, depth=3, heads=2, mlp_width=64)
    image = jax.random.normal(jax.random.key(1), (8, 32, 32, 3))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("data", "fsdp"))
    cut = NamedSharding(mesh, P()), NamedSharding(mesh, ROWS)
    calls = []

    def kernel(*heads):
        calls.append(heads[0].shape)
        return splash_attention(*heads)

    def of(how: str):
        tower = VisionTransformer(
            replace(cfg, attention=how), dtype=jnp.float32, remat=remat, rngs=nnx.Rngs(0)
        )
        graphdef, params = nnx.split(tower)

        def loss(params, image):
            tokens = nnx.merge(graphdef, params)(image, first_only=first_only)
            return jnp.sum(jnp.sin(3 * tokens)), tokens

        return jax.jit(jax.value_and_grad(loss, has_aux=True), in_shardings=cut)(params, image)

    (_, out), gradients = of("plain")
    with use_abstract_mesh(mesh.abstract_mesh):
        monkeypatch.setattr(attention, "fused_kernel", lambda dtype: kernel)
        (_, found), found_gradients = of("flash")
    assert set(calls) == {(8, 2, 17, 16)}
    np.testing.assert_allclose(found, out, atol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (found_gradients, gradients)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 * max(1, float(jnp.abs(other).max())))


@pytest.mark.parametrize("masked", ["nothing", "keys", "queries and keys"])
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_gradient_is_that_of_attention_written_out(rate, masked):
    """Of its weights with dropout, by JAX's own rules."""
    rng = np.random.default_rng(0)
    query, key, value = (jnp.asarray(rng.normal(size=(3, 2, n, 8)), jnp.float32) for n in (5, 7, 7))
    aim = rng.normal(size=query.shape).astype(np.float32)
    shape = {"nothing": None, "keys": (3, 7), "queries and keys": (3, 5, 7)}[masked]
    mask = None if shape is None else jnp.asarray(rng.random(shape) < 0.7).at[..., 0].set(True)
    dropout_key = jax.random.key(1)

    def written_out(query, key, value):
        logits = jnp.einsum("bhqk,bhnk->bhqn", query, key) / jnp.sqrt(8.0)
        if mask is not None:
            logits += jnp.where(mask.reshape(3, 1, -1, 7), 0.0, -1e30)
        return dropout(jax.nn.softmax(logits), rate, dropout_key) @ value

    def ours(query, key, value):
        options = {"dropout_rate": rate, "dropout_key": dropout_key}
        return attend(query, key, value, mask, **options)

    (found, grads), (wanted, exact) = (
        jax.value_and_grad(lambda *heads, f=f: jnp.sum(f(*heads) * aim), argnums=(0, 1, 2))(
            query, key, value
        )
        for f in (ours, written_out)
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for one, other in zip(grads, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=2e-6)
