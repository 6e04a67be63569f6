"""The current metric: exact statistics, and the corrected inverse against dense arithmetic."""

from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.discriminant import Statistics
from loracompose.retrieval.scale import drift as drifting
from loracompose.retrieval.scale.drift import RANK, Drift
from loracompose.retrieval.scale.metric import Frame, Metric
from loracompose.retrieval.scale.rows import Scaled
from loracompose.retrieval.scale.statistics import Moments, deviations, moments

WIDTH, SHRINKAGE = 6, 0.3


def groups(count, seed=0, width=WIDTH, examples=4):
    draw = np.random.default_rng(seed)
    return [
        (draw.standard_normal(width) + draw.standard_normal((examples, width))).astype(np.float32) for _ in range(count)
    ]


def frame_of(pool, width=WIDTH):
    """The frame of a version of this pool, and its covariance."""
    state, _, _ = moments(pool)
    covariance = state.scatter / state.freedom
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * np.trace(covariance) / width * np.eye(width)
    values, axes = np.linalg.eigh(shrunk)
    centre = np.linspace(-1, 1, width).astype(np.float32)
    frame = Frame(centre, axes / np.sqrt(values), np.eye(width, 3, dtype=np.float32), state.freedom, SHRINKAGE, 2.0)
    return frame, shrunk


def drifted(frame, came, went):
    drift = Drift.none(len(frame.centre), frame.freedom, 1 - frame.shrinkage)
    for sign, pool in ((1, came), (-1, went)):
        for group in pool:
            drift = drift.moved(frame.whitened(deviations(group)), len(group) - 1, sign)
    return drift


def current_covariance(frame, shrunk, came, went):
    """The definition, written out densely."""
    change, freedom = np.zeros_like(shrunk), 0
    for sign, pool in ((1, came), (-1, went)):
        for group in pool:
            centred = group.astype(np.float64) - group.mean(axis=0, dtype=np.float64)
            change += sign * centred.T @ centred
            freedom += sign * (len(group) - 1)
    weight = 1 - SHRINKAGE
    return (frame.freedom * shrunk + weight * change) / (frame.freedom + weight * freedom)


def test_the_moments_of_a_pool_taken_in_parts_and_less_what_went_are_those_of_a_rebuild():
    pool = groups(30)
    state = Moments.none(WIDTH)
    for start in range(0, 30, 7):
        state = state.plus(moments(pool[start : start + 7])[0])
    for group in pool[::3]:
        state = state.without(group)
    left = [group for row, group in enumerate(pool) if row % 3]
    expected = Statistics.of(left, WIDTH)
    np.testing.assert_allclose(state.scatter, expected.scatter, rtol=1e-5, atol=1e-5)
    assert state.freedom == expected.freedom


@pytest.mark.parametrize(("came", "went"), [(0, 0), (5, 0), (0, 5), (7, 3)])
def test_the_corrected_inverse_is_that_of_the_dense_covariance(came, went):
    pool, new = groups(20), groups(came, seed=1)
    frame, shrunk = frame_of(pool)
    drift = drifted(frame, new, pool[:went])
    expected = np.linalg.inv(current_covariance(frame, shrunk, new, pool[:went]))
    directions, values = drift.correction
    corrected = frame.whitening @ (np.eye(WIDTH) - directions * (values / (1 + values)) @ directions.T)
    np.testing.assert_allclose(drift.scale * corrected @ frame.whitening.T, expected, rtol=1e-9, atol=1e-12)
    turned = Metric.of(frame, drift).turned(np.eye(WIDTH, dtype=np.float32))
    np.testing.assert_allclose([row.vector for row in turned], expected, rtol=1e-4, atol=1e-6)


def test_fits_are_half_the_negative_squared_distances_under_the_current_covariance():
    pool, new = groups(20), groups(4, seed=1)
    frame, shrunk = frame_of(pool)
    metric = Metric.of(frame, drifted(frame, new, pool[:2]))
    inverse = np.linalg.inv(current_covariance(frame, shrunk, new, pool[:2]))
    means = np.stack([group.mean(axis=0) for group in pool[2:] + new]) - frame.centre
    query = groups(1, seed=5)[0][0] - frame.centre
    gaps = query - means
    expected = -0.5 * np.einsum("cd,de,ce->c", gaps, inverse, gaps) / frame.temperature
    (turned,) = metric.turned(query[None])
    np.testing.assert_allclose(metric.fits(turned, Scaled.of(means), frame.squares(means)), expected, rtol=1e-4)


def test_a_change_of_low_rank_is_corrected_whole_and_a_larger_one_up_to_its_remainder():
    width = RANK + 20
    pool = groups(200, width=width)
    frame, _ = frame_of(pool, width)
    few = drifted(frame, groups(4, seed=1, width=width), [])
    assert few.remainder < 1e-8
    many = drifted(frame, groups(40, seed=1, width=width), [])
    directions, values = many.correction
    change = many.times(np.eye(width))
    rest = np.linalg.norm(change - directions * values @ directions.T, 2)
    assert 0 < rest
    assert many.remainder == pytest.approx(rest, rel=0.2)
    largest = np.sort(np.abs(np.linalg.eigvalsh(change)))[::-1]
    assert rest < 1.5 * largest[RANK]


@pytest.mark.parametrize("thin", [0, 10, 1000])
def test_changes_that_are_summed_up_and_those_that_are_kept_one_by_one_are_the_same(monkeypatch, thin):
    monkeypatch.setattr(drifting, "_THIN", thin)
    pool, new = groups(20), groups(7, seed=1)
    frame, shrunk = frame_of(pool)
    drift = drifted(frame, new, pool[:3])
    expected = frame.whitening.T @ (current_covariance(frame, shrunk, new, pool[:3]) * drift.scale) @ frame.whitening
    np.testing.assert_allclose(np.eye(WIDTH) + drift.times(np.eye(WIDTH)), expected, atol=1e-9)
    np.testing.assert_allclose(drift.times(np.ones(WIDTH)), (expected - np.eye(WIDTH)).sum(axis=1), atol=1e-9)


@pytest.mark.parametrize("thin", [20, 1000])
def test_a_correction_errs_by_no_more_than_it_says(monkeypatch, thin):
    monkeypatch.setattr(drifting, "_THIN", thin)
    width = RANK + 20
    frame, _ = frame_of(groups(200, width=width), width)
    drift = drifted(frame, groups(40, seed=1, width=width), [])
    directions, values = drift.correction
    rest = np.linalg.norm(drift.times(np.eye(width)) - directions * values @ directions.T, 2)
    assert drift.errs(0.7 * rest)
    assert not drift.errs(1.3 * rest)


def test_no_change_is_no_correction():
    drift = Drift.none(WIDTH, 10, 0.5)
    assert drift.correction[0].shape == (WIDTH, 0)
    assert (drift.remainder, drift.scale) == (0.0, 1.0)


def test_reduced_vectors_keep_distances_and_fill_up_to_a_multiple_of_four():
    pool = groups(20)
    frame, _ = frame_of(pool)
    whole = Frame(frame.centre, frame.whitening, frame.whitening.astype(np.float32), frame.freedom, SHRINKAGE, 1.0)
    means = np.stack([group.mean(axis=0) for group in pool]) - frame.centre
    query = groups(1, seed=3)[0][:1] - frame.centre
    for chosen in (whole, Frame(frame.centre, frame.whitening, whole.directions[:, :3], 10, SHRINKAGE, 1.0)):
        stored = chosen.reduced(means, frame.squares(means))
        assert stored.shape[1] % 4 == 0
        np.testing.assert_allclose((stored**2).sum(axis=1), frame.squares(means), rtol=1e-3)
    gaps = ((whole.reduced(means, frame.squares(means)) - whole.queries(query)) ** 2).sum(axis=1)
    np.testing.assert_allclose(gaps, (((query - means) @ frame.whitening) ** 2).sum(axis=1), rtol=1e-3)
