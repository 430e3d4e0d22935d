"""FLIP: two towers, two projections into one embedding, a matching head, a temperature.

Source: arXiv 2407.08515, models/fflip_pretrain.py of the official code. The currency of training
is the plain dict of arrays of `init_params`; `build` gives the static graph that turns such a
dict back into a `Flip` (`nnx.merge(graphdef, params)`).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from flip_jax.config import ModelConfig
from flip_jax.models.bert import Bert, ImageIndex, Images
from flip_jax.models.captioner import CaptionHead
from flip_jax.models.layers import precision_of
from flip_jax.models.mim import TEACHER, MimDecoder
from flip_jax.models.vit import VisionTransformer, pixels_of

Array = jax.Array
Params = dict  # nested dict[str, Array]

# Parameters of a model with that loss alone; weights of another may have them in excess.
OF_A_LOSS = ("logit_bias", "mim", "caption_head")
# Parameters without a momentum twin; of `mim` the twin may need a part, see `twin_params`.
ONLINE_ONLY = ("itm_head", "temperature", *OF_A_LOSS)


def _linear(width: int, out: int, rngs: nnx.Rngs) -> nnx.Linear:
    """Head in float32 with torch's default start: uniform +-1/sqrt(width), bias too."""

    def uniform(key: Array, shape: tuple[int, ...], dtype=jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -(width**-0.5), width**-0.5)

    precision = precision_of(jnp.float32)
    start = {"kernel_init": uniform, "bias_init": uniform}
    return nnx.Linear(width, out, **start, precision=precision, rngs=rngs)


def unit_norm(x: Array) -> Array:
    """x / max(|x|, 1e-12) over the last axis, float32 (torch's F.normalize)."""
    x = x.astype(jnp.float32)
    # Under the root, so that the gradient at the zero vector is 0 and not NaN.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, -1, keepdims=True), 1e-24))


class Flip(nnx.Module):
    """encode_image, encode_text and match.

    Shapes: B images, N texts, S text tokens, Si image tokens, D widths, E joint embedding.
    """

    def __init__(self, cfg: ModelConfig, temperature: float, rngs: nnx.Rngs):
        dtype = jnp.dtype(cfg.dtype)
        options = {"dtype": dtype, "remat": cfg.remat, "rngs": rngs}
        self.enc_id, self.dec_id = cfg.text.enc_id, cfg.text.dec_id
        self.vit = VisionTransformer(cfg.vision, **options)
        self.bert = Bert(cfg.text, cfg.vision.width, **options)
        self.image_proj = _linear(cfg.vision.width, cfg.embed_dim, rngs)
        self.text_proj = _linear(cfg.text.width, cfg.embed_dim, rngs)
        self.itm_head = _linear(cfg.text.width, 2, rngs)
        self.temperature = nnx.Param(jnp.asarray(temperature, jnp.float32))
        if cfg.logit_bias is not None:
            self.logit_bias = nnx.Param(jnp.asarray(cfg.logit_bias, jnp.float32))
        if cfg.mim_depth:
            self.mim = MimDecoder(cfg, **options)
        if cfg.caption_head:
            self.caption_head = CaptionHead(cfg.text, dtype=dtype, rngs=rngs)

    def encode_image(self, image: Array, key: Array | None = None) -> tuple[Array, Array]:
        """Image tokens and embedding.

        Args:
          image: uint8 [B, H, W, 3], normalised here; or float32, normalised already.
          key: patch masking; None keeps all patches.

        Returns:
          image_tokens [B, Si, D] in the compute dtype; image_embed float32 [B, E], unit norm.
        """
        tokens = self.vit(pixels_of(image), key)
        return tokens, unit_norm(self.image_proj(tokens[:, 0].astype(jnp.float32)))

    def embed_image(self, image: Array, key: Array | None = None) -> Array:
        """The embedding of `encode_image` without the tokens, which costs less."""
        tokens = self.vit(pixels_of(image), key, first_only=True)
        return unit_norm(self.image_proj(tokens[:, 0].astype(jnp.float32)))

    def encode_text(
        self, token_ids: Array, token_mask: Array, key: Array | None = None
    ) -> tuple[Array, Array]:
        """Text tokens [N, S, D] and embedding float32 [N, E], unit norm.

        Args:
          token_ids: int32 [N, S] with [CLS] first; token_mask: bool [N, S], True = real.
          key: dropout; None = deterministic.
        """
        tokens = self.bert(token_ids, token_mask, key=key)
        return tokens, unit_norm(self.text_proj(tokens[:, 0].astype(jnp.float32)))

    def embed_text(self, token_ids: Array, token_mask: Array, key: Array | None = None) -> Array:
        """The embedding of `encode_text` without the tokens, which costs less."""
        tokens = self.bert(token_ids, token_mask, key=key, first_only=True)
        return unit_norm(self.text_proj(tokens[:, 0].astype(jnp.float32)))

    def image_keys_values(self, image_tokens: Array) -> tuple[Array, Array]:
        """What texts look at of images [M, Si, D]: keys and values [L, M, H, Si, K] of L layers."""
        return self.bert.image_keys_values(image_tokens)

    def match(
        self,
        token_ids: Array,
        token_mask: Array,
        image_tokens: Images,
        image_index: ImageIndex = None,
        key: Array | None = None,
        *,
        first_token: str = "enc",
    ) -> Array:
        """ITM logits float32 [N, 2] of each text against the image it looks at; class 1 = match.

        Args: see `fuse`.
        """
        texts = token_ids, token_mask
        return self.itm_head(
            self.fuse(*texts, image_tokens, image_index, key, first_token=first_token)
        )

    def fuse(
        self,
        token_ids: Array,
        token_mask: Array,
        image_tokens: Images,
        image_index: ImageIndex = None,
        key: Array | None = None,
        *,
        first_token: str = "enc",
    ) -> Array:
        """First token float32 [N, D] of each text that looks at an image.

        Args:
          token_ids, token_mask: [N, S] as `encode_text` takes them.
          image_tokens: [M, Si, D] from `encode_image`, or what `image_keys_values` made of them.
          image_index: which image that is. int32 [G], G divides N: the N / G consecutive texts of
            group g look at image image_index[g], with G = N text n at image_index[n]. A tuple:
            texts and images come in equal groups, text t of group g looks at image image_index[t]
            of that group, or, where that is int32 [groups], at image image_index[t][g] of all.
            None: each N / M consecutive texts look at the next image.
          key: dropout; None = deterministic.
          first_token: `enc` puts [ENC] in the place of [CLS] as in training; `cls` leaves it, as
            the reference's evaluation did.
        """
        if first_token == "enc":
            token_ids = jnp.asarray(token_ids).at[:, 0].set(self.enc_id)
        fused = self.bert(token_ids, token_mask, image_tokens, image_index, key, first_only=True)
        return fused[:, 0].astype(jnp.float32)

    def caption_logits(
        self, token_ids: Array, token_mask: Array, image_tokens: Array, key: Array | None = None
    ) -> Array:
        """Logits float32 [N, S, V] of the word after each, given the image and the words up to it.

        Args:
          token_ids, token_mask: [N, S] as `encode_text` takes them; [DEC] takes the place of [CLS].
          image_tokens: [N, Si, D] from `encode_image`.
          key: dropout; None = deterministic.
        """
        token_ids = jnp.asarray(token_ids).at[:, 0].set(self.dec_id)
        states = self.bert(token_ids, token_mask, image_tokens, key=key, causal=True)
        return self.caption_head(states, self.bert.word_embed[...])

    def predict_hidden(self, image: Array, hidden: Array) -> dict[str, Array]:
        """What a picture shows at its hidden patches.

        Args:
          image: uint8 [B, H, W, 3] (or float32, normalised); hidden: int32 [B, M], patches.

        Returns:
          see `MimDecoder.__call__`.
        """
        rows = jnp.arange(len(hidden))[:, None]
        patches = len(self.vit.position_embed[...]) - 1
        mask = jnp.zeros((len(hidden), patches), bool).at[rows, hidden].set(True)
        return self.mim(self._encode_hidden(image, mask, self.mim.mask_token[...]), hidden)

    def expected_losses(self, image: Array) -> Array:
        """How hard each patch of a picture in full view would be to guess, float32 [B, N]."""
        patches = len(self.vit.position_embed[...]) - 1
        seen = jnp.zeros((len(image), patches), bool)
        return self.mim.expected_losses(self._encode_hidden(image, seen, self.mim.mask_token[...]))

    def _encode_hidden(self, image: Array, mask: Array, mask_token: Array) -> Array:
        return self.vit.encode_hidden(pixels_of(image), mask, mask_token)


def build(cfg: ModelConfig) -> nnx.GraphDef:
    """The static part of the model: `nnx.merge(build(cfg), params)` is a `Flip`. No arrays."""
    return nnx.split(nnx.eval_shape(lambda: Flip(cfg, 1.0, nnx.Rngs(0))))[0]


def init_params(cfg: ModelConfig, temperature: float, key: Array) -> Params:
    """Fresh float32 parameters, a nested dict; jit-able."""
    return nnx.to_pure_dict(nnx.state(Flip(cfg, temperature, nnx.Rngs(key))))


def twin_params(params: Params) -> Params:
    """The part of the parameters that has a momentum twin: both towers, both projections.

    With `model.mim_loss_head` also what says which patches are hard.
    """
    twins = {name: value for name, value in params.items() if name not in ONLINE_ONLY}
    if "loss_head" in params.get("mim", {}):
        twins["mim"] = {name: params["mim"][name] for name in TEACHER}
    return twins


def with_twins(params: Params, twins: Params) -> Params:
    """Parameters of a whole model, from the twins where they are."""
    whole = params | twins
    if "mim" in twins:
        whole["mim"] = params["mim"] | twins["mim"]
    return whole


def update_twin(twin: Params, params: Params, momentum: float) -> Params:
    """twin * momentum + params * (1 - momentum), leaf by leaf."""
    return jax.tree.map(lambda m, p: m * momentum + p * (1.0 - momentum), twin, twin_params(params))


def init_queue(size: int, embed_dim: int, key: Array) -> dict[str, Array]:
    """A queue of random unit vectors, as the reference starts: image, text [Q, E], group [Q]."""
    image, text = jax.random.normal(key, (2, size, embed_dim))
    return {
        "image": unit_norm(image),
        "text": unit_norm(text),
        "group": jnp.full((size,), -100, jnp.int32),
        "pointer": jnp.zeros((), jnp.int32),
    }


def enqueue(queue: dict[str, Array], image: Array, text: Array, group: Array) -> dict[str, Array]:
    """Overwrite B rows in batch order from the pointer on, round the end if need be.

    Args:
      queue: see `init_queue`; image, text: embeddings float32 [B, E]; group: int32 [B].
    """
    size = len(queue["group"])
    rows = (queue["pointer"] + jnp.arange(len(group))) % size
    return {
        "image": queue["image"].at[rows].set(image, unique_indices=True),
        "text": queue["text"].at[rows].set(text, unique_indices=True),
        "group": queue["group"].at[rows].set(group, unique_indices=True),
        "pointer": (queue["pointer"] + len(group)) % size,
    }
