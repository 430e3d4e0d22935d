"""Bootstrap over groups against loops, what an interval covers, and parts of the rows."""

import numpy as np
import pytest

from flip_jax.downstream import intervals
from flip_jax.downstream.intervals import bootstrap, break_down, mean_of, measure


def test_draws_are_whole_groups_by_a_loop():
    rng = np.random.default_rng(0)
    values, groups = rng.normal(size=11), np.array([0, 0, 0, 1, 2, 2, 3, 3, 3, 3, 1])
    value, draws = bootstrap(mean_of(values), groups, resamples=50, seed=3)
    assert value[0] == pytest.approx(values.mean())
    times = np.random.default_rng(3).multinomial(4, np.full(4, 0.25), size=50)
    for drawn, counts in zip(draws[:, 0], times, strict=True):
        rows = [v for v, g in zip(values, groups, strict=True) for _ in range(counts[g])]
        assert drawn == pytest.approx(np.mean(rows), rel=1e-5)


def test_blocks_do_not_change_the_draws(monkeypatch):
    values, groups = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) // 4
    _, whole = bootstrap(mean_of(values), groups, resamples=30)
    monkeypatch.setattr(intervals, "_BLOCK_BYTES", 4 * 40 * 7)
    np.testing.assert_allclose(bootstrap(mean_of(values), groups, resamples=30)[1], whole)


def test_intervals_cover_the_truth_and_know_that_pictures_of_a_person_are_alike():
    """300 data sets of 30 people with 10 pictures each that differ between people only."""
    hits, naive_hits, widths = [], [], []
    for number in range(300):
        rng = np.random.default_rng([7, number])
        values = np.repeat(rng.normal(size=30), 10) + 0.1 * rng.normal(size=300)
        (found,) = measure(mean_of(values), np.arange(300) // 10, resamples=200, seed=number)
        (naive,) = measure(mean_of(values), np.arange(300), resamples=200, seed=number)
        hits.append(found.low <= 0 <= found.high)
        naive_hits.append(naive.low <= 0 <= naive.high)
        widths.append(found.high - found.low)
    assert 0.88 <= np.mean(hits) <= 0.99
    assert np.mean(naive_hits) < 0.6
    assert np.mean(widths) == pytest.approx(2 * 1.96 / np.sqrt(30), rel=0.15)


def test_an_interval_holds_its_number_where_all_resamples_are_higher():
    """The mean square of the weights: 1 on the whole, nearly 2 with some people there twice."""

    def mean_square(weights):
        return np.square(weights).mean(axis=1, keepdims=True)

    value, draws = bootstrap(mean_square, np.arange(30), resamples=400)
    assert value == 1.0 and draws.min() > 1.0
    (found,) = measure(mean_square, np.arange(30), resamples=400)
    low, middle, high = np.percentile(draws, [2.5, 50, 97.5])
    wanted = [1.0, 1.0 + low - middle, 1.0 + high - middle]
    assert [found.value, found.low, found.high] == pytest.approx(wanted)
    assert found.low < 1.0 < found.high


def test_what_is_not_defined_is_left_out():
    values = np.array([1.0, np.nan, 3.0, 5.0])
    (found,) = measure(mean_of(values), np.arange(4), resamples=100)
    assert found.value == 3.0 and 1.0 <= found.low < 3.0 < found.high <= 5.0
    (nothing,) = measure(mean_of(np.full(4, np.nan)), np.arange(4), resamples=10)
    assert np.isnan(nothing.value) and nothing.to_dict() == dict.fromkeys(nothing.to_dict())


def test_parts_are_the_numbers_of_their_rows_and_the_gap_is_between_them():
    rng = np.random.default_rng(1)
    groups = np.arange(600) // 2
    part = np.where(np.arange(600) % 3 == 0, "b", np.where(np.arange(600) % 3 == 1, "a", ""))
    values = rng.normal(size=600) + np.where(part == "b", 2.0, 0.0)
    both = mean_of(
        np.stack([values, -values], axis=1)
    )  # the best part of one, the worst of the other
    (found,) = break_down(both, groups, {"c": part}, resamples=300)
    assert list(found.parts) == ["a", "b"] and found.parts["a"][0] == 200
    for name, (_, (number, negative)) in found.parts.items():
        assert number.value == pytest.approx(values[part == name].mean(), rel=1e-5)
        assert negative.value == -number.value
    gap, mirrored = found.gaps
    assert [mirrored.value, mirrored.low] == pytest.approx([gap.value, gap.low])
    assert gap.value == pytest.approx(values[part == "b"].mean() - values[part == "a"].mean())
    assert gap.low < 2.0 < gap.high and gap.high - gap.low < 0.6
    assert found.to_dict(["mean", "minus"])["gap"]["mean"]["value"] == gap.value


def test_a_single_person_has_no_interval():
    values, groups = np.array([0.0, 1.0, 0.0, 1.0, 1.0]), np.array([0, 0, 1, 2, 2])
    (whole,) = measure(mean_of(values[:2]), groups[:2], resamples=50)
    assert whole.value == 0.5 and str(whole) == "0.50 [-, -]"
    assert whole.to_dict() == {"value": 0.5, "low": None, "high": None}
    parts = np.array(["a", "a", "b", "c", "c"])
    (found,) = break_down(mean_of(values), groups, {"c": parts}, resamples=50)
    said = [str(numbers[0]) for _, numbers in found.parts.values()]
    assert said == ["0.50 [-, -]", "0.00 [-, -]", "1.00 [-, -]"]
    assert str(found.gaps[0]) == "1.00 [-, -]"


def test_the_furthest_of_many_parts_are_seldom_a_finding_by_chance():
    """An interval of best minus worst alone leaves 0 out in a quarter of such trials."""
    groups, parts = np.arange(500), np.repeat(list("abcde"), 100)
    missed, widths = 0, []
    for trial in range(60):
        values = np.random.default_rng(trial).normal(size=500)
        options = {"resamples": 200, "seed": trial}
        (found,) = break_down(mean_of(values), groups, {"c": parts}, **options)
        missed += found.gaps[0].low > 0
        widths.append(found.gaps[0].value - found.gaps[0].low)
    assert missed <= 7  # 3 are expected
    # Tukey's range of five means: 3.86 of their standard error.
    assert np.mean(widths) == pytest.approx(3.86 * 0.1, rel=0.1)


def test_a_gap_of_nothing_may_be_nothing_and_one_part_has_none():
    values = np.random.default_rng(2).normal(size=400)
    halves = np.where(np.arange(400) % 2 == 0, "a", "b")
    (found,) = break_down(mean_of(values), np.arange(400), {"c": halves}, resamples=300)
    assert found.gaps[0].value > 0 > found.gaps[0].low
    (single,) = break_down(mean_of(values), np.arange(400), {"c": np.full(400, "a")}, resamples=9)
    assert single.gaps == [] and single.to_dict(["m"])["gap"] is None
