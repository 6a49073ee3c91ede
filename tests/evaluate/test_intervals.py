"""Intervals against published values and formulas worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llava_fn.evaluate import intervals
from llava_fn.evaluate.intervals import of_difference, of_mean, wilson


@pytest.mark.parametrize(("hits", "n", "low", "high"), [
    (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_wilson_gives_the_values_that_newcombe_published(hits, n, low, high):
    """Newcombe 1998, Statistics in Medicine 17, table I, method 3."""
    got = wilson(hits / n, n)
    assert (got.low, got.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_mean_and_solves_its_equation(pair):
    hits, n = pair
    p, got = hits / n, wilson(hits / n, n)
    assert 0 <= got.low <= p <= got.high <= 1
    for bound in (got.low, got.high):
        if 1e-9 < bound < 1 - 1e-9:
            assert abs(p - bound) == pytest.approx(intervals.Z * (bound * (1 - bound) / n) ** 0.5, rel=1e-6)


def clustered(seed, groups=400, largest=5):
    """Scores that agree within their picture; pictures of 1 to 5 questions."""
    r = np.random.default_rng(seed)
    pictures = np.repeat(np.arange(groups), r.integers(1, largest + 1, groups))
    return np.clip(r.normal(0.5, 0.2, groups)[pictures] + r.normal(0, 0.1, len(pictures)), 0, 1), pictures


def standard_error(values, pictures):
    """Of a mean, by the ratio estimator over pictures (Cochran 1977, equation 6.13)."""
    rest = np.bincount(pictures, weights=values - values.mean())
    return (rest @ rest * len(rest) / (len(rest) - 1)) ** 0.5 / len(values)


@pytest.mark.parametrize("seed", range(3))
def test_the_bootstrap_has_the_width_of_the_clustered_standard_error(seed):
    values, pictures = clustered(seed)
    got, error = of_mean(values, pictures), standard_error(values, pictures)
    assert got.method == "bootstrap"
    assert got.low == pytest.approx(values.mean() - 1.96 * error, abs=0.2 * error)
    assert got.high == pytest.approx(values.mean() + 1.96 * error, abs=0.2 * error)
    naive = standard_error(values, np.arange(len(values)))
    assert error > 1.5 * naive  # so the test would see if the pictures were forgotten


def test_the_bootstrap_is_the_same_each_time_and_does_not_care_for_labels():
    values, pictures = clustered(0, 50)
    names = np.array([f"sha{p:05}" for p in pictures])
    assert of_mean(values, pictures) == of_mean(values, pictures) == of_mean(values, names)
    assert of_mean(values, pictures, seed=1) != of_mean(values, pictures)


def test_the_size_of_the_blocks_changes_nothing(monkeypatch):
    values, pictures = clustered(0, 50)
    whole = of_mean(values, pictures)
    monkeypatch.setattr(intervals, "BLOCK", 50 * 7)
    assert of_mean(values, pictures) == whole


def test_which_interval_is_used_depends_on_scores_and_pictures():
    bits, alone = np.array([1.0, 1.0, 0.0, 0.0] * 25), np.arange(100)
    assert of_mean(bits, alone) == wilson(0.5, 100)
    assert of_mean(bits, alone // 2).method == "bootstrap"  # two questions to a picture
    assert of_mean(bits * 0.9, alone).method == "bootstrap"  # no 0 and 1
    assert of_mean(bits, alone // 5) == wilson(0.5, 20)  # few pictures: as if each were one question
    assert of_mean(np.ones(100), alone // 2) == wilson(1.0, 50)  # all means the same
    assert of_mean(np.ones(1), np.zeros(1)) == wilson(1.0, 1)


def test_a_paired_difference_is_narrow_where_two_runs_agree():
    values, pictures = clustered(0)
    other = values.copy()
    other[:40] -= 0.1
    got = of_difference(values, other, pictures)
    error = standard_error(values - other, pictures)
    mean = (values - other).mean()
    assert got.low == pytest.approx(mean - 1.96 * error, abs=0.25 * error) and got.low > 0
    assert got.high == pytest.approx(mean + 1.96 * error, abs=0.25 * error)
    assert of_difference(other, values, pictures).high == pytest.approx(-got.low)
    same = of_difference(values, values, pictures)  # it cannot be told from the draws how far 0 is certain
    assert same.method == "adjusted" and -same.low == same.high == pytest.approx(1.96 * math.sqrt(2) / 402, rel=1e-3)


@pytest.mark.parametrize(("better", "worse", "n"), [(9, 1, 20), (0, 0, 10), (1, 0, 1), (2, 2, 4)])
def test_a_difference_of_few_questions_has_the_adjusted_interval_by_its_formula(better, worse, n):
    """With the two shares of changed questions as (count + 1) / (n + 2), of which the paper takes Wald's interval."""
    p, q = (better + 1) / (n + 2), (worse + 1) / (n + 2)
    half = intervals.Z * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    one, other = np.array([1.0] * better + [0.0] * (n - better)), np.array([0.0] * (n - worse) + [1.0] * worse)
    got = of_difference(one, other, np.arange(n))
    assert got.low == pytest.approx(max(-1, p - q - half)) and got.high == pytest.approx(min(1, p - q + half))
    doubled = of_difference(one.repeat(2), other.repeat(2), np.arange(n).repeat(2))  # two questions to each picture
    assert doubled.low == pytest.approx(got.low) and doubled.high == pytest.approx(got.high)


def test_a_difference_holds_its_mean_and_stays_within_one():
    for n in range(1, 30):
        for sizes in (np.arange(n), np.arange(n) // 3, np.minimum(np.arange(n), 1)):
            got = of_difference(np.ones(n), np.zeros(n), sizes)
            assert -1 <= got.low < got.high == 1.0
    rng = np.random.default_rng(0)
    for n in (2, 5, 29):
        one, other = rng.random(n), rng.random(n)
        got = of_difference(one, other, np.minimum(np.arange(n), n // 2))
        assert got.low < (one - other).mean() < got.high
