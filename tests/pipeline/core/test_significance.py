"""Intervals and verdicts against scipy.stats, numbers by hand, and simulations of what an interval claims."""

from __future__ import annotations

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.core.significance import Comparison, Interval, compare, holm, image_interval, seed_interval

# Accuracies in points: differences of two of them are exact enough for the comparisons below.
values = st.floats(0, 100).map(lambda value: round(value, 3))
samples = st.lists(values, min_size=3, max_size=8)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_an_interval_of_three_seeds_by_hand() -> None:
    # Mean 61, deviation 1, standard error 1/√3; the table's t for 2 degrees of freedom and 97.5 % is 4.3027.
    interval = seed_interval([60.0, 61.0, 62.0])
    assert (interval.mean, interval.n) == (61, 3)
    assert interval.half_width == pytest.approx(4.3027 / math.sqrt(3), abs=1e-4)


def test_an_interval_of_two_seeds_is_12_7_standard_errors_wide_and_of_one_infinite() -> None:
    assert seed_interval([57.4, 58.2]).half_width == pytest.approx(12.7062 * 0.4, abs=1e-4)
    assert seed_interval([57.4]) == Interval(57.4, -math.inf, math.inf, 1)
    empty = seed_interval([])
    assert math.isnan(empty.mean)
    assert (empty.low, empty.high, empty.n) == (-math.inf, math.inf, 0)


@given(samples, st.data())
def test_a_paired_interval_and_its_p_value_are_those_of_scipy(student_S: list[float], data: st.DataObject) -> None:
    baseline_S = data.draw(st.lists(values, min_size=len(student_S), max_size=len(student_S)))
    difference_S = [student - baseline for student, baseline in zip(student_S, baseline_S, strict=True)]
    if np.std(difference_S) < 1e-6:
        return
    expected = stats.ttest_rel(student_S, baseline_S)
    low, high = expected.confidence_interval(0.95)
    (comparison,) = compare([difference_S], [None])
    assert comparison.p == pytest.approx(expected.pvalue, rel=1e-9, abs=1e-15)
    assert (comparison.difference.low, comparison.difference.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert (comparison.verdict == "distinguished") == (expected.pvalue < 0.05)


def test_holm_s_correction_by_hand() -> None:
    # 4 · 0.01, 3 · 0.0125, 2 · 0.02, 1 · 0.5; no corrected value is below that of a smaller one.
    assert holm([0.02, 0.5, 0.01, 0.0125]) == pytest.approx([0.04, 0.5, 0.04, 0.04])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []


@given(p_values, st.randoms(use_true_random=False))
def test_holm_rejects_between_bonferroni_and_no_correction_in_any_order(p_C: list[float], random: Random) -> None:
    corrected = holm(p_C)
    for p, adjusted in zip(p_C, corrected, strict=True):
        assert min(1, p) <= adjusted <= min(1, len(p_C) * p)
    order = list(range(len(p_C)))
    random.shuffle(order)
    assert holm([p_C[index] for index in order]) == [corrected[index] for index in order]


@given(p_values, st.floats(0.001, 0.2))
def test_holm_rejects_what_the_step_down_procedure_rejects(p_C: list[float], level: float) -> None:
    rejected = 0
    for rank, p in enumerate(sorted(p_C)):
        if p * (len(p_C) - rank) >= level:
            break
        rejected += 1
    assert sum(adjusted < level for adjusted in holm(p_C)) == rejected


def test_a_difference_that_is_distinguished_alone_may_not_be_after_correction() -> None:
    # p = 0.026 alone, 0.079 as the smallest of three.
    clear, flat = [1.0, 1.5, 1.25, 0.2], [1.0, -1.0, 0.5, -0.6]
    assert compare([clear], [None])[0].verdict == "distinguished"
    corrected = compare([clear, flat, flat], [None] * 3)
    assert [comparison.verdict for comparison in corrected] == ["not resolved"] * 3
    assert corrected[0].difference == compare([clear], [None])[0].difference


def test_no_effect_needs_an_interval_within_the_margin() -> None:
    # Half-width 0.37.
    small = [0.1, -0.1, 0.2, -0.25]
    wide, narrow, missing = compare([small] * 3, [0.5, 0.2, None])
    assert (wide.verdict, narrow.verdict, missing.verdict) == ("no effect", "not resolved", "not resolved")


def test_a_distinguished_difference_within_the_margin_is_not_called_no_effect() -> None:
    (comparison,) = compare([[0.2, 0.21, 0.19, 0.2]], [0.5])
    assert comparison.difference.is_within(0.5)
    assert comparison.verdict == "distinguished"


@pytest.mark.parametrize("difference_S", [[], [3.0], [3.0, 3.01], [0.0, 0.0]])
def test_two_seeds_resolve_nothing_and_do_not_count_as_comparisons(difference_S: list[float]) -> None:
    clear = [1.0, 1.5, 1.25, 0.2]
    few, enough = compare([difference_S, clear], [100.0, None])
    assert (few.p, few.verdict, few.difference.n) == (None, "not resolved", len(difference_S))
    assert enough == compare([clear], [None])[0]


def test_runs_with_equal_results_have_no_effect_and_a_constant_difference_is_distinguished() -> None:
    equal, constant = compare([[0.0] * 3, [1.5] * 3], [0.5, 0.5])
    assert equal == Comparison(Interval(0, 0, 0, 3), 1, "no effect")
    assert (constant.p, constant.verdict) == (0, "distinguished")


@given(st.lists(samples, min_size=1, max_size=6), st.floats(0.01, 50))
def test_a_verdict_follows_from_interval_p_and_margin(differences: list[list[float]], margin: float) -> None:
    shifted = [[value - 50 for value in values_S] for values_S in differences]
    for comparison in compare(shifted, [margin] * len(shifted)):
        interval = comparison.difference
        excludes_zero = interval.low > 0 or interval.high < 0
        if comparison.verdict == "distinguished":
            assert excludes_zero or interval.low == interval.high
        if comparison.verdict == "no effect":
            assert max(abs(interval.low), abs(interval.high)) < margin


@pytest.mark.parametrize("num_seeds", [2, 3, 5])
def test_95_of_100_intervals_over_seeds_contain_the_true_mean(num_seeds: int) -> None:
    random = np.random.default_rng(num_seeds)
    intervals = [seed_interval(list(random.normal(70, 0.8, num_seeds))) for _ in range(2000)]
    covered = sum(interval.low < 70 < interval.high for interval in intervals)
    # Four standard errors of a share of 2,000.
    assert covered / 2000 == pytest.approx(0.95, abs=4 * math.sqrt(0.95 * 0.05 / 2000))


def test_without_any_effect_one_table_in_20_distinguishes_something() -> None:
    random = np.random.default_rng(0)
    tables = [compare(random.normal(0, 1, (6, 5)).tolist(), [None] * 6) for _ in range(1000)]
    wrong = sum(any(comparison.verdict == "distinguished" for comparison in table) for table in tables)
    assert 0.02 < wrong / 1000 < 0.05 + 4 * math.sqrt(0.95 * 0.05 / 1000)


def test_95_of_100_intervals_over_images_contain_the_true_accuracy() -> None:
    random = np.random.default_rng(1)
    intervals = [
        image_interval((random.random(400) < 0.7).astype(np.float64), seed=0, num_samples=1000) for _ in range(500)
    ]
    covered = sum(interval.low <= 0.7 <= interval.high for interval in intervals)
    assert 0.91 < covered / 500 < 0.985


def test_an_interval_over_images_is_the_percentile_bootstrap_of_scipy() -> None:
    random = np.random.default_rng(2)
    # The mean of three seeds' hits minus those of another student.
    difference_N = (random.integers(0, 4, 800) - random.integers(0, 3, 800)) / 3
    expected = stats.bootstrap(
        (difference_N,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(3)
    )
    interval = image_interval(difference_N, seed=4)
    assert interval.mean == pytest.approx(difference_N.mean())
    assert interval.n == 800
    half_width = (expected.confidence_interval.high - expected.confidence_interval.low) / 2
    assert (interval.low, interval.high) == pytest.approx(tuple(expected.confidence_interval), abs=half_width / 20)


def test_an_interval_over_images_depends_on_the_seed_alone_and_not_on_the_order() -> None:
    values_N = np.random.default_rng(5).random(300)
    first, reversed_order = (image_interval(values, seed=1, num_samples=5000) for values in (values_N, values_N[::-1]))
    assert (reversed_order.low, reversed_order.high) == (first.low, first.high)
    assert image_interval(values_N, seed=1, num_samples=5000) == first
    assert image_interval(values_N, seed=2, num_samples=5000) != first


def test_images_with_equal_values_have_an_interval_of_one_point() -> None:
    assert image_interval(np.ones(50), seed=0) == Interval(1, 1, 1, 50)
