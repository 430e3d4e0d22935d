"""What the frozen encoders make of photos, sketches and captions, computed once for all heads.

Shapes: N faces, K steps of each sketch, C captions of each face, W feature, D vision and Dt text
width, M draws of negatives.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flip_jax.downstream.attribute_head import normalize_states
from flip_jax.downstream.backbone import Backbone, Rows, block_states, pool_tokens
from flip_jax.downstream.features import FeatureCache
from flip_jax.downstream.retrieval_features import FrozenGallery, FusedTower
from flip_jax.downstream.slfir_sketches import PartialSketches, SketchFaces
from flip_jax.losses.itm import sample_hard_negatives
from flip_jax.models.flip import Flip

Array = jax.Array

# `class`: the class token, W = D. `layers`: behind it, the class token, mean and maximum over
# patches of several blocks, each normalised, W = (1 + V) D; see `backbone.pool_states`. `grid`:
# behind these, means over the cells of a grid of the first of the blocks, normalised; of all that
# is here only they say where a line is.
KINDS = ("class", "layers", "grid")
CELLS = 4  # of the grid on each side; fewer where there are fewer patches


@dataclass(frozen=True)
class PairFeatures:
    """Pairs of photo and sketch before any projection.

    Attributes:
      photo: float16 [N, W].
      sketch: float16 [N, K, W].
      text: float32 [N, C, Dt], captions of the photo.
      group: int32 [N], equal for pictures of one person.
    """

    photo: np.ndarray
    sketch: np.ndarray
    text: np.ndarray
    group: np.ndarray

    def take(self, photos: np.ndarray, sketches: np.ndarray) -> PairFeatures:
        """Other pairs: photo and captions of rows `photos`, sketch of rows `sketches`."""
        return PairFeatures(
            self.photo[photos], self.sketch[sketches], self.text[photos], self.group[photos]
        )


def encode_faces(
    backbone: Backbone,
    drawn: SketchFaces,
    chosen: np.ndarray,
    gallery: FrozenGallery,
    kind: str,
    cache: FeatureCache,
) -> PairFeatures:
    """Each face with its own sketch.

    Args:
      chosen: int [N, K], steps 1..T of each sketch.
      gallery: `drawn.faces` with C captions of each.
      kind: of `KINDS`.
    """
    function, output = _image_function(kind, backbone.blocks), f"slfir features, {kind}, float16"
    photo = cache.of_images(backbone, drawn.faces, output, function)
    rows = PartialSketches(drawn, chosen)
    what = backbone.identity | {"output": f"{output}, of partial sketches"} | rows.key()
    sketch = cache.get(what, len(rows), lambda: backbone.stream_rows(function, rows))
    text = text_features(backbone, gallery.texts)
    return PairFeatures(
        photo=np.asarray(photo),
        sketch=np.asarray(sketch).reshape(*chosen.shape, -1),
        text=text[caption_rows(gallery)],
        group=drawn.faces.groups.astype(np.int32),
    )


def image_features(backbone: Backbone, images: Rows, kind: str) -> np.ndarray:
    """Float16 [N, W] of photos or sketches, uint8 [N, S, S, 3]."""
    return backbone.map_rows(_image_function(kind, backbone.blocks), images)


def text_features(backbone: Backbone, texts: Sequence[str]) -> np.ndarray:
    """Float32 [N, Dt]."""
    return backbone.map_rows(_text_class, *backbone.tokenizer(texts))


def caption_rows(gallery: FrozenGallery) -> np.ndarray:
    """Numbers of each picture's captions, repeated where there are fewer: int64 [N, C]."""
    counts = np.bincount(gallery.image_of)
    first = np.cumsum(counts) - counts
    return first[:, None] + np.arange(gallery.captions) % counts[:, None]


def fused_features(
    tower: FusedTower,
    gallery: FrozenGallery,
    images: np.ndarray,
    texts: np.ndarray,
    cache: FeatureCache,
) -> np.ndarray:
    """What image-text matching sees: the first token of text p that looks at image p.

    Args:
      images, texts: int [P], numbers in `gallery`; a pair that is there twice is computed once.

    Returns:
      float32 [P, Dt]
    """
    pairs, where = np.unique(images * len(gallery.texts) + texts, return_inverse=True)
    asked = np.divmod(pairs, len(gallery.texts))
    rows = tower.backbone.tokenizer(gallery.texts)

    def parts() -> Iterator[np.ndarray]:
        found = np.empty((len(pairs), tower.backbone.cfg.model.text.width), np.float32)
        for places, values in tower(gallery, rows, asked):  # not in order: by length of the texts
            found[places] = values
        yield found

    digest = hashlib.sha256(pairs.astype("<i8").tobytes())
    digest.update("\n".join(gallery.texts).encode())
    what = tower.backbone.identity | {
        "output": "fused first token of each pair",
        "pictures": gallery.faces.digest,
        "pairs": digest.hexdigest(),
    }
    return cache.get(what, len(pairs), parts)[where]


@dataclass(frozen=True)
class Matches:
    """What an ITM head is trained on: M draws of hard negatives for every face.

    Attributes:
      fused: float32 [N, M, 3, Dt]: the own pair, the text with another photo, the photo with
        another text, in the order of `flip_jax.losses.itm.itm_logits`.
      valid: bool [N], False where all photos are of one person.
    """

    fused: np.ndarray
    valid: np.ndarray

    def take(self, rows: np.ndarray) -> Matches:
        return Matches(self.fused[rows], self.valid[rows])


def hard_matches(
    tower: FusedTower,
    gallery: FrozenGallery,
    embeds: dict[str, np.ndarray],
    group: np.ndarray,
    cache: FeatureCache,
    draws: int,
    seed: int,
) -> Matches:
    """Negatives as in pretraining, from all faces and by the frozen embeddings.

    The encoders stand still, so negatives are drawn once, M for each face, and the fused pass runs
    once instead of in every step.

    Args:
      embeds: {"photo": [N, E], "text": [N, C, E]}, unit norm.
      group: int32 [N].
      draws: M.
    """
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    rows, own = np.arange(len(group)), caption_rows(gallery)
    temperature = jnp.asarray(tower.backbone.params["temperature"])
    images, texts = [], []
    for draw in range(draws):
        caption = rng.integers(own.shape[1], size=len(group))
        negatives, valid = sample_hard_negatives(
            embeds["photo"],
            embeds["text"][rows, caption],
            jnp.asarray(group),
            temperature,
            jax.random.fold_in(key, draw),
        )
        other = {name: np.asarray(index) for name, index in negatives.items()}
        text = own[rows, caption]
        images.append(np.stack([rows, other["image"], rows], axis=1))
        texts.append(np.stack([text, text, text[other["text"]]], axis=1))
    images, texts = np.stack(images, axis=1), np.stack(texts, axis=1)
    fused = fused_features(tower, gallery, images.ravel(), texts.ravel(), cache)
    return Matches(fused.reshape(*images.shape, -1), np.asarray(valid["image"]))


@functools.cache
def _image_function(kind: str, blocks: tuple[int, ...]) -> Callable[[Flip, Array], Array]:
    def features(model: Flip, image: Array) -> Array:
        if kind == "class":
            return model.encode_image(image)[0][:, 0].astype(jnp.float16)
        states = block_states(model.vit, image, blocks)
        vectors = [pool_tokens(states)]
        if kind == "grid":
            vectors.append(grid_means(states[0][:, 1:]))
        normed = [normalize_states(each).reshape(len(image), -1) for each in vectors]
        return jnp.concatenate([states[-1][:, 0], *normed], axis=1).astype(jnp.float16)

    return features


def grid_means(patches: Array) -> Array:
    """Means over the cells of a grid, which differ by at most one row and column of patches.

    Args:
      patches: [B, G * G, D], row by row.

    Returns:
      [B, n * n, D], n = min(G, CELLS), row by row.
    """
    side = math.isqrt(patches.shape[1])
    cells = min(side, CELLS)
    cell = np.arange(side) * cells // side
    share = (cell == np.arange(cells)[:, None]) / np.bincount(cell)[:, None]
    means = jnp.einsum(
        "xc,yr,brcd->byxd", share, share, patches.reshape(len(patches), side, side, -1)
    )
    return means.reshape(len(patches), cells * cells, -1)


def _text_class(model: Flip, token_ids: Array, token_mask: Array) -> Array:
    return model.encode_text(token_ids, token_mask)[0][:, 0].astype(jnp.float32)


def frozen_heads(params: dict[str, Any], width: int) -> dict[str, Any]:
    """The heads of a checkpoint as those of SLFIR: a sketch is projected as a photo is.

    Args:
      width: W; what comes behind the class token has no weight.
    """
    params = jax.device_get(params)
    kernel = params["image_proj"]["kernel"]
    image = {
        "kernel": np.pad(kernel, [(0, width - len(kernel)), (0, 0)]),
        "bias": params["image_proj"]["bias"],
    }
    return {
        "photo": image,
        "sketch": image,
        "text": params["text_proj"],
        "match": params["itm_head"],
        "temperature": np.asarray(params["temperature"]),
    }
