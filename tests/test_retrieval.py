"""Ranks against a ten-line loop, chance by simulation, re-ranking against all pairs."""

import dataclasses
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file
from test_golden import case_config

from flip_jax import partition
from flip_jax.config import EvalConfig, MeshConfig
from flip_jax.convert import torch_flip
from flip_jax.downstream import pair_visits, retrieval
from flip_jax.downstream.retrieval import Retrieval, RetrievalEvaluator


class ArrayGallery:
    """A gallery over arrays, with the interface of the record one."""

    def __init__(self, image, token_ids, token_mask, image_of, captions=1):
        self.image, self.token_ids, self.token_mask = image, token_ids, token_mask
        self.image_of, self.captions = image_of, captions
        self.images, self.texts = len(image), len(token_ids)

    def _batches(self, size, **arrays):
        total = len(next(iter(arrays.values())))
        for start in range(0, total, size):
            rows = np.minimum(np.arange(start, start + size), total - 1)
            batch = {name: value[rows] for name, value in arrays.items()}
            yield batch | {"valid": np.arange(start, start + size) < total}

    def image_batches(self, size):
        return self._batches(size, image=self.image)

    def text_batches(self, size):
        return self._batches(size, token_ids=self.token_ids, token_mask=self.token_mask)


def loop_rank(scores, relevant):
    """Best relevant candidate; whatever is not relevant and scores as much comes first."""
    best = max(s for s, r in zip(scores, relevant, strict=True) if r)
    return sum(1 for s, r in zip(scores, relevant, strict=True) if not r and s >= best)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cosine_ranks(data):
    queries, candidates = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 8))
    values = st.sampled_from([0.0, 0.25, 0.5, 1.0])  # many ties
    scores = np.array(
        data.draw(
            st.lists(
                st.lists(values, min_size=candidates, max_size=candidates),
                min_size=queries,
                max_size=queries,
            )
        )
    )
    own = np.array(
        data.draw(st.lists(st.integers(0, candidates - 1), min_size=queries, max_size=queries))
    )
    relevant = np.arange(candidates)[None] == own[:, None]
    expected = [loop_rank(s, r) for s, r in zip(scores, relevant, strict=True)]
    np.testing.assert_array_equal(retrieval.cosine_ranks(scores, relevant), expected)


def test_a_model_that_says_the_same_of_all_finds_nothing():
    scores = np.ones((4, 20))
    ranks = retrieval.cosine_ranks(scores, np.arange(20)[None] == np.arange(4)[:, None])
    assert retrieval.recalls(ranks) == {"R@1": 0, "R@5": 0, "R@10": 0, "median_rank": 20}


def test_scores_that_are_not_numbers_find_nothing():
    scores = np.full((4, 20), np.nan)
    ranks = retrieval.cosine_ranks(scores, np.arange(20)[None] == np.arange(4)[:, None])
    assert np.all(ranks == 19)


def test_search_in_blocks_is_the_full_matrix(monkeypatch):
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(23, 6)), rng.normal(size=(11, 6))
    query_of, candidate_of = rng.integers(0, 11, 23), np.arange(11)
    monkeypatch.setattr(retrieval, "_QUERY_BLOCK", 5)
    found = retrieval.search(queries, candidates, query_of, candidate_of, 4)
    full = queries @ candidates.T
    relevant = query_of[:, None] == candidate_of[None]
    np.testing.assert_array_equal(found["rank"], retrieval.cosine_ranks(full, relevant))
    np.testing.assert_array_equal(found["top"], np.argsort(-full, axis=1)[:, :4])
    np.testing.assert_allclose(found["cosine"], -np.sort(-full, axis=1)[:, :4])


def test_equal_candidates_tie_wherever_they_stand():
    """Of candidates that are there twice, one relevant, the other one always comes first."""
    rng = np.random.default_rng(0)
    queries = rng.normal(size=(64, 256)).astype(np.float32)
    one = rng.normal(size=(1003, 256)).astype(np.float32)
    one[:64] += 0.1 * queries
    candidates = np.concatenate([one, one])
    relevant = np.concatenate([np.arange(1003), np.full(1003, -1)])
    found = retrieval.search(queries, candidates, np.arange(64), relevant, 4)
    exact = queries.astype(float) @ one.T.astype(float)
    better = np.sum(exact > np.diagonal(exact)[:, None], axis=1)
    np.testing.assert_array_equal(found["rank"], 2 * better + 1)
    np.testing.assert_allclose(found["cosine"][:, ::2], -np.sort(-exact, axis=1)[:, :2], rtol=1e-5)
    np.testing.assert_array_equal(found["cosine"][:, ::2], found["cosine"][:, 1::2])
    np.testing.assert_array_equal(found["top"][:, ::2] + 1003, found["top"][:, 1::2])


def test_rerank_by_hand():
    found = {
        "rank": np.array([2, 7]),
        "top": np.array([[4, 9, 1], [0, 2, 3]]),
        "cosine": np.array([[0.9, 0.8, 0.7], [0.5, 0.4, 0.3]]),
        "relevant": np.array([[False, False, True], [False, False, False]]),
    }
    logits = np.array([[0.0, -5.0, 0.15], [1.0, 2.0, 3.0]])
    ranks, order = retrieval.rerank(found, logits)
    # Scores 0.9, -4.2, 0.85: the relevant one moves up to rank 1. The other stays where it was.
    np.testing.assert_array_equal(ranks, [1, 7])
    np.testing.assert_array_equal(order, [[4, 1, 9], [3, 2, 0]])


def test_chance_is_what_random_orders_give():
    image_of = np.array([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])
    result = Retrieval({}, np.zeros((15, 5), int), image_of, images=12, captions=1, k=0)
    rng = np.random.default_rng(0)
    hits = {d: [] for d in retrieval.DIRECTIONS}
    for _ in range(2000):
        scores = rng.normal(size=(15, 12))
        relevant = image_of[:, None] == np.arange(12)
        hits["t2i"].append(retrieval.cosine_ranks(scores, relevant))
        hits["i2t"].append(retrieval.cosine_ranks(scores.T, relevant.T))
    for direction, ranks in hits.items():
        for k in retrieval.CUTOFFS:
            simulated = 100 * np.mean(np.concatenate(ranks) < k)
            assert result.chance()[f"{direction}/R@{k}"] == pytest.approx(simulated, abs=1.0)


@pytest.fixture
def recorded(golden):
    meta = json.loads((golden / "A_meta.json").read_text())
    io = load_file(golden / "A_eval.safetensors")
    cfg = case_config(meta)
    params = torch_flip.params_from_official(load_file(golden / "A_params.safetensors"), cfg.model)
    gallery = ArrayGallery(
        io["in/pixel_values"].transpose(0, 2, 3, 1),
        io["in/input_ids"].astype(np.int32),
        io["in/attention_mask"].astype(bool),
        io["in/txt2img"],
    )
    return cfg, params, gallery, io


def evaluate(cfg, params, gallery, **fields):
    cfg = dataclasses.replace(cfg, eval=EvalConfig(**{"batch_size": 8, "rerank": 12} | fields))
    mesh = partition.make_mesh(MeshConfig(), jax.devices()[:2])
    return RetrievalEvaluator(cfg, gallery, mesh), params


@pytest.mark.parametrize(("k", "suffix"), [(8, ""), (12, "_k12")])
def test_recorded_ranks(recorded, k, suffix):
    """[CLS] at re-ranking, as the official evaluation ran."""
    cfg, params, gallery, io = recorded
    evaluator, params = evaluate(cfg, params, gallery, first_token="cls", rerank=k)
    result = evaluator(params)
    relevant = gallery.image_of[:, None] == np.arange(20)
    for direction, truth in (("t2i", relevant), ("i2t", relevant.T)):
        score = io[f"out/score_{direction}{suffix}"]
        expected = retrieval.cosine_ranks(score, truth)
        inside = np.max(np.where(truth, score, -np.inf), axis=1) > -100
        ranks = result.ranks["reranked"][direction]
        np.testing.assert_array_equal(ranks[inside], expected[inside])
        # The official code leaves those outside the top k to an unstable sort.
        assert np.all(ranks[~inside] >= k) and 0 < np.mean(inside) < 1


@pytest.mark.parametrize(
    ("calls_per_length", "pairs_per_image", "groups_per_image"),
    [(64, 4, 16), (10, 1, 16), (8, 4, 5)],
)
def test_recorded_scores(
    recorded, monkeypatch, calls_per_length, pairs_per_image, groups_per_image
):
    """Also with texts cut to several lengths, with calls that look at few of the images, and with
    groups of pairs that look at one."""
    monkeypatch.setattr(pair_visits, "_CALLS_PER_LENGTH", calls_per_length)
    monkeypatch.setattr(pair_visits, "_PAIRS_PER_IMAGE", pairs_per_image)
    monkeypatch.setattr(pair_visits, "_GROUPS_PER_IMAGE", groups_per_image)
    cfg, params, gallery, io = recorded
    every_image = np.tile(np.arange(20), (24, 1))
    every_text = np.tile(np.arange(24), (20, 1))
    for first in ("cls", "enc"):
        evaluator, _ = evaluate(cfg, params, gallery, first_token=first)
        image, text, ids, mask = evaluator._embed(params)
        np.testing.assert_allclose(image @ text.T, io["out/sims_i2t"], rtol=0, atol=5e-6)
        score = partial(evaluator._score, params, ids, mask)
        t2i, i2t = retrieval.score_tops(score, every_image, every_text)
        expected = io[f"out/itm_logit1_all_pairs_{first}"]
        np.testing.assert_allclose(i2t, expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(t2i.T, i2t)


@pytest.mark.parametrize(
    ("groups_per_image", "together", "cuts"), [(16, 1, 4), (8, 2, 2), (4, 4, 1)]
)
def test_pairs_are_cut_into_calls_that_hold_them(monkeypatch, groups_per_image, together, cuts):
    """Every pair once; each call has texts that fit."""
    monkeypatch.setattr(pair_visits, "_CALLS_PER_LENGTH", 12)
    monkeypatch.setattr(pair_visits, "_PAIRS_PER_IMAGE", together)
    monkeypatch.setattr(pair_visits, "_GROUPS_PER_IMAGE", groups_per_image)
    rng = np.random.default_rng(0)
    size, texts = 8, 40
    share = np.repeat(np.where(np.arange(20) % 8 < 5, 0.1, 1.0), texts)
    chosen = rng.choice(20 * texts, 400, replace=False, p=share / share.sum())
    image, text = np.divmod(np.sort(chosen), texts)
    mask = np.arange(65) < np.append(rng.integers(3, 65, texts - 1), 65)[:, None]
    seen = []
    gallery = ArrayGallery(np.zeros((20, 2, 2, 3), np.uint8), mask[:0], mask[:0], np.arange(0))

    def match(ids, mask_, tokens, index):
        assert ids.shape == mask_.shape and len(ids) == size * together == len(index) * together
        assert index.max() < len(tokens)
        seen.append(ids.shape[1])
        # Which text and image it was, and how much of the text was there.
        looked_at = np.repeat(tokens[index], together)
        return np.stack([ids[:, 0], looked_at, mask_.sum(axis=1)], axis=1)

    numbers = np.tile(np.arange(texts, dtype=np.int32)[:, None], 65)
    blocks = iter(range(3))
    found = np.full((400, 3), -1)
    for rows, values in pair_visits.visit_pairs(
        gallery,
        (numbers, mask),
        (image, text),
        encode=lambda batch: jnp.arange(size) + size * next(blocks),
        match=match,
        size=size,
        mesh=partition.make_mesh(MeshConfig(), jax.devices()[:2]),
    ):
        assert (found[rows] == -1).all()
        found[rows] = values
    np.testing.assert_array_equal(found, np.stack([text, image, mask.sum(axis=1)[text]], axis=1))
    assert len(set(seen)) == cuts and max(seen) == 65  # few compilations


@pytest.mark.parametrize("per_image", [16, 512])
def test_lengths_do_not_cost_more_calls_than_they_save(per_image):
    """Many blocks of few pairs take one length, for most would have to wait for longer texts."""
    rng = np.random.default_rng(0)
    size, images, texts = 8, 2400, 2000
    image = np.repeat(np.arange(images), per_image)
    text = rng.integers(texts, size=len(image))
    tokens = rng.integers(20, 66, texts)[text]
    groups = pair_visits._groups(image, tokens)
    assert groups.shape[1] == (4 if per_image == 512 else 1)
    assert sorted(groups.ravel()) == list(range(len(image)))
    assert (image[groups] == image[groups[:, :1]]).all()
    longest = tokens[groups].max(axis=1)
    groups_per_call = 4 * size // groups.shape[1]
    calls, blocks = len(groups) // groups_per_call, images // size
    length = pair_visits._cut_lengths(longest, calls, blocks, 65)
    made, columns = 0, 0
    per_block = size * len(groups) // images
    for first in range(0, len(groups), per_block):
        own = np.arange(first, first + per_block)
        groups_of = {cut: own[length[own] == cut] for cut in np.unique(length[own])}
        for cut, chunk in pair_visits._calls(groups_of, groups_per_call):
            assert longest[chunk].max() <= cut
            made, columns = made + 1, columns + cut * 4 * size
    assert made <= 1.05 * calls
    assert columns < (1.08 if per_image == 512 else 1.6) * tokens.sum()
    assert (len(np.unique(length)) > 8) == (per_image == 512)


def test_k_larger_than_the_gallery(recorded):
    cfg, params, gallery, _ = recorded
    with pytest.raises(ValueError, match=r"config.eval.rerank=21: the gallery has 20 images"):
        evaluate(cfg, params, gallery, rerank=21)
    with pytest.raises(ValueError, match=r"batch_size=7: .* 2 devices, for example 6 or 8"):
        evaluate(cfg, params, gallery, batch_size=7)


def test_without_reranking(recorded):
    cfg, params, gallery, _ = recorded
    evaluator, params = evaluate(cfg, params, gallery, rerank=0)
    result = evaluator(params)
    assert set(result.ranks) == {"cosine"} and result.k == 0
    assert "mean_recall" in result.metrics() and "chance" in result.table()
