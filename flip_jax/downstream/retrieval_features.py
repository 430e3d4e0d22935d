"""What frozen towers make of pictures and captions, for retrieval with any heads on top.

Shapes: N pictures, T captions, C captions of each picture, S text tokens, D vision and Dt text
width.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import partition
from flip_jax.downstream.backbone import Backbone
from flip_jax.downstream.face_data import DataLacks
from flip_jax.downstream.faces import Faces
from flip_jax.downstream.features import FeatureCache
from flip_jax.downstream.pair_visits import keys_values_everywhere, visit_pairs
from flip_jax.downstream.retrieval import Retrieval, rank_gallery
from flip_jax.models.bert import Images
from flip_jax.models.flip import Flip, unit_norm

Array = jax.Array
Heads = dict[str, Any]

HEADS = ("image_proj", "text_proj", "itm_head", "temperature")

# Fused features of pairs that a gallery keeps: 2.6 million pairs, as two directions of 5,000
# pictures with k 256 are, of width 768.
_STORE_BYTES = 2**33


def heads_of(backbone: Backbone) -> Heads:
    """The heads of a checkpoint: arrays on the host."""
    return jax.device_get({name: backbone.params[name] for name in HEADS})


def with_captions(faces: Faces, limit: int | None = None) -> Faces:
    """The faces that have a caption, at most the first `limit`.

    Raises:
      DataLacks: there is none.
    """
    rows = np.flatnonzero([len(captions) > 0 for captions in faces.captions])[:limit]
    if not len(rows):
        raise DataLacks(
            f"{faces.source.path}, split {faces.source.split!r}: none of {len(faces)} records has "
            "a caption; `python -m flip_jax.data build` takes them from a column, or makes them of "
            "attributes"
        )
    return faces if len(rows) == len(faces) else faces.take(rows)


class FusedTower:
    """The image tower and the image-grounded text tower of a backbone, compiled once."""

    def __init__(self, backbone: Backbone, first_token: str):
        """Args: first_token: see `Flip.fuse`."""
        self.backbone, graphdef = backbone, backbone.graphdef

        def encode(params: dict, image: Array) -> Array:
            return nnx.merge(graphdef, params).encode_image(image)[0]

        def fuse(params: dict, ids: Array, mask: Array, images: Images, index: Array) -> Array:
            model = nnx.merge(graphdef, params)
            return model.fuse(ids, mask, images, index, first_token=first_token)

        mesh = backbone.mesh
        rows, everywhere = partition.batch_sharding(mesh), NamedSharding(mesh, P())
        self._encode = jax.jit(encode, out_shardings=rows)
        self._keys_values = keys_values_everywhere(graphdef, mesh)
        self._fuse = jax.jit(fuse, out_shardings=everywhere)

    def __call__(
        self,
        gallery: FrozenGallery,
        texts: tuple[np.ndarray, np.ndarray],
        pairs: tuple[np.ndarray, np.ndarray],
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields (rows, first token float32 [rows, Dt]) of `pairs`; see `visit_pairs`."""
        params = self.backbone.params
        yield from visit_pairs(
            gallery,
            texts,
            pairs,
            encode=lambda image: self._keys_values(params, self._encode(params, image)),
            match=functools.partial(self._fuse, params),
            size=self.backbone.batch_size,
            mesh=self.backbone.mesh,
        )


class FrozenGallery:
    """Pictures and captions to find each other, under heads that may change.

    The towers run once per picture, caption and pair: features of pairs are kept, so that after
    the first time only pairs that are new among the best k are computed.

    Attributes:
      faces: the pictures.
      texts: their captions, picture by picture.
      image_of: int64 [T], the picture a caption belongs to.
      captions: at most so many per picture.
    """

    def __init__(self, tower: FusedTower, faces: Faces, captions: int, cache: FeatureCache):
        """Args: faces: each with a caption; captions: of each, its first ones."""
        backbone = tower.backbone
        self.faces, self.captions, self._tower = faces, captions, tower
        own = [given[:captions] for given in faces.captions]
        self.texts = [text for texts in own for text in texts]
        self.image_of = np.repeat(np.arange(len(own)), [len(texts) for texts in own])
        self._image_class = cache.of_images(backbone, faces, "class token", _image_class)
        self._token_rows = backbone.tokenizer(self.texts)
        self._text_class = backbone.map_rows(_text_class, *self._token_rows)
        width = backbone.cfg.model.text.width
        self._pairs = np.zeros(0, np.int64)  # picture number * T + caption number, ascending
        self._fused = np.zeros((0, width), np.float32)

    def rank(self, heads: Heads, k: int) -> Retrieval:
        """Cosine and, of the best k, ITM; see `rank_gallery`. Args: k: at most N and T."""
        image_embed = embed(heads["image_proj"], self._image_class)
        text_embed = embed(heads["text_proj"], self._text_class)
        score = functools.partial(self._score, heads["itm_head"])
        return rank_gallery(image_embed, text_embed, self.image_of, self.captions, k, score)

    def _score(
        self, head: dict[str, np.ndarray], pair_image: np.ndarray, pair_text: np.ndarray
    ) -> np.ndarray:
        """See `retrieval.ScorePairs`."""
        weight, bias = head["kernel"][:, 1], head["bias"][1]
        asked = pair_image * len(self.texts) + pair_text
        if len(asked) * self._fused[:1].itemsize * len(weight) > _STORE_BYTES:
            logits = np.empty(len(asked), np.float32)
            for rows, fused in self._tower(self, self._token_rows, (pair_image, pair_text)):
                logits[rows] = fused @ weight + bias
            return logits
        self._keep(asked)
        return (self._fused @ weight + bias)[np.searchsorted(self._pairs, asked)]

    def _keep(self, asked: np.ndarray) -> None:
        """Computes the pairs that are not there; forgets others if they would be too many."""
        new = asked[~np.isin(asked, self._pairs, assume_unique=True)]
        if (len(self._pairs) + len(new)) * self._fused.shape[1] * 4 > _STORE_BYTES:
            wanted = np.isin(self._pairs, asked, assume_unique=True)
            self._pairs, self._fused = self._pairs[wanted], self._fused[wanted]
        if not len(new):
            return
        fused = np.empty((len(new), self._fused.shape[1]), np.float32)
        for rows, values in self._tower(self, self._token_rows, np.divmod(new, len(self.texts))):
            fused[rows] = values
        place = np.searchsorted(self._pairs, new)
        self._pairs = np.insert(self._pairs, place, new)
        self._fused = np.insert(self._fused, place, fused, axis=0)

    def forget(self) -> None:
        """Frees the features of pairs."""
        self._pairs, self._fused = self._pairs[:0].copy(), self._fused[:0].copy()

    def image_batches(self, size: int) -> Iterator[dict[str, np.ndarray]]:
        """`image` uint8 [size, S, S, 3], the last one filled up; decoded one batch ahead."""
        starts = range(0, len(self.faces), size)

        def load(start: int) -> dict[str, np.ndarray]:
            image = self.faces.images[start : start + size]
            return {"image": np.pad(image, [(0, size - len(image)), (0, 0), (0, 0), (0, 0)])}

        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(load, 0)
            for start in starts:
                batch = ahead.result()
                if start != starts[-1]:
                    ahead = pool.submit(load, start + size)
                yield batch

    def thumbnail(self, image: int) -> np.ndarray:
        """Picture number `image` as the model sees it."""
        return self.faces.image(image)

    def caption(self, text: int) -> str:
        """Caption number `text`."""
        return self.texts[text]


class TrainPairs:
    """Pictures with captions to train heads on, and all that does not depend on the negatives.

    Attributes:
      faces: N pictures, each with a caption.
      counts: int64 [N], captions of each, at most C.
    """

    def __init__(self, backbone: Backbone, faces: Faces, captions: int, cache: FeatureCache):
        """Args: captions: C, at most so many of each picture, its first ones."""
        self.faces = faces
        self.counts = np.array([min(len(own), captions) for own in faces.captions])
        most = int(self.counts.max())
        # A picture with fewer captions repeats them; the repetitions are never drawn.
        texts = [own[c % len(own)] for own in faces.captions for c in range(most)]
        ids, mask = backbone.tokenizer(texts)
        self._token_ids = ids.reshape(len(faces), most, -1)
        self._token_mask = mask.reshape(self._token_ids.shape)
        what = backbone.identity | {
            "output": "class tokens of picture and captions, fused [ENC] of each caption",
            "pictures": faces.digest,
            "captions": hashlib.sha256(self._token_ids.astype("<i4").tobytes()).hexdigest(),
        }
        rows = faces.images, self._token_ids, self._token_mask
        self._table = cache.get(
            what, len(faces), lambda: backbone.stream_rows(_class_and_fused, *rows)
        )
        self._width = backbone.cfg.model.vision.width

    def __len__(self) -> int:
        return len(self.faces)

    def batch(self, rows: np.ndarray, caption: np.ndarray) -> dict[str, np.ndarray]:
        """What a training step needs of B pictures.

        Args:
          rows: int [B]; caption: int [B], which one of each, below `counts`.

        Returns:
          image uint8 [B, S, S, 3]; token_ids, token_mask [B, S]; image_class float32 [B, D] and
          text_class [B, Dt], before the projections; fused float32 [B, Dt], the first token,
          [ENC], of the caption that looks at its picture; group int32 [B].
        """
        found, each = self._table[rows], np.arange(len(rows))
        texts = found[:, self._width :].reshape(len(rows), 2, self._token_ids.shape[1], -1)
        return {
            "image": self.faces.take(rows).images[:],
            "token_ids": self._token_ids[rows, caption],
            "token_mask": self._token_mask[rows, caption],
            "image_class": found[:, : self._width],
            "text_class": texts[each, 0, caption],
            "fused": texts[each, 1, caption],
            "group": self.faces.groups[rows].astype(np.int32),
        }


def embed(head: dict[str, np.ndarray], class_tokens: Array) -> np.ndarray:
    """Joint embeddings float32 [N, E], unit norm, of class tokens [N, D or Dt]."""
    return np.asarray(_project(head, class_tokens))


@jax.jit
def _project(head: dict[str, Array], class_tokens: Array) -> Array:
    return unit_norm(linear(head, class_tokens))


def linear(head: dict[str, Array], x: Array) -> Array:
    """A head of `Flip`, float32."""
    return x @ head["kernel"] + head["bias"]


def _image_class(model: Flip, image: Array) -> Array:
    return model.encode_image(image)[0][:, 0].astype(jnp.float32)


def _text_class(model: Flip, token_ids: Array, token_mask: Array) -> Array:
    return model.encode_text(token_ids, token_mask)[0][:, 0].astype(jnp.float32)


def _class_and_fused(model: Flip, image: Array, token_ids: Array, token_mask: Array) -> Array:
    """Float32 [B, D + C Dt + C Dt] of pictures [B, ...] and their captions [B, C, S]."""
    size, captions = token_ids.shape[:2]
    tokens, _ = model.encode_image(image)
    texts = tuple(array.reshape(size * captions, -1) for array in (token_ids, token_mask))
    parts = [
        tokens[:, 0].astype(jnp.float32),
        _text_class(model, *texts).reshape(size, -1),
        model.fuse(*texts, tokens, (0,) * captions).reshape(size, -1),
    ]
    return jnp.concatenate(parts, axis=1)
