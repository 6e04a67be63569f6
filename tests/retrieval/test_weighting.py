from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loracompose.retrieval.weighting import (
    DEFAULT_TEMPERATURE,
    FLATTEST,
    SHARPEST,
    fit_temperature,
    likeliest_temperature,
    log_softmax,
    softmax_weights,
    top1_weights,
    uniform_weights,
)

OUT = -float("inf")
SCORES = torch.tensor([[0.9, OUT, 0.8, 0.8], [OUT, OUT, OUT, OUT], [OUT, -0.5, OUT, OUT]])


def test_softmax_is_the_closed_form_over_the_retrieved():
    e = np.exp(np.array([0.9, 0.8, 0.8]) / 0.1)
    expected = torch.tensor([[e[0], 0, e[1], e[2]], [0, 0, 0, 0], [0, 1, 0, 0]]) / torch.tensor([[e.sum()], [1], [1]])
    torch.testing.assert_close(softmax_weights(SCORES, 0.1), expected.float())


def test_softmax_at_the_sharpest_temperature_stays_finite():
    weights = softmax_weights(torch.tensor([[1.0, -1.0, OUT]]), SHARPEST)
    assert torch.equal(weights, torch.tensor([[1.0, 0.0, 0.0]]))


def test_uniform_weights_are_one_over_the_number_retrieved():
    torch.testing.assert_close(
        uniform_weights(SCORES), torch.tensor([[1 / 3, 0, 1 / 3, 1 / 3], [0, 0, 0, 0], [0, 1, 0, 0]])
    )


def test_top1_takes_the_first_of_equals_and_nothing_where_nothing_was_found():
    scores = torch.tensor([[0.1, 0.8, 0.8], [OUT, OUT, OUT]])
    assert torch.equal(top1_weights(scores), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("weigh", [uniform_weights, top1_weights, lambda s: softmax_weights(s, 0.1)])
def test_no_columns_give_no_weights(weigh):
    assert weigh(torch.empty(3, 0)).shape == (3, 0)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 6))
def test_rows_sum_to_one_or_to_zero(seed, batch, width):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(batch, width, generator=generator) * 2 - 1
    scores[torch.rand(batch, width, generator=generator) < 0.5] = OUT
    for weights in (uniform_weights(scores), top1_weights(scores), softmax_weights(scores, 0.02)):
        expected = torch.isfinite(scores).any(dim=-1).float()
        torch.testing.assert_close(weights.sum(dim=-1), expected)
        assert (weights[~torch.isfinite(scores)] == 0).all()


def unit(rows):
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def pool(spread, adapters=5, examples=6, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(adapters, 1, dim))
    groups = unit(centres + spread * rng.normal(size=(adapters, examples, dim))).astype(np.float32)
    return unit(groups.mean(axis=1)), list(groups)


def likelihood(means, groups, temperature):
    """Leave-one-out negative log likelihood, written out example by example."""
    total = []
    for row, group in enumerate(groups):
        for held in range(len(group)):
            own = unit(np.delete(group, held, axis=0).mean(axis=0))
            others = means.astype(np.float64).copy()
            others[row] = own
            logits = others @ group[held] / temperature
            total.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[row])
    return np.mean(total)


@pytest.mark.parametrize("seed", range(4))
def test_the_fitted_temperature_minimises_the_leave_one_out_likelihood(seed):
    means, groups = pool(spread=0.9, seed=seed)
    fitted = fit_temperature(means, groups, range(len(groups)))
    grid = np.geomspace(SHARPEST, FLATTEST, 120)
    best = grid[np.argmin([likelihood(means, groups, temperature) for temperature in grid])]
    assert fitted == pytest.approx(best, rel=0.06)


def test_tight_adapters_get_a_sharper_temperature_than_loose_ones():
    tight, loose = (fit_temperature(*pool(spread), range(5)) for spread in (0.7, 1.5))
    assert tight < loose


def test_adapters_told_apart_perfectly_get_the_sharpest_temperature():
    groups = [np.eye(4, dtype=np.float32)[[i, i]] for i in range(4)]
    assert fit_temperature(np.eye(4, dtype=np.float32), groups, range(4)) == pytest.approx(SHARPEST, rel=1e-3)


@pytest.mark.parametrize("spread", [0.3, 30.0, 3000.0])
def test_scores_that_count_no_more_are_passed_over_without_changing_the_likelihood(spread):
    random = np.random.default_rng(0)
    scores = spread * random.standard_normal((50, 300))
    own = scores.argmax(axis=1)
    own[::3] = scores.argsort(axis=1)[::3, -2]
    found, likelihood = likeliest_temperature(scores, own)

    def of_all(temperature):
        whole = log_softmax(scores / temperature)
        return whole[np.arange(50), own].mean()

    assert likelihood == pytest.approx(of_all(found), rel=1e-12)
    assert likelihood >= max(of_all(found * 1.01), of_all(found / 1.01))


def test_adapters_alike_in_everything_get_the_flattest_temperature():
    rng = np.random.default_rng(0)
    groups = [unit(rng.normal(size=(3, 64))).astype(np.float32) for _ in range(2)]
    means = np.stack([unit(group.mean(axis=0)) for group in groups])
    assert fit_temperature(means, groups, range(2)) > 0.2


@pytest.mark.parametrize("examples", [1, 3])
def test_nothing_to_fit_gives_the_fixed_default(examples):
    rows = np.eye(3, dtype=np.float32)
    alone = [rows[:examples]]
    assert fit_temperature(rows[:1], alone, [0]) == DEFAULT_TEMPERATURE
    assert fit_temperature(rows, [rows[:1], rows[1:2], rows[2:]], range(3)) == DEFAULT_TEMPERATURE
    assert fit_temperature(rows[:0], [], []) == DEFAULT_TEMPERATURE
