"""Batches: every prompt once, like lengths together, bounds kept, and nothing left to chance."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from loracompose.batching import BATCH, Budget, budget_of, plan_batches, set_of
from loracompose.membership import Member, rounded

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(LENGTHS, st.one_of(st.none(), st.integers(1, 8)), st.one_of(st.none(), st.integers(1, 200)), st.integers(1, 3))
def test_every_prompt_runs_once_within_the_bounds(lengths, prompts, tokens, copies):
    budget = Budget(prompts, tokens, answer=5, copies=copies)
    batches = plan_batches(lengths, [0] * len(lengths), budget)
    assert sorted(place for batch in batches for place in batch) == list(range(len(lengths)))
    for batch in batches:
        assert batch == sorted(batch)
        if len(batch) > 1:
            assert prompts is None or len(batch) <= prompts
            assert tokens is None or len(batch) * copies * (max(lengths[i] for i in batch) + 5) <= tokens


@given(LENGTHS, st.integers(1, 8))
def test_prompts_of_like_length_run_together_the_longest_first(lengths, size):
    batches = plan_batches(lengths, [0] * len(lengths), Budget(size, None))
    for batch, following in pairwise(batches):
        assert min(lengths[i] for i in batch) >= max(lengths[i] for i in following)


def test_equal_sets_stand_together_only_where_it_costs_no_padding():
    sets = ["a", "b", "a", "b", "a", "b"]
    assert plan_batches([7] * 6, sets, Budget(3, None)) == [[0, 2, 4], [1, 3, 5]]
    assert plan_batches([9, 9, 8, 8, 7, 7], sets, Budget(2, None)) == [[0, 1], [2, 3], [4, 5]]


def test_a_budget_of_tokens_counts_padding_answers_and_beams():
    assert plan_batches([10, 2, 2], [0] * 3, Budget(None, 30, answer=5)) == [[0, 1], [2]]
    assert plan_batches([10, 2, 2], [0] * 3, Budget(None, 30, answer=5, copies=2)) == [[0], [1, 2]]
    assert plan_batches([50, 2, 2], [0] * 3, Budget(None, 30, answer=5)) == [[0], [1, 2]]


def test_a_call_that_says_nothing_runs_32_prompts_together():
    assert budget_of(None, None, 64, {}) == Budget(BATCH, None, 64, 1)
    assert budget_of(None, 900, 64, {"num_beams": 4}) == Budget(None, 900, 64, 4)
    assert budget_of(None, 900, 64, {}, GenerationConfig(num_beams=4)) == Budget(None, 900, 64, 4)  # the model's own
    silent = {"generation_config": GenerationConfig()}
    assert budget_of(None, 900, 64, silent, GenerationConfig(num_beams=4)) == Budget(None, 900, 64, 4)  # still its own
    assert budget_of(None, 900, 64, {"num_beams": 1}, GenerationConfig(num_beams=4)) == Budget(None, 900, 64, 1)
    assert budget_of(8, 900, 64, {"num_return_sequences": 3}) == Budget(8, 900, 64, 3)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("batch_size must be at least 1, got 0", (0, None, 1, {})),
        ("batch_tokens must be at least 1, got 0", (None, 0, 1, {})),
        ("it needs max_new_tokens", (None, 9, None, {})),
    ],
)
def test_a_budget_that_means_nothing_is_refused(message, arguments):
    with pytest.raises(ValueError, match=message):
        budget_of(*arguments)


def row(*weights: float, scored: bool = True):
    return tuple(Member(f"a{i}", weight, -1.0 if scored else None) for i, weight in enumerate(weights))


def weights_of(members):
    return [member.weight for member in members]


def test_retrieved_weights_are_rounded_to_a_grid_and_sum_to_1_again():
    near, also = rounded([row(0.7004, 0.2996, 0.0), row(0.7001, 0.2993, 0.0006)])
    assert near == also
    assert set_of(near) == set_of(also)
    assert sum(weights_of(near)) == pytest.approx(1, abs=1e-12)
    assert max(abs(got - want) for got, want in zip(weights_of(near), (0.7004, 0.2996, 0.0), strict=True)) < 1 / 256
    assert weights_of(rounded([row(1 / 3, 1 / 3, 1 / 3)])[0]) == [1 / 3] * 3
    assert weights_of(rounded([row(0.999, 0.0007, 0.0003)])[0]) == [1.0, 0.0, 0.0]


def test_weights_given_by_hand_rows_of_nobody_and_crowds_are_not_rounded():
    for members in (row(0.12345, -7.7, scored=False), row(0.0, 0.0), row(*[1 / 100] * 100), ()):
        assert rounded([members]) == [members]
