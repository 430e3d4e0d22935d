"""Metrics of sketch-less retrieval against cases by hand and a plain loop."""

import math

import numpy as np
import pytest

from flip_jax.downstream.retrieval import cosine_ranks
from flip_jax.downstream.slfir_metrics import METRICS, chance, curves, metrics, per_sketch


def ranks_of(similarity: np.ndarray) -> np.ndarray:
    """int [N, T] of similarities [N, T, N], as the task ranks them."""
    count, steps, _ = similarity.shape
    own = np.repeat(np.eye(count, dtype=bool), steps, axis=0)
    return 1 + cosine_ranks(similarity.reshape(count * steps, count), own).reshape(count, steps)


def oracle(similarity: np.ndarray) -> dict[str, float]:
    """The definitions, one number at a time."""
    count, steps, _ = similarity.shape
    sums = dict.fromkeys(METRICS, 0.0)
    for i in range(count):
        for t in range(1, steps + 1):
            row = similarity[i][t - 1]
            rank = 0
            for j in range(count):
                if row[j] >= row[i]:
                    rank += 1
            weight = math.exp(1 - t / steps) / math.e
            percentile = (count - rank) / (count - 1)
            sums["m@A"] += percentile / steps
            sums["m@B"] += 1 / rank / steps
            sums["w@mA"] += weight * percentile / steps
            sums["w@mB"] += weight / rank / steps
            if t == steps:
                for q in (1, 5, 10):
                    sums[f"A@{q}"] += rank <= q
    return {name: 100 * value / count for name, value in sums.items()}


def test_a_case_by_hand():
    """Three photos, two steps; sketch 0 goes from rank 3 to 1, sketch 1 stays first, sketch 2 ties
    with one photo at first and is beaten by it in the end."""
    similarity = np.array(
        [
            [[0.1, 0.2, 0.3], [0.9, 0.2, 0.3]],
            [[0.0, 0.5, 0.1], [0.0, 0.6, 0.1]],
            [[0.4, 0.1, 0.4], [0.8, 0.1, 0.7]],
        ]
    )
    ranks = ranks_of(similarity)
    assert ranks.tolist() == [[3, 1], [1, 1], [2, 2]]
    found = metrics(ranks, 3)
    # Percentiles (3 - r) / 2: 0, 1; 1, 1; 1/2, 1/2.
    assert found["m@A"] == pytest.approx(100 * (0 + 1 + 1 + 1 + 0.5 + 0.5) / 6)
    assert found["m@B"] == pytest.approx(100 * (1 / 3 + 1 + 1 + 1 + 0.5 + 0.5) / 6)
    early, late = math.exp(-0.5), math.exp(-1)
    assert found["w@mA"] == pytest.approx(100 * (1.5 * early + 2.5 * late) / 6)
    assert found["w@mB"] == pytest.approx(100 * ((1 / 3 + 1.5) * early + 2.5 * late) / 6)
    assert found["A@1"] == pytest.approx(200 / 3)
    assert found["A@5"] == found["A@10"] == 100
    drawn = curves(ranks, 3)
    assert drawn["share"].tolist() == [0.5, 1]
    assert drawn["percentile"] == pytest.approx([50, 250 / 3])
    assert drawn["reciprocal"] == pytest.approx([(1 / 3 + 1.5) / 3, 2.5 / 3])


@pytest.mark.parametrize("steps", [1, 50, 70])
def test_against_a_plain_loop(steps):
    rng = np.random.default_rng(steps)
    # Few values, so that ties are frequent.
    similarity = rng.integers(0, 6, (13, steps, 13)) / 6
    ranks = ranks_of(similarity)
    assert metrics(ranks, 13) == pytest.approx(oracle(similarity), abs=1e-9)
    drawn = curves(ranks, 13)
    assert drawn["percentile"].mean() == pytest.approx(metrics(ranks, 13)["m@A"])
    assert 100 * drawn["reciprocal"].mean() == pytest.approx(metrics(ranks, 13)["m@B"])
    assert all(len(values) == steps for values in drawn.values())
    for name, values in per_sketch(ranks, 13).items():
        assert values.shape == (13,) and values.mean() == pytest.approx(metrics(ranks, 13)[name])


def test_a_model_that_says_the_same_of_everybody_comes_last():
    ranks = ranks_of(np.zeros((4, 3, 4)))
    assert (ranks == 4).all()
    assert metrics(ranks, 4)["m@A"] == 0 and metrics(ranks, 4)["A@1"] == 0
    assert (ranks_of(np.full((4, 3, 4), np.nan)) == 4).all()


def test_chance_is_the_mean_of_random_orders():
    rng, steps, gallery = np.random.default_rng(0), 5, 12
    ranks = rng.integers(1, gallery + 1, (40_000, steps))
    expected = chance(gallery, steps)
    assert set(expected) == set(METRICS)
    for name, value in metrics(ranks, gallery).items():
        assert value == pytest.approx(expected[name], abs=0.6), name
    assert chance(3, 1)["A@5"] == 100


@pytest.mark.parametrize(
    ("ranks", "gallery", "message"),
    [
        (np.ones((2, 3), int), 1, "gallery of 1 photos has no order"),
        (np.zeros((2, 3), int), 5, r"from 0 to 0.*must be 1\.\.5"),
        (np.full((2, 3), 6), 5, "from 6 to 6"),
        (np.ones(3, int), 5, r"shape \[3\], must be \[sketches, steps\]"),
        (np.ones((0, 3), int), 5, r"shape \[0, 3\]"),
    ],
)
def test_bad_ranks(ranks, gallery, message):
    for function in (metrics, curves):
        with pytest.raises(ValueError, match=message):
            function(ranks, gallery)
