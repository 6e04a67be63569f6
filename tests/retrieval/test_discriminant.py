from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loracompose.retrieval import discriminant
from loracompose.retrieval.discriminant import Discriminant, Spectrum, Statistics, fit_discriminant

WIDTH = 6


def group(seed, examples=5, spread=1.0):
    """Examples of one adapter: a centre of its own, and one direction that varies in every adapter."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=WIDTH) + 0.3 * spread * rng.normal(size=(examples, WIDTH))
    rows[:, 0] += 3.0 * spread * rng.normal(size=examples)
    return rows.astype(np.float32)


def pool(adapters=4, spread=1.0):
    return [group(seed, examples=4 + seed % 3, spread=spread) for seed in range(adapters)]


def shrunk(statistics, shrinkage):
    covariance = statistics.scatter / statistics.freedom
    return (1 - shrinkage) * covariance + shrinkage * np.trace(covariance) / WIDTH * np.eye(WIDTH)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.integers(0, 30), st.integers(1, 4)), max_size=12))
def test_any_sequence_of_adds_and_removes_gives_the_statistics_of_a_rebuild(steps):
    groups = [group(100)]
    changed = Statistics.of(groups, WIDTH)
    for seed, (step, place, size) in enumerate(steps):
        if step == "add":
            new = [group(seed + i, examples=1 + (place + i) % 5) for i in range(size)]
            changed, groups = changed.adding(new), groups + new
        else:
            rows = sorted({(place + i) % len(groups) for i in range(size)}) if groups else []
            changed = changed.removing(rows, [groups[row] for row in rows])
            groups = [kept for row, kept in enumerate(groups) if row not in rows]
    rebuilt = Statistics.of(groups, WIDTH)
    assert np.array_equal(changed.counts, rebuilt.counts)
    np.testing.assert_allclose(changed.sums, rebuilt.sums, atol=1e-5)
    np.testing.assert_allclose(changed.scatter, rebuilt.scatter, atol=1e-5)


def test_the_scatter_is_that_about_the_means_of_the_adapters():
    groups = pool()
    expected = sum(len(rows) * np.cov(rows.T.astype(np.float64), bias=True) for rows in groups)
    np.testing.assert_allclose(Statistics.of(groups, WIDTH).scatter, expected, rtol=1e-6)


@pytest.mark.parametrize("shrinkage", [0.01, 0.4, 1.0])
def test_distances_are_those_under_the_inverse_of_the_shrunk_covariance(shrinkage):
    statistics = Statistics.of(pool(), WIDTH)
    queries = np.concatenate([group(50), group(51)])
    inverse = np.linalg.inv(shrunk(statistics, shrinkage))
    apart = queries[:, None] - statistics.means
    expected = np.einsum("qkd,de,qke->qk", apart, inverse, apart)
    found = Discriminant.of(Spectrum.of(statistics), shrinkage, 1.0).distances(queries)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_scores_are_log_probabilities_under_the_temperature():
    discriminant = Discriminant.of(Spectrum.of(Statistics.of(pool(), WIDTH)), 0.3, 4.0)
    raw = np.exp(-0.5 * discriminant.distances(group(7)) / 4.0)
    np.testing.assert_allclose(np.exp(discriminant.scores(group(7))), raw / raw.sum(axis=1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize("together", [1, 7, 256])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
def test_holding_out_in_closed_form_equals_leaving_out_and_computing_anew(monkeypatch, shrinkage, together):
    monkeypatch.setattr(discriminant, "_TOGETHER", together)
    groups = pool()
    spectrum = Spectrum.of(Statistics.of(groups, WIDTH))
    found = iter(spectrum.held_out([rows @ spectrum.axes for rows in groups], range(4), shrinkage))
    whole = Statistics.of(groups, WIDTH)
    covariance = whole.scatter / whole.freedom
    target = shrinkage * np.trace(covariance) / WIDTH * np.eye(WIDTH)
    for row, own in enumerate(groups):
        for i, query in enumerate(own):
            rest = [np.delete(own, i, axis=0) if r == row else rows for r, rows in enumerate(groups)]
            without = Statistics.of(rest, WIDTH)
            inverse = np.linalg.inv((1 - shrinkage) * without.scatter / whole.freedom + target)
            apart = query - without.means
            np.testing.assert_allclose(next(found), -0.5 * np.einsum("kd,de,ke->k", apart, inverse, apart), rtol=1e-5)


def test_what_varies_within_adapters_is_shrunk_little_where_it_misleads():
    groups = [group(seed, examples=30) for seed in range(6)]
    spectrum = Spectrum.of(Statistics.of(groups, WIDTH))
    shrinkage, temperature = fit_discriminant(spectrum, groups, range(6))
    assert shrinkage < 1.0
    fresh = [group(seed, examples=200)[30:] for seed in range(6)]  # the same centres, other examples
    queries, own = np.concatenate(fresh), np.repeat(np.arange(6), 170)
    fitted = Discriminant.of(spectrum, shrinkage, temperature).scores(queries).argmax(axis=1)
    plain = Discriminant.of(spectrum, 1.0, temperature).scores(queries).argmax(axis=1)
    assert (fitted == own).mean() > (plain == own).mean() + 0.1


@pytest.mark.parametrize("groups", [[], [group(0)], [group(0, examples=1), group(1, examples=1)]])
def test_where_there_is_nothing_to_hold_out_plain_distances_are_used(groups):
    spectrum = Spectrum.of(Statistics.of(groups, WIDTH))
    assert fit_discriminant(spectrum, groups, range(len(groups))) == (1.0, 1.0)
    scores = Discriminant.of(spectrum, 1.0, 1.0).scores(group(0))
    assert scores.shape == (5, len(groups))
    assert np.isfinite(scores).all()
