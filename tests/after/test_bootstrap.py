"""Intervals hold the truth as often as they say, on skewed data too; and are what they are."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from mlx_qlora.after import bootstrap
from mlx_qlora.after.bootstrap import BCA, FEWEST, NONE, STUDENTISED, Interval, ratio_interval
from mlx_qlora.errors import DataError

Made = tuple[np.ndarray, np.ndarray | None, float]  # values, weights, the truth


def lognormal(random: np.random.Generator, n: int) -> Made:
    return random.lognormal(0, 1, n), None, math.exp(0.5)


def token_weighted(random: np.random.Generator, n: int) -> Made:
    tokens = np.ceil(random.lognormal(3, 0.8, n))
    return tokens * random.gamma(2, 1, n), tokens, 2.0


def paired_losses(random: np.random.Generator, n: int) -> Made:
    tokens = np.ceil(random.lognormal(3, 0.8, n))
    change = -0.1 * random.gamma(1, 1, n) + 0.02 * random.normal(size=n)
    return tokens * change, tokens, -0.1


def right_or_wrong(random: np.random.Generator, n: int) -> Made:
    before, after = random.random(n) < 0.2, random.random(n) < 0.35
    return after.astype(float) - before, None, 0.15


def coverage(make: Callable[[np.random.Generator, int], Made], n: int, sets: int) -> float:
    random, held = np.random.default_rng(7), 0
    for seed in range(sets):
        values, weights, truth = make(random, n)
        found = ratio_interval(values, weights, seed=seed, resamples=600)
        held += found.low <= truth <= found.high
    return held / sets


@pytest.mark.parametrize("make", [lognormal, token_weighted, paired_losses, right_or_wrong])
@pytest.mark.parametrize(("n", "sets"), [(50, 2000), (200, 2000)])
def test_95_percent_intervals_hold_the_truth_in_93_to_97_percent_of_sets(make, n, sets):
    assert 0.93 <= coverage(make, n, sets) <= 0.97


def test_seldom_differing_answers_of_a_small_set_are_covered_less_often():
    def seldom(random: np.random.Generator, n: int) -> Made:
        before, after = random.random(n) < 0.1, random.random(n) < 0.2
        return after.astype(float) - before, None, 0.1

    assert 0.85 <= coverage(seldom, 20, 600) < 0.95


def test_the_level_is_the_share_that_is_held(monkeypatch):
    monkeypatch.setattr(bootstrap, "LEVEL", 0.8)
    random, held = np.random.default_rng(3), 0
    for seed in range(600):
        found = ratio_interval(random.gamma(2, 1, 60), None, seed, 1000)
        held += found.low <= 2 <= found.high
    assert 0.77 <= held / 600 <= 0.84


def test_on_normal_data_it_is_student_s_interval():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = ratio_interval(values, resamples=40_000)
    half = 1.9659 * values.std(ddof=1) / math.sqrt(400)
    assert found.estimate == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.03 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03 * half)
    assert (found.n, found.level, found.method) == (400, 0.95, STUDENTISED)


def test_the_upper_end_is_farther_off_where_the_data_reach_upwards():
    found = ratio_interval(np.random.default_rng(0).lognormal(0, 1.2, 60))
    assert found.high - found.estimate > 1.3 * (found.estimate - found.low)


def test_a_ratio_is_weighted_by_its_weights():
    random = np.random.default_rng(0)
    tokens = random.integers(1, 90, 40)
    nats = tokens * random.gamma(2, 1, 40)
    found = ratio_interval(nats, tokens)
    assert found.estimate == pytest.approx(nats.sum() / tokens.sum(), rel=1e-12)
    scaled = ratio_interval(10 * nats, tokens)  # another unit, the same interval
    assert (scaled.low, scaled.high) == pytest.approx((10 * found.low, 10 * found.high))
    # An example cut in two is not two examples, but the figure stays.
    assert found.estimate != pytest.approx((nats / tokens).mean(), rel=1e-3)


def test_paired_intervals_are_narrower_than_unpaired_ones_on_correlated_data():
    random = np.random.default_rng(0)
    base = random.gamma(2, 1, 80)
    tuned = 0.9 * base + 0.05 * random.normal(size=80)
    paired = ratio_interval(tuned - base)
    # Unpaired: each model on examples of its own, resampled apart.
    draws = random.integers(0, 80, (2, 4000, 80))
    moved = tuned[draws[0]].mean(axis=1) - base[draws[1]].mean(axis=1)
    low, high = np.quantile(moved, [0.025, 0.975])
    assert paired.high - paired.low < 0.25 * (high - low)
    assert not paired.includes_zero and low < 0 < high


def test_the_same_seed_gives_the_same_interval_and_the_order_of_draws_matters():
    values = np.random.default_rng(0).gamma(2, 1, 50)
    assert ratio_interval(values, seed=1) == ratio_interval(values, seed=1)
    one, two = ratio_interval(values, seed=1), ratio_interval(values, seed=2)
    assert one != two
    assert abs(one.low - two.low) < 0.1 * (one.high - one.low)


def test_few_ones_among_zeros_take_bca_and_stay_in_range():
    found = ratio_interval(np.array([1.0] + [0.0] * 29))
    assert found.method == BCA
    assert 0 <= found.low < 1 / 30 < found.high < 0.25
    mirrored = ratio_interval(np.array([-1.0] + [0.0] * 29))
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low), abs=0.04)


@pytest.mark.parametrize(("n", "noise", "moved"), [(20, 1e-3, 2), (32, 1e-4, 3), (20, 0.02, 2)])
def test_a_change_that_a_few_examples_carry_reaches_no_farther_than_they_do(n, noise, moved):
    values = np.random.default_rng(0).normal(0, noise, n)
    values[:moved] -= 0.5
    found = ratio_interval(values)
    assert found.method == BCA
    assert values.min() < found.low < found.estimate < found.high < values.max()
    assert found.high - found.low < 0.3


def test_rare_changes_of_either_sign_are_covered_less_often():
    def rare(random: np.random.Generator, n: int) -> Made:
        changed = (random.random(n) < 0.1) * random.choice([-0.5, 0.5], n)
        return changed * random.gamma(4, 0.25, n) + random.normal(0, 1e-3, n), None, 0.0

    assert 0.75 <= coverage(rare, 20, 600) < 0.9


@pytest.mark.parametrize("values", [np.full(30, 0.7), np.zeros(30), np.arange(FEWEST - 1)])
def test_what_allows_no_interval_says_so(values):
    found = ratio_interval(values)
    assert found.method == NONE and not found.known and found.includes_zero
    assert found.low == found.high == found.estimate == pytest.approx(values.mean())
    assert found.to_dict()["low"] is None and found.to_dict()["estimate"] == found.estimate


def test_an_increasing_function_moves_the_ends():
    found = Interval(1.0, 0.5, 2.0, 9, STUDENTISED).mapped(math.exp)
    assert (found.estimate, found.low, found.high) == tuple(map(math.exp, (1.0, 0.5, 2.0)))


def test_what_gives_no_interval_is_refused():
    with pytest.raises(DataError, match="no examples to draw"):
        ratio_interval(np.zeros(0))
    with pytest.raises(DataError, match="not finite"):
        ratio_interval(np.array([1.0, np.nan]))
    with pytest.raises(DataError, match="weight is not above 0"):
        ratio_interval(np.ones(9), np.zeros(9))
