"""Both towers against `transformers` layer by layer, and the properties no other code can check.

The weights of the reference are drawn so that no norm or bias is trivial, are exact in float32,
and are computed with in float64: the differences are our float32 rounding alone.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from flip_jax import config
from flip_jax.config import ModelConfig, TextConfig, VisionConfig
from flip_jax.convert import torch_flip
from flip_jax.models import flip
from flip_jax.models.attention import attend
from flip_jax.models.layers import dropout, random_words, scan_blocks
from flip_jax.models.vit import keep_random_patches

torch = pytest.importorskip("torch", reason="the reference towers need PyTorch (extra `torch`)")
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    BlipTextConfig,
    BlipTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)

FLOAT32 = 1e-5
# Tiny arrays: compile time is all that counts.
QUICK = {"xla_backend_optimization_level": 0}
SMALL = ModelConfig(
    vision=VisionConfig(image_size=21, patch_size=7, width=48, depth=3, heads=3, mlp_width=80),
    text=TextConfig(
        vocab_size=40, max_length=9, positions=12, width=36, depth=3, heads=2, mlp_width=60
    ),
    embed_dim=11,
    dtype="float32",
)


def sized(part: str, **changes) -> ModelConfig:
    """SMALL with another vision or text tower."""
    return dataclasses.replace(
        SMALL, **{part: dataclasses.replace(getattr(SMALL, part), **changes)}
    )


# The reference ------------------------------------------------------------------------------------


def torch_clip(cfg: ModelConfig) -> CLIPVisionModel:
    return CLIPVisionModel(
        CLIPVisionConfig(
            image_size=cfg.vision.image_size,
            patch_size=cfg.vision.patch_size,
            hidden_size=cfg.vision.width,
            num_hidden_layers=cfg.vision.depth,
            num_attention_heads=cfg.vision.heads,
            intermediate_size=cfg.vision.mlp_width,
            attn_implementation="sdpa",  # the eager form takes its softmax in float32
        )
    ).eval()


def torch_bert(cfg: ModelConfig, kind: str = "blip"):
    """`blip`: with cross-attention in every layer; `bert`: text only, with token types."""
    text = cfg.text
    sizes = {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.positions,
        "hidden_size": text.width,
        "num_hidden_layers": text.depth,
        "num_attention_heads": text.heads,
        "intermediate_size": text.mlp_width,
        "hidden_act": "gelu",
        "hidden_dropout_prob": text.dropout,
        "attention_probs_dropout_prob": text.dropout,
        "layer_norm_eps": 1e-12,
    }
    if kind == "bert":
        return BertModel(BertConfig(**sizes), add_pooling_layer=False).eval()
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "sep_token_id"))
    options = {"encoder_hidden_size": cfg.vision.width, "is_decoder": True, **tokens}
    return BlipTextModel(BlipTextConfig(**sizes, **options), add_pooling_layer=False).eval()


def torch_heads(cfg: ModelConfig) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict(
        {
            "vision_proj": torch.nn.Linear(cfg.vision.width, cfg.embed_dim),
            "text_proj": torch.nn.Linear(cfg.text.width, cfg.embed_dim),
            "itm_head": torch.nn.Linear(cfg.text.width, 2),
        }
    )


@torch.no_grad()
def redraw(module: torch.nn.Module, seed: int) -> None:
    """Every weight, bias and norm at random, float32 values in float64 arrays."""
    rng = np.random.default_rng(seed)
    module.double()
    for owner in module.modules():
        for name, value in owner.named_parameters(recurse=False):
            draw = rng.normal(size=tuple(value.shape))
            if value.ndim > 1:
                draw /= value[0].numel() ** 0.5
            else:
                is_scale = isinstance(owner, torch.nn.LayerNorm) and name == "weight"
                draw = 0.2 * draw + is_scale
            value.copy_(torch.from_numpy(draw.astype(np.float32)))


def official_state(clip, bert, heads) -> dict[str, np.ndarray]:
    """The modules' weights under the names of the official checkpoint."""
    state = {"temp": np.float32(0.07)}
    for name, value in clip.state_dict().items():
        state[f"visual_encoder.vision_model.{name.replace('post_layern', 'post_layrn')}"] = value
    state |= {f"text_encoder.{name}": value for name, value in bert.state_dict().items()}
    state |= heads.state_dict()
    return {name: np.asarray(value, np.float32) for name, value in state.items()}


@functools.lru_cache(maxsize=2)  # a base-size one takes gigabytes
def reference(cfg: ModelConfig):
    """Float64 modules (clip, bert with cross-attention, heads) and the same weights in our tree."""
    modules = torch_clip(cfg), torch_bert(cfg), torch_heads(cfg)
    for seed, module in enumerate(modules):
        redraw(module, seed)
    return *modules, torch_flip.params_from_official(official_state(*modules), cfg)


@torch.no_grad()
def outputs(modules, call) -> list[np.ndarray]:
    """What each of `modules` returns while `call` runs, in order."""
    seen = []
    hooks = [m.register_forward_hook(lambda _m, _i, out: seen.append(out)) for m in modules]
    call()
    for hook in hooks:
        hook.remove()
    return [out.numpy() for out in seen]


# Ours and inputs ----------------------------------------------------------------------------------


def run(cfg: ModelConfig, params, call, *arguments):
    """`call(model, *arguments)`, compiled."""
    graphdef = flip.build(cfg)
    compiled = jax.jit(lambda p, *a: call(nnx.merge(graphdef, p), *a), compiler_options=QUICK)
    return compiled(params, *arguments)


def blocks_of_vit(model, image):
    return model.vit(image, return_blocks=True)


def blocks_of_bert(model, ids, mask, *grounding):
    return model.bert(ids, mask, *grounding, return_blocks=True)


def images(cfg: ModelConfig, rows: int, seed: int = 0) -> np.ndarray:
    size = cfg.vision.image_size
    return np.random.default_rng(seed).normal(size=(rows, size, size, 3)).astype(np.float32)


def texts(cfg: ModelConfig, lengths, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Ids [N, width] that are random on the padding too, and the mask of `lengths`."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, cfg.text.vocab_size, (len(lengths), width)).astype(np.int32)
    return ids, np.arange(width) < np.asarray(lengths)[:, None]


def tokens(cfg: ModelConfig, rows: int, count: int, seed: int = 0) -> np.ndarray:
    shape = (rows, count, cfg.vision.width)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(*arrays):
    return [
        torch.from_numpy(a).double() if a.dtype == np.float32 else torch.from_numpy(a).long()
        for a in arrays
    ]


def close(ours, expected, atol=FLOAT32, what=""):
    assert ours.shape == expected.shape, what
    np.testing.assert_allclose(np.asarray(ours), expected, rtol=0, atol=atol, err_msg=what)


# Parity, layer by layer ---------------------------------------------------------------------------


def check_vision(cfg: ModelConfig, rows: int, atol=FLOAT32) -> None:
    clip, _, _, params = reference(cfg)
    image = images(cfg, rows)
    (pixels,) = to_torch(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    results = {}
    expected = outputs(
        clip.encoder.layers, lambda: results.update(clip(pixel_values=pixels).items())
    )
    last, blocks = run(cfg, params, blocks_of_vit, image)
    assert blocks.shape[0] == len(expected) == cfg.vision.depth
    for layer, value in enumerate(expected):
        close(blocks[layer], value, atol, f"block {layer}")
    normed = clip.post_layernorm(results["last_hidden_state"]).detach().numpy()
    close(last, normed, atol, "tokens after the post-norm")
    close(last[:, 0], results["pooler_output"].numpy(), atol, "pooler")


def check_text(cfg: ModelConfig, lengths, width: int, image_tokens=None, atol=FLOAT32) -> None:
    _, bert, _, params = reference(cfg)
    ids, mask = texts(cfg, lengths, width)
    grounding = () if image_tokens is None else (image_tokens,)
    arguments = dict(zip(("input_ids", "attention_mask"), to_torch(ids, mask), strict=True))
    if grounding:
        arguments["encoder_hidden_states"] = to_torch(image_tokens)[0]
    expected = outputs(bert.encoder.layer, lambda: bert(**arguments))
    last, blocks = run(cfg, params, blocks_of_bert, ids, mask, *grounding)
    assert blocks.shape[0] == len(expected) == cfg.text.depth
    for layer, value in enumerate(expected):
        close(blocks[layer], value, atol, f"block {layer}")
    close(last, expected[-1], atol)


VISION_SIZES = [
    {},
    {"image_size": 35},
    {"image_size": 98, "depth": 2},  # 197 tokens, as the base size has
    {"image_size": 20, "patch_size": 5, "width": 30, "heads": 5, "mlp_width": 31, "depth": 1},
    {"image_size": 7, "depth": 2},  # a single patch
]


@pytest.mark.parametrize("changes", VISION_SIZES)
def test_vision_tower(changes):
    check_vision(sized("vision", **changes), rows=3)


def test_vision_embeddings_and_pre_norm():
    clip, _, _, params = reference(SMALL)
    image = images(SMALL, 2)
    (pixels,) = to_torch(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    (expected,) = outputs([clip.pre_layrnorm], lambda: clip(pixel_values=pixels))
    # Without their residual branches the blocks hand through what they are given.
    blocks = jax.tree.map(np.copy, params["vit"]["blocks"])
    for part, last in (("attn", "out"), ("mlp", "down")):
        blocks[part][last] = jax.tree.map(np.zeros_like, blocks[part][last])
    params = params | {"vit": params["vit"] | {"blocks": blocks}}
    close(run(SMALL, params, blocks_of_vit, image)[1][-1], expected)


TEXT_SIZES = [{}, {"width": 45, "heads": 5, "mlp_width": 50, "depth": 1}]


@pytest.mark.parametrize("changes", TEXT_SIZES)
@pytest.mark.parametrize("image_tokens", [None, 10, 197])
def test_text_tower_at_every_length(changes, image_tokens):
    """All layers, all positions; the width of the image tokens is not that of the text."""
    cfg = sized("text", **changes)
    length = cfg.text.max_length
    seen = None if image_tokens is None else tokens(cfg, length, image_tokens)
    check_text(cfg, range(1, length + 1), length, seen)


def test_text_shorter_than_the_longest():
    check_text(SMALL, [4, 2, 5], 5)
    check_text(SMALL, [1, 1], 1)


@pytest.mark.parametrize("folded", [False, True])
def test_text_only_tower_is_bert_without_token_types(folded):
    """BERT's type-0 vector is zero, or is added to every position on our side."""
    bert, (clip, blip, heads, _) = torch_bert(SMALL, "bert"), reference(SMALL)
    redraw(bert, 7)
    types = bert.embeddings.token_type_embeddings.weight.data
    types *= folded
    state = official_state(clip, blip, heads)
    unused = [name for name in state if ".crossattention." in name]
    state |= {name: np.full_like(state[name], np.nan) for name in unused}
    state |= official_state(clip, bert, heads)
    position = "text_encoder.embeddings.position_embeddings.weight"
    state[position] = (state[position] + types[0].numpy()).astype(np.float32)
    ids, mask = texts(SMALL, range(1, 10), 9)
    torch_ids, torch_mask = to_torch(ids, mask)
    expected = outputs(
        bert.encoder.layer, lambda: bert(input_ids=torch_ids, attention_mask=torch_mask)
    )
    params = torch_flip.params_from_official(state, SMALL)
    _, blocks = run(SMALL, params, blocks_of_bert, ids, mask)
    for layer, value in enumerate(expected):
        close(blocks[layer], value, what=f"block {layer}")


def test_embeddings_and_match_logits():
    clip, bert, heads, params = reference(SMALL)
    image, (ids, mask) = images(SMALL, 3), texts(SMALL, [9, 4, 1], 9)
    pixels, torch_ids, torch_mask = to_torch(
        np.ascontiguousarray(image.transpose(0, 3, 1, 2)), ids, mask
    )
    normalize = functools.partial(torch.nn.functional.normalize, dim=-1)
    with torch.no_grad():
        image_tokens = clip.post_layernorm(clip(pixel_values=pixels).last_hidden_state)
        states = bert(input_ids=torch_ids, attention_mask=torch_mask).last_hidden_state
        expected = {
            "image": normalize(heads["vision_proj"](image_tokens[:, 0])),
            "text": normalize(heads["text_proj"](states[:, 0])),
        }
        for first_token in ("cls", "enc"):
            if first_token == "enc":
                torch_ids[:, 0] = SMALL.text.vocab_size - 1
            fused = bert(
                input_ids=torch_ids, attention_mask=torch_mask, encoder_hidden_states=image_tokens
            )
            expected[first_token] = heads["itm_head"](fused.last_hidden_state[:, 0])

    def call(model, image, ids, mask):
        seen, image_embed = model.encode_image(image)
        match = {t: model.match(ids, mask, seen, first_token=t) for t in ("cls", "enc")}
        return {"image": image_embed, "text": model.encode_text(ids, mask)[1]} | match

    ours = run(SMALL, params, call, image, ids, mask)
    for name, value in expected.items():
        close(ours[name], value.numpy(), what=name)
        assert ours[name].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large at depth 2"])
def test_published_sizes(size):
    cfg = dataclasses.replace(config.Config().model, dtype="float32")
    if size != "base":
        cfg = dataclasses.replace(
            cfg,
            vision=VisionConfig(patch_size=14, width=1024, depth=2, heads=16, mlp_width=4096),
            text=dataclasses.replace(cfg.text, width=1024, depth=2, heads=16, mlp_width=4096),
        )
    check_vision(cfg, rows=2, atol=2e-5)
    seen = tokens(cfg, 2, cfg.vision.patches + 1)
    check_text(cfg, [65, 11], cfg.text.max_length, atol=2e-5)
    check_text(cfg, [65, 11], cfg.text.max_length, seen, atol=2e-5)


# Properties ---------------------------------------------------------------------------------------


def test_padding_changes_nothing():
    *_, params = reference(SMALL)
    ids, mask = texts(SMALL, range(1, 10), 9)
    other = np.where(mask, ids, texts(SMALL, range(1, 10), 9, seed=1)[0])
    assert np.any(other != ids)
    states = [run(SMALL, params, blocks_of_bert, i, mask)[0] for i in (ids, other)]
    np.testing.assert_array_equal(states[0][mask], states[1][mask])


@pytest.mark.parametrize(
    ("index", "rows"),
    [
        (np.array([2, 0, 0, 1, 2], np.int32), [2, 0, 0, 1, 2]),
        (np.zeros(5, np.int32), [0] * 5),
        ((1, 0, 1), [1, 0, 1, 3, 2, 3]),
        ((0, np.array([2, 0, 0], np.int32)), [0, 2, 1, 0, 2, 0]),
        ((0, np.zeros(1, np.int32), 0), [0, 0, 0]),
        (np.array([1, 0, 1], np.int32), [1, 1, 0, 0, 1, 1]),
        (None, [0, 0, 1, 1, 2, 2]),
    ],
    ids=["three", "one", "two groups", "own and any", "own is any", "each two", "the next two"],
)
def test_texts_share_an_image(index, rows):
    """Value, and gradient into the image tokens, as if the images were repeated."""
    *_, params = reference(SMALL)
    ids, mask = texts(SMALL, [9, 3, 5, 1, 7, 4][: len(rows)], 9)
    seen, rows = tokens(SMALL, max(rows) + 1, 10), np.array(rows)

    def call(model, ids, mask, seen):
        def logits(seen, index):
            return model.match(ids, mask, seen, index)

        def value_and_grad(logits):
            weights = jnp.arange(1.0, 2 * len(rows) + 1).reshape(-1, 2)
            return logits(seen), jax.grad(lambda s: jnp.sum(weights * logits(s)))(seen)

        shared = value_and_grad(lambda s: logits(s, index))
        return shared, value_and_grad(lambda s: logits(s[rows], None))

    ours, expected = run(SMALL, params, call, ids, mask, seen)
    close(ours[0], expected[0], 1e-6)
    close(ours[1], expected[1], 1e-5)
    assert np.all(np.abs(expected[1]).max(axis=(1, 2)) > 1e-2)


@pytest.mark.parametrize("remat", ["none", "dots"])
def test_keys_values_of_images_made_beforehand(remat):
    """What the fused tower makes of them is what it makes of the tokens, gradient included."""
    *_, params = reference(SMALL)
    ids, mask = texts(SMALL, [9, 3, 5, 1], 9)
    index, weights = np.array([1, 0, 1, 2], np.int32), jnp.arange(1.0, 9.0).reshape(4, 2)

    def call(model, ids, mask, seen):
        def logits(seen, made):
            images = model.image_keys_values(seen) if made else seen
            states = model.bert(ids, mask, images, index)
            return model.match(ids, mask, images, index), states

        def total(seen, made):
            matches, states = logits(seen, made)
            return jnp.sum(weights * matches) + jnp.sum(states[:, 2])

        return [(logits(seen, m), jax.grad(total)(seen, m)) for m in (True, False)]

    cfg = dataclasses.replace(SMALL, remat=remat)
    made, plain = run(cfg, params, call, ids, mask, tokens(SMALL, 3, 10))
    for ours, expected in zip(jax.tree.leaves(made), jax.tree.leaves(plain), strict=True):
        close(ours, expected, 1e-5)
    assert np.all(np.abs(plain[1]).max(axis=(1, 2)) > 1e-2)


@pytest.mark.parametrize("count", [3, 6])
def test_texts_that_images_do_not_divide(count):
    """Also where halves of texts would fit: two images per text."""
    *_, params = reference(SMALL)
    ids, mask = texts(SMALL, [8] * (4 if count == 3 else 3), 8)

    def call(model, ids, mask, seen):
        return model.match(ids, mask, seen)

    with pytest.raises(ValueError, match=f"{len(ids)} rows of queries cannot share {count} rows"):
        run(SMALL, params, call, ids, mask, tokens(SMALL, count, 10))


def test_bfloat16_compute():
    """2 % of the spread: ten roundings in a row of 2^-9 each, which is half a unit of bfloat16."""
    *_, params = reference(SMALL)
    half = dataclasses.replace(SMALL, dtype="bfloat16")
    # Of few logits the spread of the errors is a matter of luck.
    rows = 32
    image, (ids, mask) = images(SMALL, rows), texts(SMALL, [9, 4, 1, 6] * (rows // 4), 9)

    def call(model, image, ids, mask):
        image_tokens, image_embed = model.encode_image(image)
        text_tokens, text_embed = model.encode_text(ids, mask)
        logits = model.match(ids, mask, image_tokens)
        return (image_tokens, text_tokens), (image_embed, text_embed, logits)

    (inner, outer), expected = (run(cfg, params, call, image, ids, mask) for cfg in (half, SMALL))
    assert all(x.dtype == jnp.bfloat16 for x in inner)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((outer, expected)))
    for ours, exact in zip(inner + outer, sum(expected, ()), strict=True):
        error = jnp.std(ours.astype(jnp.float32) - exact) / jnp.std(exact)
        assert 2**-9 < float(error) < 10 * 2**-9
    for embed in outer[:2]:
        close(jnp.linalg.norm(embed, axis=-1), np.ones(rows), 1e-6)


@pytest.mark.slow
def test_rematerialisation_changes_memory_only():
    *_, params = reference(SMALL)
    inputs = images(SMALL, 64), *texts(SMALL, [9] * 64, 9)

    def compiled(remat):
        graphdef = flip.build(dataclasses.replace(SMALL, remat=remat))

        def loss(params, image, ids, mask):
            model = nnx.merge(graphdef, params)
            return jnp.sum(jnp.sin(model.vit(image))) + jnp.sum(jnp.sin(model.bert(ids, mask)))

        return jax.jit(jax.value_and_grad(loss)).lower(params, *inputs).compile(QUICK)

    programs = {remat: compiled(remat) for remat in ("none", "dots", "full")}
    memory = {r: p.memory_analysis().temp_size_in_bytes for r, p in programs.items()}
    assert memory["full"] < memory["dots"] < memory["none"]
    value, grads = programs["none"](params, *inputs)

    def modules(tree):  # a key bias has no gradient but rounding noise: measure it by its kernel
        is_module = lambda n: isinstance(n, dict) and "bias" in n  # noqa: E731
        return [ravel_pytree(m)[0] for m in jax.tree.leaves(tree, is_leaf=is_module)]

    for remat in ("dots", "full"):
        other_value, other_grads = programs[remat](params, *inputs)
        np.testing.assert_allclose(other_value, value, rtol=1e-6)
        for ours, expected in zip(modules(other_grads), modules(grads), strict=True):
            close(ours, expected, 1e-6 * float(jnp.abs(expected).max()))


# Patch masking ------------------------------------------------------------------------------------


def test_kept_patches():
    x = jnp.broadcast_to(jnp.arange(25.0)[None, :, None], (2000, 25, 2))
    kept = np.asarray(jax.jit(keep_random_patches, static_argnums=1)(x, 7, jax.random.key(0)))
    assert kept.shape == (2000, 7, 2)
    assert np.all(np.diff(kept[..., 0], axis=1) >= 1)  # in order, none twice
    np.testing.assert_array_equal(kept[..., 0], kept[..., 1])
    share = np.bincount(kept[..., 0].astype(int).ravel(), minlength=25) / 2000
    np.testing.assert_allclose(share, 7 / 25, atol=5 * (0.28 * 0.72 / 2000) ** 0.5)
    np.testing.assert_array_equal(keep_random_patches(x, 25, jax.random.key(1)), x)


def test_masked_tower_sees_the_kept_patches_only():
    """Equal to the reference on the class token and those patches; no gradient to the others."""
    cfg = sized("vision", image_size=35, keep_patches=6)
    clip, *_, params = reference(cfg)
    image, key = images(cfg, 3), jax.random.key(5)
    index = jnp.broadcast_to(jnp.arange(25)[None, :, None], (3, 25, 1))
    kept = np.asarray(keep_random_patches(index, 6, key))[..., 0]

    def call(model, image, key):
        masked, back = jax.vjp(lambda i: model.vit(i, key), image)
        return masked, model.vit.patches(*back(jnp.cos(masked)))

    masked, grad = run(cfg, params, call, image, key)
    (pixels,) = to_torch(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))
    rows = np.concatenate([np.zeros((3, 1), int), 1 + kept], axis=1)
    with torch.no_grad():
        embedded = clip.embeddings(pixels)[torch.arange(3)[:, None], torch.from_numpy(rows)]
        states = clip.encoder(inputs_embeds=clip.pre_layrnorm(embedded)).last_hidden_state
        expected = clip.post_layernorm(states).numpy()
    close(masked, expected)
    reached = np.abs(grad).max(axis=-1) > 0
    np.testing.assert_array_equal(reached, (np.arange(25) == kept[..., None]).any(axis=1))


def test_all_patches_without_a_key_and_when_all_are_kept():
    *_, params = reference(SMALL)
    image, key = images(SMALL, 2), jax.random.key(0)
    expected, _ = run(SMALL, params, blocks_of_vit, image)

    def call(model, image, key):
        return model.vit(image, key), model.vit(image)

    kept_all, _ = run(sized("vision", keep_patches=9), params, call, image, key)
    kept_some, without_key = run(sized("vision", keep_patches=4), params, call, image, key)
    assert kept_some.shape == (2, 5, 48)
    close(kept_all, expected, 1e-6)
    close(without_key, expected, 1e-6)


# Dropout ------------------------------------------------------------------------------------------


def test_dropout():
    x = jnp.full((400, 500), 3.0)
    assert dropout(x, 0.3, None) is x and dropout(x, 0.0, jax.random.key(0)) is x
    dropped = np.asarray(dropout(x, 0.3, jax.random.key(0)))
    kept = dropped != 0
    np.testing.assert_allclose(dropped[kept], 3 / 0.7, rtol=1e-6)
    assert kept.mean() == pytest.approx(0.7, abs=5 * (0.21 / x.size) ** 0.5)
    assert dropout(x.astype(jnp.bfloat16), 0.3, jax.random.key(0)).dtype == jnp.bfloat16
    assert (dropout(x, 1e-12, jax.random.key(0)) != 0).all()  # less than the least probability
    assert (dropout(x, 1 - 1e-12, jax.random.key(0)) == 0).mean() > 0.99


def test_random_words_of_a_key():
    """As if drawn: each bit, all values, elements near each other on any axis, and keys near each
    other. Bounds are five standard deviations."""
    seeds = [jax.random.key(seed) for seed in range(8)]  # not mixed: their words are 0 and the seed
    keys = [*seeds, *jax.random.split(seeds[0], 8)]
    words = np.stack([random_words(jax.random.key_data(key), (20, 6, 37, 65)) for key in keys])
    assert words.dtype == np.uint32
    bits = [(words >> bit & 1).mean(axis=(1, 2, 3, 4)) for bit in range(32)]
    assert np.abs(np.array(bits) - 0.5).max() < 5 * 0.5 / words[0].size ** 0.5
    expected = words[0].size / 256
    for each in words:
        squares = (np.bincount(each.ravel() >> 24, minlength=256) - expected) ** 2 / expected
        assert abs(squares.sum() - 255) < 5 * (2 * 255) ** 0.5
    values = (words / 2**32 - 0.5) * 12**0.5  # variance 1

    def uncorrelated(a, b):
        assert abs(np.mean(a * b)) < 5 / a.size**0.5

    for axis in range(1, 5):
        for apart in (1, 2, 4, 8, 16, 32):
            if apart < values.shape[axis]:
                ends = np.split(values, [apart], axis), np.split(values, [-apart], axis)
                uncorrelated(ends[0][1], ends[1][0])
    for a, b in itertools.combinations(values, 2):
        uncorrelated(a, b)


def test_what_is_dropped_is_the_same_on_any_number_of_devices():
    x, key = jnp.ones((16, 3, 5, 7)), jax.random.key(3)
    wanted = dropout(x, 0.3, key)
    for devices in (2, 8):
        mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
        place = NamedSharding(mesh, PartitionSpec("data"))
        found = jax.jit(lambda x: dropout(x, 0.3, key), out_shardings=place)(
            jax.device_put(x, place)
        )
        np.testing.assert_array_equal(found, wanted)


def test_dropout_of_attention_probabilities():
    query = jnp.zeros((1, 1, 300, 4))
    value = jnp.eye(200)[None, None]  # the result is the probabilities
    key = jnp.zeros((1, 1, 200, 4))
    probabilities = attend(
        query, key, value, dropout_rate=0.25, dropout_key=jax.random.key(0)
    ).ravel()
    assert set(np.round(np.unique(probabilities) * 200, 4)) == {0.0, np.float32(1.3333)}
    assert np.mean(probabilities != 0) == pytest.approx(0.75, abs=5 * (0.1875 / 60_000) ** 0.5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_dropout_of_stacked_layers(remat):
    """Another mask in every layer; the backward pass has those of the forward pass."""
    *_, params = reference(SMALL)
    blocks = nnx.merge(flip.build(SMALL), params).bert.blocks

    def stack(x):
        return scan_blocks(
            blocks,
            x,
            lambda _block, x, key: x + dropout(x, 0.5, key),  # times 1 or 3
            key=jax.random.key(0),
            remat=remat,
            collect=True,
        )

    ones = jnp.ones((2, 9, 36))
    last, back, layers = jax.vjp(stack, ones, has_aux=True)
    factors = np.asarray(layers / jnp.concatenate([ones[None], layers[:-1]]))
    assert set(np.unique(factors)) == {1.0, 3.0}
    for a, b in ((0, 1), (0, 2), (1, 2)):  # independent masks agree in half of the places
        agree = np.mean(factors[a] == factors[b])
        assert agree == pytest.approx(0.5, abs=5 * 0.5 / ones.size**0.5)
    np.testing.assert_array_equal(back(ones)[0], last)


@pytest.mark.parametrize("grounded", [False, True])
def test_dropout_is_where_the_reference_has_it(grounded):
    """Mean and variance of every output over many draws, as in train mode of `transformers`."""
    cfg = dataclasses.replace(
        sized("text", depth=1, dropout=0.3), vision=dataclasses.replace(SMALL.vision, width=12)
    )
    _, bert, _, params = reference(cfg)
    draws = 6000
    ids, mask = (np.repeat(a, draws, axis=0) for a in texts(cfg, [3], 4))
    seen = np.repeat(tokens(cfg, 1, 3), draws, axis=0)

    def call(model, ids, mask, seen, key):
        states = [model.bert(ids, mask, seen if grounded else None, key=k) for k in (key, None)]
        return states[0], states[1][0]

    ours, still = run(cfg, params, call, ids, mask, seen, jax.random.key(0))
    assert np.all(np.std(ours, axis=0) > 0.05) and np.max(np.abs(ours - still)) > 0.5
    torch.manual_seed(0)
    torch_ids, torch_mask, torch_seen = to_torch(ids, mask, seen)
    arguments = {"encoder_hidden_states": torch_seen.float()} if grounded else {}
    bert.float().train()
    with torch.no_grad():
        theirs = bert(input_ids=torch_ids, attention_mask=torch_mask, **arguments)
    bert.double().eval()
    ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs.last_hidden_state))
    # Standard errors of a difference of means and of log standard deviations, kurtosis included.
    scale = theirs.std(axis=0)
    error = scale * (2 / draws) ** 0.5
    assert np.abs((ours.mean(axis=0) - theirs.mean(axis=0)) / error).max() < 5
    kurtosis = (((theirs - theirs.mean(axis=0)) / scale) ** 4).mean(axis=0)
    error = ((kurtosis - 1) / 4 * 2 / draws) ** 0.5
    assert np.abs(np.log(ours.std(axis=0) / scale) / error).max() < 5


# Start values, twins, queue -----------------------------------------------------------------------


def test_start_values():
    """Tensor by tensor the distribution that `transformers` and torch start from."""
    cfg = dataclasses.replace(
        sized("vision", image_size=56, width=96, depth=4),
        text=dataclasses.replace(SMALL.text, vocab_size=2000, positions=64, width=64),
        embed_dim=64,
    )
    init = jax.jit(lambda key: flip.init_params(cfg, 0.07, key), compiler_options=QUICK)
    params = init(jax.random.key(0))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    ours = torch_flip.params_to_official(params, cfg)
    torch.manual_seed(0)
    modules = torch_clip(cfg), torch_bert(cfg), torch_heads(cfg)
    theirs = official_state(*modules)
    theirs["text_encoder.embeddings.word_embeddings.weight"] = theirs[
        "text_encoder.embeddings.word_embeddings.weight"
    ][1:]  # torch zeroes [PAD]
    for name, value in ours.items():
        expected = theirs[name]
        if np.ptp(expected) == 0:  # zero biases, unit norms, the temperature
            np.testing.assert_array_equal(value, expected, err_msg=name)
            continue
        assert abs(value.mean()) < 5 * expected.std() / value.size**0.5, name
        noise = (1 / value.size) ** 0.5  # of the log ratio of two normal standard deviations
        assert abs(np.log(value.std() / expected.std())) < 5 * noise, name
        is_head = "_proj." in name.replace("out_proj", "") and "encoder" not in name
        if is_head or name.startswith("itm_head"):
            fan_in = cfg.vision.width if name.startswith("vision") else cfg.text.width
            assert np.abs(value).max() <= fan_in**-0.5, name
        elif value.size > 5000:
            assert np.mean(np.abs(value) > 2.5 * value.std()) > 0.005, f"{name} is truncated"
    blocks = params["vit"]["blocks"]["attn"]
    kernels = [*blocks["query"]["kernel"], *blocks["key"]["kernel"], *blocks["value"]["kernel"]]
    gram = np.corrcoef(np.stack([np.ravel(k) for k in kernels]))
    assert np.abs(gram - np.eye(len(kernels))).max() < 5 / 96  # layers and roles are independent
    same, other = init(jax.random.key(0)), init(jax.random.key(1))
    for a, b, c in zip(*(jax.tree.leaves(p) for p in (params, same, other)), strict=True):
        constant = np.ptp(a) == 0
        assert np.array_equal(a, b) and np.array_equal(a, c) == constant


def test_twins():
    *_, params = reference(SMALL)
    twin = flip.twin_params(params)
    assert set(twin) == {"vit", "bert", "image_proj", "text_proj"}
    rng = np.random.default_rng(0)
    twin = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), twin)
    moved = jax.jit(flip.update_twin, static_argnums=2)(twin, params, 0.995)
    for ours, before, online in zip(
        *(jax.tree.leaves(t) for t in (moved, twin, flip.twin_params(params))), strict=True
    ):
        expected = 0.995 * before.astype(np.float64) + 0.005 * online.astype(np.float64)
        scale = np.abs(before) + np.abs(online)
        assert np.all(np.abs(ours - expected) <= 2**-23 * scale)  # two roundings


def test_start_of_the_queue():
    queue = flip.init_queue(501, 11, jax.random.key(0))
    for name in ("image", "text"):
        assert queue[name].shape == (501, 11) and queue[name].dtype == jnp.float32
        close(np.linalg.norm(queue[name], axis=1), np.ones(501), 1e-6)
        assert np.abs(np.mean(queue[name], axis=0)).max() < 5 / (11 * 501) ** 0.5
    assert np.abs(np.mean(np.sum(queue["image"] * queue["text"], axis=1))) < 5 / (11 * 501) ** 0.5
    assert set(np.asarray(queue["group"])) == {-100} and queue["group"].dtype == jnp.int32
    assert int(queue["pointer"]) == 0 and queue["pointer"].dtype == jnp.int32


@pytest.mark.parametrize(("size", "batch"), [(10, 4), (12, 4), (5, 5), (7, 1)])
def test_queue_wraps(size, batch):
    rng = np.random.default_rng(0)
    queue = flip.init_queue(size, 3, jax.random.key(0))
    expected, pointer = {n: np.array(queue[n]) for n in ("image", "text", "group")}, 0
    write = jax.jit(flip.enqueue)
    for step in range(2 * size // batch + 2):
        image, text = rng.normal(size=(2, batch, 3)).astype(np.float32)
        group = rng.integers(0, 99, batch).astype(np.int32)
        queue = write(queue, image, text, group)
        for row in range(batch):
            place = (step * batch + row) % size
            expected["image"][place], expected["text"][place] = image[row], text[row]
            expected["group"][place] = group[row]
        pointer = (pointer + batch) % size
        assert int(queue["pointer"]) == pointer
        for name, value in expected.items():
            np.testing.assert_array_equal(queue[name], value, err_msg=name)
            assert queue[name].dtype == value.dtype
