"""Statistics against scipy, brute force, and simulated coverage."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import roc_auc_score

from pocketrec.errors import ConfigError, DataError
from pocketrec.evaluation.statistics import (
    Interval,
    auc_statistic,
    bootstrap,
    chi_square_cdf,
    holm,
    mean_statistic,
    paired_t,
    range_quantile,
    ranks,
    retained,
    student_cdf,
    student_quantile,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_weighted_auc_is_the_auc_of_the_repeated_rows(n, levels, seed):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, n)]
    scores = rng.integers(0, levels, n + 2) / 3
    weights = np.r_[1, 1, rng.integers(0, 4, n)]
    expected = roc_auc_score(np.repeat(labels, weights), np.repeat(scores, weights))
    assert auc_statistic(labels, scores)(weights) == pytest.approx(expected, abs=1e-12)


def test_weighted_auc_of_one_drawn_class_is_nan_and_refuses_one_class_data():
    statistic = auc_statistic([0, 1], [0.1, 0.2])
    assert np.isnan(statistic(np.array([2, 0])))
    with pytest.raises(DataError):
        auc_statistic([1, 1], [0.1, 0.2])


@pytest.mark.parametrize("freedom", [1, 2, 4, 7, 29, 1000])
def test_student_matches_scipy(freedom):
    for t in (-8.0, -1.0, 0.0, 0.3, 2.0, 12.0):
        assert student_cdf(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-10)
    for probability in (0.5, 0.8, 0.95, 0.975, 0.995):
        assert student_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), abs=1e-6)


def test_paired_t_matches_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=8), rng.normal(0.3, 1, size=8)
    expected = stats.ttest_rel(a, b)
    got = paired_t(a, b, level=0.9)
    assert got.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert (got.low, got.high) == pytest.approx(tuple(expected.confidence_interval(0.9)), abs=1e-9)


def test_paired_t_of_equal_lists_is_a_point_and_needs_two_pairs():
    assert paired_t([0.5, 0.6], [0.5, 0.6]) == Interval(0.0, 0.0, 0.0, 1.0, 0.95)
    with pytest.raises(DataError):
        paired_t([0.5], [0.4])


def test_bootstrap_estimates_are_the_plain_means():
    rng = np.random.default_rng(1)
    labels = [rng.integers(0, 2, n) for n in (50, 80)]
    scores = [rng.normal(size=n) for n in (50, 80)]
    result = bootstrap(
        {"m": [auc_statistic(y, s) for y, s in zip(labels, scores, strict=True)]}, [50, 80], replicates=5
    )
    expected = np.mean([roc_auc_score(y, s) for y, s in zip(labels, scores, strict=True)])
    assert result.mean("m").estimate == pytest.approx(expected, abs=1e-12)


def test_bootstrap_spread_matches_the_two_level_formula():
    """``Var* = var_s(mean) / S + mean_s(var(rows) / n) / S`` for the mean of nested rows."""
    rng = np.random.default_rng(2)
    values = [rng.normal(rng.normal(), 2.0, 40) for _ in range(6)]
    result = bootstrap({"m": [mean_statistic(v) for v in values]}, [40] * 6, replicates=4000)
    between = np.var([v.mean() for v in values]) / 6
    within = np.mean([v.var() / 40 for v in values]) / 6
    assert result.replicates["m"].var() == pytest.approx(between + within, rel=0.08)


def test_shared_rows_keep_the_row_noise_of_one_split():
    rng = np.random.default_rng(3)
    rows = rng.normal(size=100)
    statistics = {"m": [mean_statistic(rows + shift) for shift in (0.0, 0.0, 0.0, 0.0)]}
    shared = bootstrap(statistics, [100] * 4, replicates=3000, shared_rows=True).replicates["m"].var()
    nested = bootstrap(statistics, [100] * 4, replicates=3000).replicates["m"].var()
    assert shared == pytest.approx(rows.var() / 100, rel=0.1)
    assert nested == pytest.approx(rows.var() / 400, rel=0.1)


def test_bootstrap_interval_covers_the_true_difference():
    """Synthetic normals, 8 seeds x 60 rows, paired: nominal 95 %; 200 trials, so +-3 sd is [.90, 1]."""
    rng = np.random.default_rng(4)
    covered = 0
    for trial in range(200):
        base = [rng.normal(size=60) for _ in range(8)]
        better = [b + 0.1 + rng.normal(0, 0.02) + rng.normal(0, 0.5, 60) for b in base]
        statistics = {"a": [mean_statistic(v) for v in better], "b": [mean_statistic(v) for v in base]}
        interval = bootstrap(statistics, [60] * 8, replicates=120, seed=trial).difference("a", "b")
        covered += interval.low <= 0.1 <= interval.high
    assert covered / 200 >= 0.90


def test_bootstrap_is_a_function_of_its_seed():
    statistics = {"m": [mean_statistic(np.arange(9.0))]}
    draws = [bootstrap(statistics, [9], replicates=20, seed=s).replicates["m"] for s in (0, 0, 1)]
    assert (draws[0] == draws[1]).all()
    assert (draws[0] != draws[2]).any()


def test_bootstrap_refuses_what_does_not_fit():
    mean = mean_statistic(np.arange(4.0))
    with pytest.raises(ConfigError, match="one statistic per seed"):
        bootstrap({"m": [mean]}, [4, 4])
    with pytest.raises(ConfigError, match="one test split"):
        bootstrap({"m": [mean, mean]}, [4, 5], shared_rows=True)


def test_share_of_evidence_and_equivalence():
    rng = np.random.default_rng(5)
    base = rng.normal(size=400)
    statistics = {"a": [mean_statistic(base + 0.5)], "b": [mean_statistic(base)], "c": [mean_statistic(base[::-1])]}
    result = bootstrap(statistics, [400], replicates=400)
    assert result.difference("a", "b").p == pytest.approx(2 / 401)
    assert result.difference("a", "b").no_worse(0.0)
    assert not result.difference("b", "a").no_worse(0.4)
    assert result.difference("b", "c").p > 0.5
    assert result.difference("b", "c").within(1.0)
    assert not result.difference("a", "b").within(0.5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holm_rejects_what_the_step_down_procedure_rejects(evidence):
    """The procedure itself: go up the sorted p-values, stop at the first above ``a / (m - i)``."""
    corrected = holm(evidence)
    for level in (0.01, 0.05, 0.3):
        rejected, order = set(), np.argsort(evidence, kind="stable")
        for i, which in enumerate(order):
            if evidence[which] * (len(evidence) - i) > level:
                break
            rejected.add(which)
        assert {i for i, p in enumerate(corrected) if p <= level} == rejected
    assert (corrected >= np.asarray(evidence)).all()


def test_holm_keeps_the_chance_of_any_false_rejection():
    """Ten true hypotheses, 4,000 families: at most 5 % of families reject anything (+3 sd)."""
    rng = np.random.default_rng(7)
    families = rng.random((4000, 10))
    assert np.mean([(holm(p) <= 0.05).any() for p in families]) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 4000)


def test_retained_quality_above_chance():
    assert retained(0.75, 0.8) == pytest.approx(0.9375)
    assert retained(0.75, 0.8, chance=0.5) == pytest.approx(0.25 / 0.3)
    assert np.isnan(retained(0.6, 0.5, chance=0.5))


@settings(max_examples=100, deadline=None)
@given(st.integers(3, 6), st.integers(2, 9), st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_friedman_matches_scipy_with_ties(methods, blocks, levels, seed):
    rng = np.random.default_rng(seed)
    figures = {f"m{j}": rng.integers(0, levels + 1, blocks).astype(float).tolist() for j in range(methods)}
    got = ranks(figures)
    table = np.array(list(figures.values())).T
    expected = stats.rankdata(-table, axis=1).mean(axis=0)
    assert list(got.average.values()) == pytest.approx(expected.tolist())
    if any(len(set(row)) > 1 for row in table):
        oracle = stats.friedmanchisquare(*figures.values())
        assert got.statistic == pytest.approx(oracle.statistic, abs=1e-9)
        assert got.p == pytest.approx(oracle.pvalue, abs=1e-9)
    else:
        assert (got.statistic, got.p) == (0.0, 1.0)


@pytest.mark.parametrize("methods", [2, 3, 5, 10, 20])
def test_critical_difference_matches_scipy(methods):
    for level in (0.9, 0.95, 0.99):
        expected = stats.studentized_range.ppf(level, methods, np.inf)
        assert range_quantile(level, methods) == pytest.approx(expected, abs=2e-4)
    got = ranks({f"m{j}": [float(j)] * 4 for j in range(methods)})
    expected = stats.studentized_range.ppf(0.95, methods, np.inf) * np.sqrt(methods * (methods + 1) / (12 * 4))
    assert got.critical == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("freedom", [1, 2, 3, 10, 40])
def test_chi_square_matches_scipy(freedom):
    for value in (0.0, 1e-6, 0.5, 3.0, 20.0, 400.0):
        assert chi_square_cdf(value, freedom) == pytest.approx(stats.chi2.cdf(value, freedom), abs=1e-12)


def test_ranks_need_the_same_data_sets():
    with pytest.raises(DataError, match="same data sets"):
        ranks({"a": [1.0, 2.0], "b": [1.0]})
    with pytest.raises(DataError, match="two methods"):
        ranks({"a": [1.0]})


def test_linear_auc_is_the_auc_and_follows_its_draws():
    """Second-order terms only: replicates differ from exact ones by far less than they vary."""
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 2, 3000)
    scores = np.round(rng.normal(labels * 0.5, 1.0), 1)
    exact, linear = auc_statistic(labels, scores), auc_statistic(labels, scores, exact=False)
    ones = np.ones(3000, dtype=np.int64)
    assert linear(ones) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    draws = [np.bincount(rng.integers(0, 3000, 3000), minlength=3000) for _ in range(300)]
    a, b = np.array([exact(w) for w in draws]), np.array([linear(w) for w in draws])
    assert np.sqrt(np.mean((a - b) ** 2)) < 0.05 * a.std()
    assert b.std() == pytest.approx(a.std(), rel=0.01)


def test_better_than_and_no_worse_err_as_often_as_they_say():
    """No difference, 5 seeds x 60 rows, rows the larger noise: 'better' in at most 5 % of 200 trials (+3 sd)."""
    rng = np.random.default_rng(9)
    better = no_worse = 0
    for trial in range(200):
        base = [rng.normal(size=60) for _ in range(5)]
        other = [b + rng.normal(0, 0.02) + rng.normal(0, 0.5, 60) for b in base]
        worse = [o - 0.05 for o in other]
        names = {"a": other, "b": base, "w": worse}
        result = bootstrap(
            {n: [mean_statistic(v) for v in values] for n, values in names.items()},
            [60] * 5,
            replicates=150,
            seed=trial,
        )
        better += result.difference("a", "b").p <= 0.05
        no_worse += result.difference("w", "b").no_worse(0.05)
    assert better / 200 <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 200)
    assert no_worse / 200 <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / 200)
