"""Text-image retrieval: R@k in both directions, by cosine and re-ranked by ITM.

Source: eval/pretrain_eval.py of the official FLIP. Departures: [ENC] is the first token at
re-ranking, as in training (`eval.first_token=cls` is what the reference did); a tie counts
against the model; candidates beyond the top k keep their cosine order behind it, where the
reference leaves them to an unstable sort.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from flip_jax import distributed, partition
from flip_jax.config import Config
from flip_jax.downstream.pair_visits import keys_values_everywhere, visit_pairs
from flip_jax.models import flip

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("t2i", "i2t")  # text to image, image to text
SHOWN = 5  # images kept per text for the picture
_QUERY_BLOCK = 1024

# (image numbers [P], text numbers [P], both int64, by image and then text, no pair twice) -> ITM
# logits of class 1, float32 [P].
ScorePairs = Callable[[np.ndarray, np.ndarray], np.ndarray]


def cosine_ranks(similarity: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """Rank of the best relevant candidate of every query, 0 = first; ties count against it.

    Args:
      similarity: float [Q, N]; relevant: bool [Q, N], at least one per row.

    Returns:
      int64 [Q]
    """
    best = np.max(np.where(relevant, similarity, -np.inf), axis=1, keepdims=True)
    # Not `>=`: a score that is not a number counts against the query, too.
    return np.sum(~(similarity < best) & ~relevant, axis=1)


def search(
    queries: np.ndarray,
    candidates: np.ndarray,
    query_of: np.ndarray,
    candidate_of: np.ndarray,
    k: int,
) -> dict[str, np.ndarray]:
    """Exact cosine search in blocks of queries; memory grows with Q + N, not with Q * N.

    Equal candidates, such as those of a caption that many pictures share, have equal cosines: a
    product of matrices rounds them one way or the other by where they stand, so that a tie would
    count for the model as often as against it.

    Args:
      queries: float32 [Q, E]; candidates: float32 [N, E]; unit norm.
      query_of, candidate_of: int [Q], [N]; a candidate is relevant where the numbers are equal.
      k: how many candidates to keep per query.

    Returns:
      {"rank": int64 [Q], see `cosine_ranks`; "top": int64 [Q, k], best first, ties by index;
      "cosine": float32 [Q, k]; "relevant": bool [Q, k]}
    """
    distinct, place = _distinct(candidates)
    parts = []
    for start in range(0, len(queries), _QUERY_BLOCK):
        block = slice(start, start + _QUERY_BLOCK)
        similarity = (queries[block] @ distinct.T)[:, place]
        relevant = query_of[block, None] == candidate_of[None]
        top = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
        parts.append(
            {
                "rank": cosine_ranks(similarity, relevant),
                "top": top,
                "cosine": np.take_along_axis(similarity, top, axis=1),
                "relevant": np.take_along_axis(relevant, top, axis=1),
            }
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray | slice]:
    """The different rows of [N, E], and which of them each of the N is."""
    whole = np.dtype((np.void, rows.itemsize * rows.shape[1]))
    keys = np.ascontiguousarray(rows).view(whole)[:, 0]
    _, first, place = np.unique(keys, return_index=True, return_inverse=True)
    return (rows, slice(None)) if len(first) == len(rows) else (rows[first], place)


def rerank(found: dict[str, np.ndarray], logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Order the top k of a search by ITM logit + cosine.

    Args:
      found: result of `search`; logits: float [Q, k], class 1 of ITM for `found["top"]`.

    Returns:
      (rank of the best relevant candidate int64 [Q]: inside the top k by score, behind it by
      cosine; the top candidates in their new order int64 [Q, k])
    """
    score = logits + found["cosine"]
    inside = cosine_ranks(score, found["relevant"])
    order = np.argsort(-score, axis=1, kind="stable")
    ranks = np.where(found["relevant"].any(axis=1), inside, found["rank"])
    return ranks, np.take_along_axis(found["top"], order, axis=1)


def recalls(ranks: np.ndarray) -> dict[str, float]:
    """{"R@1", "R@5", "R@10"} in percent and {"median_rank"}, 1 = first."""
    found = {f"R@{k}": 100.0 * float(np.mean(ranks < k)) for k in CUTOFFS}
    return found | {"median_rank": float(np.median(ranks)) + 1.0}


@dataclass(frozen=True)
class Retrieval:
    """One evaluation. Ranks are int64 [queries], 0 = first."""

    ranks: dict[str, dict[str, np.ndarray]]  # {"cosine", "reranked"} -> {"t2i", "i2t"}
    top_images: np.ndarray  # int [texts, up to 5]: best gallery images of every text, final order
    image_of: np.ndarray  # int [texts]: the gallery image a text belongs to
    images: int
    captions: int  # per image
    k: int  # candidates re-ranked; 0 = off

    def metrics(self) -> dict[str, float]:
        """`cosine/t2i/R@1` ... in percent, `mean_recall` of the final order, `images`, `texts`."""
        flat = {
            f"{order}/{direction}/{name}": value
            for order, directions in self.ranks.items()
            for direction, ranks in directions.items()
            for name, value in recalls(ranks).items()
        }
        final = "reranked" if self.k else "cosine"
        wanted = [flat[f"{final}/{d}/R@{k}"] for d in DIRECTIONS for k in CUTOFFS]
        sizes = {"images": self.images, "texts": len(self.image_of)}
        return flat | sizes | {"mean_recall": float(np.mean(wanted))}

    def chance(self) -> dict[str, float]:
        """`t2i/R@1` ...: R@k of a random order, in percent."""
        own = np.bincount(self.image_of, minlength=self.images)
        one = np.ones(1, np.int64)
        flat = {}
        for k in CUTOFFS:
            flat[f"t2i/R@{k}"] = 100.0 * float(_hit_chance(self.images, one, k)[0])
            flat[f"i2t/R@{k}"] = 100.0 * float(np.mean(_hit_chance(len(self.image_of), own, k)))
        return flat

    def table(self, start: Mapping[str, float] | None = None) -> str:
        """Printable lines: chance, the model at step 0 if its `metrics()` are given, this one."""
        lines = [
            f"retrieval over {self.images} images and {len(self.image_of)} captions "
            f"({self.captions} per image), ITM re-ranks the best k={self.k}",
            f"{'':22}{'text -> image':>27}{'image -> text':>27}",
            f"{'':22}" + "".join(f"{f'R@{k}':>9}" for k in CUTOFFS) * 2,
        ]

        def row(label: str, values: Mapping[str, float], prefix: str) -> str:
            cells = [values[f"{prefix}{d}/R@{k}"] for d in DIRECTIONS for k in CUTOFFS]
            return f"{label:22}" + "".join(f"{value:9.2f}" for value in cells)

        lines.append(row("chance", self.chance(), ""))
        for label, values in (("step 0, ", start or {}), ("", self.metrics())):
            for order in self.ranks:
                if f"{order}/t2i/R@1" in values:
                    lines.append(row(label + order, values, f"{order}/"))
        return "\n".join(lines)


def rank_gallery(
    image_embed: np.ndarray,
    text_embed: np.ndarray,
    image_of: np.ndarray,
    captions: int,
    k: int,
    score: ScorePairs,
) -> Retrieval:
    """Rank all pairs of a gallery by cosine, and the best k of each query by ITM.

    Args:
      image_embed: float32 [images, E]; text_embed: float32 [texts, E]; unit norm.
      image_of: int [texts], the image a text belongs to.
      captions: at most so many per image, for the record.
      k: candidates to re-rank, at most as many as images and texts; 0 = off.
      score: of the pairs that this takes; called once, if `k` is not 0.
    """
    own = np.arange(len(image_embed))
    shown = min(max(k, SHOWN), len(image_embed))
    # Hosts with different processors may round differently, and must agree on the pairs.
    t2i = distributed.of_main(search(text_embed, image_embed, image_of, own, shown))
    i2t = distributed.of_main(search(image_embed, text_embed, own, image_of, max(k, 1)))
    ranks = {"cosine": {"t2i": t2i["rank"], "i2t": i2t["rank"]}}
    top_images = t2i["top"]
    if k:
        t2i = {n: v if v.ndim == 1 else v[:, :k] for n, v in t2i.items()}
        logits = score_tops(score, t2i["top"], i2t["top"])
        t2i_ranks, reordered = rerank(t2i, logits[0])
        top_images = np.concatenate([reordered, top_images[:, k:]], axis=1)
        ranks["reranked"] = {"t2i": t2i_ranks, "i2t": rerank(i2t, logits[1])[0]}
    return Retrieval(
        ranks=ranks,
        top_images=top_images[:, :SHOWN],
        image_of=image_of,
        images=len(image_embed),
        captions=captions,
        k=k,
    )


def score_tops(
    score: ScorePairs, top_images: np.ndarray, top_texts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """ITM logits of class 1: float32 [texts, k] for `top_images`, [images, k] for `top_texts`.

    A pair that both directions want is scored once.
    """
    texts, images = len(top_images), len(top_texts)
    t2i = top_images * texts + np.arange(texts)[:, None]
    i2t = np.arange(images)[:, None] * texts + top_texts
    pairs, where = np.unique(np.concatenate([t2i.ravel(), i2t.ravel()]), return_inverse=True)
    logits = score(*np.divmod(pairs, texts))
    return logits[where[: t2i.size]].reshape(t2i.shape), logits[where[t2i.size :]].reshape(
        i2t.shape
    )


def _hit_chance(total: int, own: np.ndarray, k: int) -> np.ndarray:
    """Chance that `k` of `total` candidates hold one of `own`, drawn without replacement."""
    miss = np.ones(len(own))
    for i in range(min(k, total)):
        miss *= np.clip((total - own - i) / (total - i), 0.0, 1.0)
    return 1.0 - miss


class RetrievalEvaluator:
    """Compiled once, called with any parameters; in float32, whatever `model.dtype` is.

    Memory is bounded: image tokens live for one block of `eval.batch_size` images at a time, and
    each pair is scored once for both directions.
    """

    def __init__(self, cfg: Config, gallery: Any, mesh: Mesh):
        """Args: gallery: see `flip_jax.data.gallery.Gallery`; mesh: devices to run on.

        Raises:
          ValueError: if `eval.rerank` is larger than the gallery or `eval.batch_size` does not
            divide over the devices.
        """
        self.cfg, self.gallery, self.mesh = cfg, gallery, mesh
        smaller = min(gallery.images, gallery.texts)
        if cfg.eval.rerank > smaller:
            raise ValueError(
                f"config.eval.rerank={cfg.eval.rerank}: the gallery has {gallery.images} images "
                f"and {gallery.texts} captions; set it to at most {smaller} (0 = off)"
            )
        if cfg.eval.batch_size % mesh.size:
            fits = cfg.eval.batch_size // mesh.size * mesh.size
            raise ValueError(
                f"config.eval.batch_size={cfg.eval.batch_size}: must be a multiple of the "
                f"{mesh.size} devices, for example {fits or mesh.size} or {fits + mesh.size}"
            )
        # As `flip_jax.load` and all tasks: the numbers of a checkpoint are the same everywhere.
        graphdef = flip.build(dataclasses.replace(cfg.model, dtype="float32"))

        def encode_image(params, image):
            return nnx.merge(graphdef, params).encode_image(image)

        def encode_text(params, token_ids, token_mask):
            embed = nnx.merge(graphdef, params).embed_text(token_ids, token_mask)
            return embed, token_ids, token_mask

        def match(params, token_ids, token_mask, keys_values, image_index):
            model = nnx.merge(graphdef, params)
            first = cfg.eval.first_token
            texts = token_ids, token_mask
            return model.match(*texts, keys_values, image_index, first_token=first)[:, 1]

        # What the host looks at is on all devices, as it may not have those with some of the rows.
        rows, everywhere = partition.batch_sharding(mesh), NamedSharding(mesh, P())
        self._encode_image = jax.jit(encode_image, out_shardings=(rows, everywhere))
        self._keys_values = keys_values_everywhere(graphdef, mesh)
        self._encode_text = jax.jit(encode_text, out_shardings=everywhere)
        self._match = jax.jit(match, out_shardings=everywhere)

    def _put(self, batch: dict[str, np.ndarray], *names: str) -> list[jax.Array]:
        """This process's rows -> global arrays."""
        placed = partition.to_global({name: batch[name] for name in names}, self.mesh)
        return [placed[name] for name in names]

    def __call__(self, params: flip.Params) -> Retrieval:
        """Encode the gallery, rank, re-rank."""
        *embeds, token_ids, token_mask = self._embed(params)
        score = partial(self._score, params, token_ids, token_mask)
        gallery = self.gallery
        return rank_gallery(
            *embeds, gallery.image_of, gallery.captions, self.cfg.eval.rerank, score
        )

    def _embed(self, params: flip.Params) -> tuple[np.ndarray, ...]:
        """Embeddings of images and texts, ids and masks of texts; the whole gallery."""
        size = self.cfg.eval.batch_size
        images = [
            np.asarray(self._encode_image(params, *self._put(batch, "image"))[1])
            for batch in self.gallery.image_batches(size)
        ]
        texts = [
            jax.device_get(self._encode_text(params, *self._put(batch, "token_ids", "token_mask")))
            for batch in self.gallery.text_batches(size)
        ]
        parts = [np.concatenate(part)[: self.gallery.texts] for part in zip(*texts, strict=True)]
        return np.concatenate(images)[: self.gallery.images], *parts

    def _score(
        self,
        params: flip.Params,
        token_ids: np.ndarray,
        token_mask: np.ndarray,
        pair_image: np.ndarray,
        pair_text: np.ndarray,
    ) -> np.ndarray:
        """See `ScorePairs`."""
        logits = np.empty(len(pair_image), np.float32)
        visited = visit_pairs(
            self.gallery,
            (token_ids, token_mask),
            (pair_image, pair_text),
            encode=lambda image: self._keys_values(params, self._encode_image(params, image)[0]),
            match=partial(self._match, params),
            size=self.cfg.eval.batch_size,
            mesh=self.mesh,
        )
        for rows, values in visited:
            logits[rows] = values
        return logits
