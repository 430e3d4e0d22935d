"""Training in bfloat16: gradients that are sums over many rows, norms, dropout, evaluation."""

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import erfc, expit
from test_retrieval import ArrayGallery

from flip_jax import partition
from flip_jax.config import (
    Config,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    TextConfig,
    VisionConfig,
)
from flip_jax.downstream.retrieval import RetrievalEvaluator
from flip_jax.losses.itm import itm_logits
from flip_jax.models import flip
from flip_jax.models.attention import attend
from flip_jax.models.bert import of_each_text
from flip_jax.models.layers import (
    LayerNorm,
    Linear,
    add_bias,
    dropout,
    exact_gelu,
    product,
    quick_gelu,
    scan_blocks,
    stack_blocks,
    take_rows,
)

ROWS = 512
TOWER = {"width": 32, "depth": 2, "heads": 2, "mlp_width": 64}
MODEL = ModelConfig(
    vision=VisionConfig(image_size=32, patch_size=8, **TOWER),
    text=TextConfig(vocab_size=60, positions=12, **TOWER, dropout=0.0),
    embed_dim=16,
)


def relative(found, wanted) -> float:
    found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def gradients(loss, params):
    """name -> gradient of the loss(model, params) in bfloat16 and in float32."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        graphdef = flip.build(dataclasses.replace(MODEL, dtype=dtype))
        grads = jax.jit(jax.grad(lambda p, g=graphdef: loss(nnx.merge(g, p))))(params)
        for path, leaf in jax.tree.leaves_with_path(grads):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            found.setdefault(name, {})[dtype] = leaf
    return found


@pytest.fixture(scope="module")
def params():
    made = flip.init_params(MODEL, 0.07, jax.random.key(0))
    noise = jax.random.key(1)  # no trivial norm or bias
    return jax.tree.map(lambda p: p + 0.02 * jax.random.normal(noise, p.shape), made)


def test_gradients_of_biases_do_not_get_worse_with_the_rows(params):
    """No gradient of the towers is further from float32's than bfloat16 products make it."""
    rng = np.random.default_rng(0)
    image = rng.normal(size=(ROWS, 32, 32, 3)).astype(np.float32)
    ids = rng.integers(1, 60, (ROWS, 12)).astype(np.int32)
    mask = np.arange(12) < rng.integers(2, 13, (ROWS, 1))
    aim = rng.normal(size=(2, MODEL.embed_dim)).astype(np.float32)

    def loss(model):
        embeds = model.encode_image(image)[1], model.embed_text(ids, mask)
        return sum(jnp.mean(jnp.exp(embed @ one)) for embed, one in zip(embeds, aim, strict=True))

    errors = {}
    for name, grads in gradients(loss, params).items():
        # A bias of keys moves all logits of a query alike: it has no gradient but rounding.
        if np.any(grads["float32"]) and not name.endswith("key/bias"):
            errors[name] = relative(grads["bfloat16"], grads["float32"])
    sums = {n: error for n, error in errors.items() if n.endswith(("bias", "_embed"))}
    assert len(sums) > 20 and max(sums.values()) < 0.006, sums
    assert max(errors.values()) < 0.01, sorted(errors.items(), key=lambda item: -item[1])[:8]


def test_sums_are_of_float32():
    """A sum of bfloat16 ones stops at 256."""
    ones = jnp.ones((1024, 3), jnp.bfloat16)
    _, back = jax.vjp(add_bias, ones, jnp.zeros(3))
    np.testing.assert_array_equal(back(ones)[1], [1024] * 3)
    index = jnp.zeros(1024, jnp.int32).at[:4].set(2)
    taken, back = jax.vjp(partial(take_rows, index=index), ones[:5] * jnp.arange(5)[:, None])
    np.testing.assert_array_equal(taken[:6, 0], [2, 2, 2, 2, 0, 0])
    np.testing.assert_array_equal(back(taken + 1)[0][:, 0], [1020, 0, 12, 0, 0])
    # 1,023 texts look at the first image, which has one of its own.
    index = jnp.zeros(1023, jnp.int32)
    _, back = jax.vjp(partial(of_each_text, image_index=(0, index)), ones[1:])
    np.testing.assert_array_equal(back(jnp.tile(ones[1:], (2, 1)))[0][:3, 0], [1024, 1, 1])


def test_an_image_that_is_the_negative_of_all(params):
    """Its tokens get the sum of all gradients, in one pass and in parts."""
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 60, (ROWS, 6)).astype(np.int32)
    tokens = rng.normal(size=(ROWS, 4, MODEL.vision.width)).astype(np.float32)
    negatives = {"image": np.zeros(ROWS, np.int32), "text": (np.arange(ROWS) + 1) % ROWS}

    def gradient(dtype: str, parts: int) -> np.ndarray:
        graphdef = flip.build(dataclasses.replace(MODEL, dtype=dtype))

        def loss(tokens):
            match = nnx.merge(graphdef, params).match
            texts = ids, np.ones(ids.shape, bool)
            logits = itm_logits(match, *texts, tokens.astype(dtype), negatives, None, parts=parts)
            return jnp.mean(logits[:, 1, 1])

        return jax.jit(jax.grad(loss))(tokens)[0]

    wanted = gradient("float32", 1)
    assert relative(gradient("bfloat16", 1), wanted) < 0.03
    assert relative(gradient("bfloat16", 2), wanted) < 0.03


def test_dropout_keeps_the_mean():
    x = jnp.linspace(1, 2, 4000).astype(jnp.bfloat16)
    found, exact = dropout(x, 0.1, jax.random.key(0)), x.astype(jnp.float32) / 0.9
    kept = found != 0
    assert 0.88 < jnp.mean(kept) < 0.92
    np.testing.assert_array_equal(found[kept], exact.astype(jnp.bfloat16)[kept])


def test_dropout_reads_no_zeros_in_a_scan():
    """What is the same in all rounds a scan makes once, and each round reads it."""

    def loss(x, keys):
        return jax.lax.scan(lambda x, key: (dropout(x, 0.1, key), None), x, keys)[0].sum()

    x = jnp.ones((3, 5, 8))
    program = jax.make_jaxpr(jax.grad(loss))(x, jax.random.split(jax.random.key(0), 4))
    scans = [each for each in program.eqns if each.primitive.name == "scan"]
    assert len(scans) == 2  # there and back
    for scan in scans:
        same = scan.invars[: scan.params["num_consts"]]
        assert all(value.aval.shape[-3:] != x.shape for value in same)


def test_attention_reads_no_array_of_masked_logits_in_a_scan():
    def loss(x, mask):
        return jax.lax.scan(lambda x, _: (attend(x, x, x, mask), None), x, length=3)[0].sum()

    x = jnp.ones((2, 4, 5, 8))
    program = jax.make_jaxpr(jax.grad(loss))(x, jnp.ones((2, 5), bool))
    scans = [each for each in program.eqns if each.primitive.name == "scan"]
    assert len(scans) == 2  # there and back
    for scan in scans:
        same = scan.invars[: scan.params["num_consts"]]
        assert all(value.aval.shape[-3:] != (4, 5, 5) for value in same)


def test_activations_are_float32_inside():
    x = jnp.linspace(-6, 6, 4001).astype(jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    for found, wanted in (
        (exact_gelu(x), exact * erfc(-exact / np.sqrt(2)) / 2),
        (quick_gelu(x), exact * expit(1.702 * exact)),
    ):
        assert found.dtype == jnp.bfloat16
        np.testing.assert_array_equal(found, wanted.astype(np.float32).astype(jnp.bfloat16))


def test_what_is_kept_for_the_gradient():
    """One array of the size of the input, in its dtype, besides numbers of rows and of columns."""
    x = jnp.ones((7, 5, 64), jnp.bfloat16)
    norm = LayerNorm(64, 1e-5, jnp.bfloat16, nnx.Rngs(0))
    kept = {
        name: [leaf for leaf in jax.tree.leaves(jax.vjp(function, x)[1]) if leaf.size > 64]
        for name, function in {
            "norm": norm,
            "exact_gelu": exact_gelu,
            "quick_gelu": quick_gelu,
            "dropout": partial(dropout, rate=0.1, key=jax.random.key(0)),
        }.items()
    }
    dtypes = {name: [(leaf.shape, leaf.dtype) for leaf in leaves] for name, leaves in kept.items()}
    assert dtypes.pop("dropout") == []  # it draws again
    assert all(found == [(x.shape, jnp.bfloat16)] for found in dtypes.values()), dtypes


def test_the_gradient_of_a_norm():
    """Against the difference quotient in float64."""
    rng = np.random.default_rng(0)
    x, aim = 3 + rng.normal(size=(2, 6, 64)) * [[[2.0]], [[0.5]]], rng.normal(size=(2, 6, 64))
    scale, bias = rng.normal(size=(2, 64))

    def loss(x, scale, bias):
        unit = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2)
        return np.sum((unit * scale + bias) * aim)

    norm = LayerNorm(64, 1e-2, jnp.float32, nnx.Rngs(0))
    graphdef, _ = nnx.split(norm)

    def ours(x, scale, bias):
        state = nnx.State({"scale": nnx.Param(scale), "bias": nnx.Param(bias)})
        return jnp.sum(nnx.merge(graphdef, state)(x) * aim)

    single = (a.astype(np.float32) for a in (x, scale, bias))
    found = jax.grad(ours, argnums=(0, 1, 2))(*single)
    for number, grad in enumerate(found):
        direction = rng.normal(size=grad.shape)
        there, back = (
            loss(*(a + sign * 1e-6 * direction if i == number else a for i, a in enumerate(whole)))
            for sign, whole in ((1, (x, scale, bias)), (-1, (x, scale, bias)))
        )
        slope = (there - back) / 2e-6
        assert np.sum(np.float64(grad) * direction) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("right", [(16, 7), (4, 3, 16, 7)], ids=["weights", "in batches"])
def test_a_product_is_rounded_once(right):
    """It and its gradients are those of float64, rounded to bfloat16."""
    rng = np.random.default_rng(0)
    x, y, grad = (
        jnp.asarray(rng.normal(size=size), jnp.bfloat16)
        for size in ((4, 3, 5, 16), right, (4, 3, 5, 7))
    )
    wide = [np.asarray(a, np.float64) for a in (x, y, grad)]
    value, back = jax.vjp(partial(product, dtype=jnp.bfloat16), x, y)
    to_y = np.einsum("...mi,...mn->...in", wide[0], wide[2])
    exact = [
        wide[0] @ wide[1],
        wide[2] @ wide[1].swapaxes(-1, -2),
        to_y if len(right) > 2 else to_y.sum(axis=(0, 1)),
    ]
    for found, wanted in zip((value, *back(grad)), exact, strict=True):
        assert found.dtype == jnp.bfloat16
        # Half a unit in the last place, and the sum in float32.
        np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=2**-8, atol=1e-5)


def test_the_gradient_of_a_product_in_float32_has_products_of_bfloat16():
    x, y = jnp.ones((2, 5, 16), jnp.bfloat16), jnp.ones((16, 7), jnp.bfloat16)
    gradient = jax.grad(lambda x, y: jnp.sum(product(x, y, jnp.float32) ** 2), argnums=(0, 1))
    assert _multiplied(gradient, x, y) == {jnp.dtype(jnp.bfloat16)}


def test_products_come_out_in_float32_on_cpus_alone():
    """XLA for CPUs has fast ones of bfloat16 for that alone; a GPU would write it to memory."""
    block = Linear(16, 16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    graphdef, state = nnx.split(block)

    def loss(state, x):
        heads = jnp.broadcast_to(nnx.merge(graphdef, state)(x), (2, 3, 9, 16))
        return jnp.sum(attend(heads, heads, heads).astype(jnp.float32))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(state, jnp.ones((9, 16), jnp.bfloat16))
    results = {
        platform: [
            re.search(r"-> tensor<[0-9x]+x(\w+)>", line)[1]
            for line in traced.lower(lowering_platforms=(platform,)).as_text().splitlines()
            if "dot_general" in line
        ]
        for platform in ("cpu", "cuda", "tpu")
    }
    # One of weights, two of attention, and two gradients of each.
    assert results["cpu"] == ["f32"] * 9
    # Logits alone are float32 everywhere.
    assert sorted(results["cuda"]) == sorted(results["tpu"]) == ["bf16"] * 8 + ["f32"]


def test_remat_dots_keeps_products_in_bfloat16():
    """One array of each product with weights and layer, and nothing else of the size of x."""
    blocks = stack_blocks(
        lambda rngs: Linear(16, 16, dtype=jnp.bfloat16, rngs=rngs), 3, nnx.Rngs(0)
    )

    def run(x):
        twice = lambda block, x, _: exact_gelu(block(exact_gelu(block(x))))  # noqa: E731
        return scan_blocks(blocks, x, twice, key=None, remat="dots")[0]

    kept = jax.tree.leaves(jax.vjp(run, jnp.ones((5, 7, 16), jnp.bfloat16))[1])
    large = sorted((leaf.shape, str(leaf.dtype)) for leaf in kept if leaf.size >= 5 * 7 * 16)
    of_layers = [each for each in large if each[0] != (3, 16, 16)]
    assert of_layers == [((3, 5, 7, 16), "bfloat16")] * 3  # two products, and x itself


def test_float32_is_of_float32_on_every_device(params):
    """By itself JAX multiplies it in TF32 on GPUs and in bfloat16 on TPUs."""
    graphdef = flip.build(dataclasses.replace(MODEL, dtype="float32"))
    pixels, ids = np.zeros((2, 32, 32, 3), np.uint8), np.ones((2, 6), np.int32)

    def outputs(params):
        model, mask = nnx.merge(graphdef, params), np.ones((2, 6), bool)
        tokens, image = model.encode_image(pixels)
        _, text = model.encode_text(ids, mask)
        return jnp.sum(image * text) + model.match(ids, mask, tokens).sum()

    program = jax.make_jaxpr(jax.grad(outputs))(params)
    products = [one for one in _equations(program.jaxpr) if one.primitive.name == "dot_general"]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert len(products) > 50
    assert {one.params["precision"] for one in products} == {highest}


def test_remat_dots_sums_no_row_of_a_norm_again():
    blocks = stack_blocks(lambda rngs: LayerNorm(16, 1e-5, jnp.float32, rngs), 3, nnx.Rngs(0))

    def roots(remat):
        def run(x):
            return scan_blocks(blocks, x, lambda norm, x, _: norm(x), key=None, remat=remat)[0]

        program = jax.make_jaxpr(jax.grad(lambda x: run(x).sum()))(jnp.ones((5, 16)))
        return [each.primitive.name for each in _equations(program.jaxpr)].count("rsqrt")

    assert [roots(remat) for remat in ("none", "dots", "full")] == [1, 1, 2]


def test_remat_dots_makes_logits_of_attention_alone_again():
    blocks = stack_blocks(lambda rngs: LayerNorm(8, 1e-5, jnp.float32, rngs), 3, nnx.Rngs(0))

    def products(remat):
        def run(x):
            block = lambda norm, x, _: attend(x, x, x) + norm(x)  # noqa: E731
            return scan_blocks(blocks, x, block, key=None, remat=remat)[0]

        program = jax.make_jaxpr(jax.grad(lambda x: run(x).sum()))(jnp.ones((2, 4, 5, 8)))
        return [one.primitive.name for one in _equations(program.jaxpr)].count("dot_general")

    assert [products(remat) for remat in ("none", "dots", "full")] == [6, 7, 8]


def test_attention_has_products_of_bfloat16_alone():
    """In both directions; and its gradients are as far from float32's as its values are."""
    rng = np.random.default_rng(0)
    heads = [rng.normal(size=(4, 2, n, 16)).astype(np.float32) for n in (9, 13, 13)]
    aim = rng.normal(size=(4, 2, 9, 16)).astype(np.float32)

    def gradient(dtype):
        def loss(*heads):
            out = attend(*(x.astype(dtype) for x in heads))
            return jnp.sum(out.astype(jnp.float32) * aim), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)

    assert _multiplied(gradient(jnp.bfloat16), *heads) == {jnp.dtype(jnp.bfloat16)}
    (*found, value), (*wanted, exact) = (
        (*grads, out) for grads, out in (gradient(t)(*heads) for t in (jnp.bfloat16, jnp.float32))
    )
    error = relative(value, exact)
    assert 0 < error < 2**-7
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 2 * error


def test_attention_keeps_its_weights_once():
    """In bfloat16, before dropout, beside queries, keys, values and what comes out."""
    heads = [jnp.ones((4, 2, n, 16), jnp.bfloat16) for n in (9, 13, 13)]
    key = jax.random.key(0)
    back = jax.vjp(partial(attend, dropout_rate=0.1, dropout_key=key), *heads)[1]
    kept = sorted((x.shape, str(x.dtype)) for x in jax.tree.leaves(back) if x.ndim == 4)
    shapes = sorted([*(x.shape for x in heads), (4, 2, 9, 13), (4, 2, 9, 16)])
    assert kept == [(shape, "bfloat16") for shape in shapes]


def _multiplied(function, *arguments) -> set:
    """The dtypes of what goes into its matrix products."""
    return {
        value.aval.dtype
        for each in _equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        if each.primitive.name == "dot_general"
        for value in each.invars
    }


def _equations(program) -> list:
    """Of a jaxpr and of all that are inside it."""
    values = (value for each in program.eqns for value in jax.tree.leaves(each.params))
    inner = (getattr(value, "jaxpr", value) for value in values)
    return [*program.eqns, *(one for p in inner if hasattr(p, "eqns") for one in _equations(p))]


def test_norms_are_float32_inside():
    norm = LayerNorm(64, 1e-5, jnp.bfloat16, nnx.Rngs(0))
    scale = 1 + np.linspace(
        -0.003, 0.003, 64, dtype=np.float32
    )  # bfloat16 has 1 and its neighbours
    norm.scale[...] = norm.bias[...] = scale
    x = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    exact = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
    found = norm(x)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, (exact * scale + scale).astype(jnp.bfloat16))


def test_evaluation_is_in_float32(params):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(8, 32, 32, 3)).astype(np.float32)
    ids = rng.integers(1, 60, (8, 6)).astype(np.int32)
    gallery = ArrayGallery(image, ids, np.ones((8, 6), bool), np.arange(8))
    mesh = partition.make_mesh(MeshConfig(), jax.devices()[:1])
    found = {}
    for dtype in ("bfloat16", "float32"):
        cfg = Config(
            model=dataclasses.replace(MODEL, dtype=dtype), eval=EvalConfig(batch_size=4, rerank=0)
        )
        found[dtype] = RetrievalEvaluator(cfg, gallery, mesh)._embed(params)[:2]
    for half, full in zip(*found.values(), strict=True):
        np.testing.assert_array_equal(half, full)
