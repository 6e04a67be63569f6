"""The choice of ranks: the tail of all importance together, and pairs of weak and strong within a module."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loracompose.training.beam_ranks import importance, pair_ranks, tail_counts

SCORES = st.lists(st.lists(st.floats(-0.5, 0.5), min_size=2, max_size=8), min_size=1, max_size=5)


def naive_importance(scores, temperature):
    exponentials = [math.exp(score / temperature) for score in scores]
    return [len(scores) * value / sum(exponentials) for value in exponentials]


def naive_tail(importances, threshold):
    """The (module, rank) pairs left over when the largest are taken until their sum would exceed the threshold."""
    left = [(value, module, rank) for module, values in importances.items() for rank, value in enumerate(values)]
    total, taken = sum(value for value, _, _ in left), 0.0
    while left:
        best = max(left, key=lambda entry: entry[0])  # the first of equals
        if taken + best[0] > threshold * total:
            break
        taken += best[0]
        left.remove(best)
    return {(module, rank) for _, module, rank in left}


@given(SCORES, st.floats(0.01, 2.0))
@settings(derandomize=True, deadline=None)
def test_importance_is_the_softmax_of_scores_with_mean_1(scores, temperature):
    for row in scores:
        got = importance(torch.tensor(row, dtype=torch.float64), temperature)
        assert got.tolist() == pytest.approx(naive_importance(row, temperature), rel=1e-12)
        assert got.mean().item() == pytest.approx(1)


@pytest.mark.parametrize("rank", [2, 4, 8, 16, 64])
def test_scores_of_0_weigh_every_rank_exactly_1(rank):
    assert torch.equal(importance(torch.zeros(rank), 0.05), torch.ones(rank))


@given(SCORES, st.floats(0.5, 1.0, exclude_max=True))
@settings(derandomize=True, deadline=None)
def test_the_tail_is_what_a_loop_leaves_over(scores, threshold):
    values = {str(i): importance(torch.tensor(row, dtype=torch.float64), 0.1) for i, row in enumerate(scores)}
    joined = sorted((v for row in values.values() for v in row.tolist()), reverse=True)
    cumulative = torch.tensor(joined, dtype=torch.float64).cumsum(0)
    if (cumulative - threshold * cumulative[-1]).abs().min() < 1e-9:
        return  # the two sums may round to different sides
    want = naive_tail({module: row.tolist() for module, row in values.items()}, threshold)
    counts = tail_counts(values, threshold)
    assert counts == {module: sum(name == module for name, _ in want) for module in values}


@given(SCORES, st.floats(0.5, 1.0, exclude_max=True))
@settings(derandomize=True, deadline=None)
def test_what_is_kept_weighs_no_less_than_what_is_pruned_and_at_most_the_threshold(scores, threshold):
    values = {str(i): importance(torch.tensor(row, dtype=torch.float64), 0.1) for i, row in enumerate(scores)}
    counts = tail_counts(values, threshold)
    kept, pruned = [], []
    for module, row in values.items():
        ordered = row.sort(descending=True).values.tolist()
        kept += ordered[: len(row) - counts[module]]
        pruned += ordered[len(row) - counts[module] :]
    assert sum(kept) <= threshold * sum(kept + pruned) * (1 + 1e-12)
    assert sum(kept) + max(pruned) > threshold * sum(kept + pruned) * (1 - 1e-12)
    assert min(kept, default=math.inf) >= max(pruned)


def test_the_count_differs_between_modules_because_all_ranks_compete():
    flat, steep = torch.ones(4), torch.tensor([3.9, 0.04, 0.03, 0.03])
    assert tail_counts({"flat": flat, "steep": steep}, 0.99) == {"flat": 0, "steep": 3}


@pytest.mark.parametrize("seed", range(10))
def test_a_threshold_of_1_prunes_nothing_even_where_sums_round(seed):
    values = torch.rand(1000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    assert tail_counts({"a": values[:7], "b": values[7:]}, 1.0) == {"a": 0, "b": 0}


@given(st.lists(st.floats(0.01, 5), min_size=2, max_size=12), st.data())
@settings(derandomize=True, deadline=None)
def test_the_weakest_are_paired_with_the_strongest_each_once(values, data):
    count = data.draw(st.integers(0, len(values) // 2))
    pruned, sources = pair_ranks(torch.tensor(values), count, torch.Generator().manual_seed(0))
    assert len(set(pruned.tolist())) == len(set(sources.tolist())) == count
    assert not set(pruned.tolist()) & set(sources.tolist())
    assert pruned.tolist() == sorted(pruned.tolist())
    rest = [value for rank, value in enumerate(values) if rank not in {*pruned.tolist(), *sources.tolist()}]
    for rank in pruned.tolist():
        assert values[rank] <= min(rest, default=math.inf)
    for rank in sources.tolist():
        assert values[rank] >= max(rest, default=-math.inf)


def test_the_pairing_is_random_and_decided_by_the_generator():
    values = torch.arange(12.0)
    pairings = [pair_ranks(values, 6, torch.Generator().manual_seed(seed))[1].tolist() for seed in (0, 0, 1)]
    assert pairings[0] == pairings[1] != pairings[2]


def test_more_than_half_of_the_ranks_cannot_be_regrown():
    with pytest.raises(ValueError, match="3 of 5 ranks"):
        pair_ranks(torch.arange(5.0), 3, torch.Generator())
