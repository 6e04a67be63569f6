"""Estimates against closed forms and a bootstrap written out in loops."""

from __future__ import annotations

import numpy as np
import pytest

from loracompose.evaluation.statistics import Estimate, Scores, resample

CHANCE = np.random.default_rng(0)
TASKS = ["a"] * 30 + ["b"] * 10 + ["c"] * 20
LEVEL = np.where(np.array(TASKS) == "a", 20.0, 60.0)
BASE = LEVEL / 4 + CHANCE.normal(0, 3, 60)
ORACLE = LEVEL + CHANCE.normal(0, 5, 60)


def scores(samples=2000, **columns):
    given = {"base": BASE, "oracle": ORACLE, **columns}
    return Scores.of(TASKS, {label: list(column) for label, column in given.items()}, samples=samples)


def task_means(column):
    return [np.mean([x for x, task in zip(column, TASKS, strict=True) if task == t]) for t in "abc"]


def test_a_score_is_the_mean_over_tasks_however_many_rows_they_have():
    assert scores().score("oracle").value == pytest.approx(np.mean(task_means(ORACLE)))
    assert scores().score("oracle").value != pytest.approx(np.mean(ORACLE))
    np.testing.assert_allclose(scores().by_task()[:, 0], task_means(BASE))


def test_the_interval_is_that_of_the_stratified_mean():
    # Var = Σ_t s_t² / n_t / T², with s_t² the unbiased variance of the task's rows; normal with 60 rows
    parts = [np.var(ORACLE[np.array(TASKS) == t], ddof=1) / TASKS.count(t) for t in "abc"]
    spread = 1.96 * np.sqrt(sum(parts)) / 3
    got = scores(samples=20000).score("oracle")
    assert got.high - got.value == pytest.approx(spread, rel=0.05)
    assert got.value - got.low == pytest.approx(spread, rel=0.05)


def test_the_interval_equals_a_bootstrap_in_loops_over_the_same_draws():
    drawn = resample(np.array([0, 0, 0, 1, 1]), 500, seed=0)
    values = np.array([1.0, 5.0, 9.0, 2.0, 4.0])
    means = []
    for counts in drawn:
        times = np.rint(counts * [2, 2, 2, 1, 1]).astype(int)
        assert times[:3].sum() == 2
        assert times[3:].sum() == 1
        means.append((np.repeat(values[:3], times[:3]).mean() + np.repeat(values[3:], times[3:]).mean()) / 2)
    got = Scores.of(["x", "x", "x", "y", "y"], {"m": list(values)}, samples=500).score("m")
    assert (got.value, got.low, got.high) == pytest.approx((4.0, *np.percentile(means, [2.5, 97.5])))


def test_few_rows_get_the_width_of_the_unbiased_variance():
    columns = CHANCE.normal(0, 1, (400, 4))
    widths = [Scores.of(["t"] * 4, {"m": list(c)}, samples=400).resampled @ c for c in columns]
    assert np.mean([np.var(means) for means in widths]) == pytest.approx(1 / 4, rel=0.1)  # s² / n, not s² (n - 1) / n²


def test_a_task_of_one_row_leaves_no_interval_and_proves_nothing():
    made = Scores.of(["a", "a", "b"], {"base": [1.0, 2.0, 3.0], "oracle": [9.0, 9.0, 9.0]})
    assert made.score("base").value == pytest.approx(2.25)
    assert np.isnan([made.score("base").low, made.score("base").high]).all()
    assert not made.difference("oracle", "base").difference.excludes_zero


def test_differences_are_paired():
    noisy = CHANCE.uniform(0, 100, 60)
    made = scores(first=noisy, second=noisy - 2.0)
    found = made.difference("first", "second").difference
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.excludes_zero
    wide = made.score("first")
    assert wide.high - wide.low > 10
    back = made.difference("second", "first").difference
    assert (back.value, back.low, back.high) == pytest.approx((-2.0, -2.0, -2.0))


def test_wins_count_tasks_and_ties_count_for_nobody():
    better_on_a = BASE + np.where(np.array(TASKS) == "a", 1.0, np.where(np.array(TASKS) == "b", -3.0, 0.0))
    found = scores(other=better_on_a).difference("other", "base")
    assert (found.won, found.lost) == (1, 1)


def test_normalised_scores_are_0_at_the_base_and_100_at_the_oracle_without_spread():
    made = scores(half=(BASE + ORACLE) / 2)
    assert made.normalised("base") == Estimate(0.0, 0.0, 0.0)
    for label, value in (("oracle", 100.0), ("half", 50.0)):
        found = made.normalised(label)
        assert (found.value, found.low, found.high) == pytest.approx((value, value, value))


def test_nothing_is_normalised_by_an_oracle_that_is_not_better():
    assert Scores.of(TASKS, {"base": list(ORACLE), "oracle": list(BASE)}).normalised("base") is None


def test_a_method_that_is_not_defined_everywhere_is_judged_where_it_is():
    partial = [None if task == "b" else float(x) for x, task in zip(ORACLE, TASKS, strict=True)]
    made = scores(partial=partial)
    means = task_means(ORACLE)
    assert made.score("partial").value == pytest.approx((means[0] + means[2]) / 2)
    assert made.difference("partial", "oracle").difference.value == pytest.approx(0.0)
    assert np.isnan(made.by_task()[1, 2])
    assert made.normalised("base", oracle="partial").value == pytest.approx(0.0)


def test_the_same_seed_draws_the_same_rows_and_methods_do_not_change_each_other():
    alone, beside = scores(), scores(other=BASE * 2)
    assert alone.score("oracle") == beside.score("oracle")
    assert scores(samples=50).score("oracle") != alone.score("oracle")


def test_scores_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="'m' has 1 scores for 2 rows"):
        Scores.of(["a", "b"], {"m": [1.0]})
    with pytest.raises(ValueError, match="no rows"):
        Scores.of([], {"m": []})
    with pytest.raises(LookupError, match="no method 'x'; there are base, oracle"):
        scores().score("x")


def test_an_interval_is_no_evidence_while_few_rows_differ():
    better = np.array(BASE)
    better[:15] += 5.0
    found = scores(other=better).difference("other", "base")
    assert found.moved == 15
    assert np.isnan([found.claimed.low, found.claimed.high]).all()
    better[15] += 5.0
    found = scores(other=better).difference("other", "base")
    assert found.claimed == found.difference
