from __future__ import annotations

import pytest
import torch

from loracompose.composition.sparsity import (
    drop_out,
    elect_and_average,
    mask_stream,
)


def test_a_mask_belongs_to_adapter_module_and_seed():
    draw = lambda *key: torch.rand(8, generator=mask_stream(*key))  # noqa: E731
    assert torch.equal(draw("f", "q", 0), draw("f", "q", 0))
    others = [draw("g", "q", 0), draw("f", "v", 0), draw("f", "q", 1)]
    assert not any(torch.equal(draw("f", "q", 0), other) for other in others)


def test_a_mask_does_not_depend_on_how_the_rows_are_cut():
    ones = torch.ones(1, 37, 53, dtype=torch.float64)
    whole = drop_out(ones, 0.5, [mask_stream("f", "q", 0)])
    for height in (1, 5, 16):
        stream = mask_stream("f", "q", 0)
        parts = [drop_out(rows, 0.5, [stream]) for rows in ones.split(height, dim=1)]
        assert torch.equal(torch.cat(parts, dim=1), whole)


def test_dropping_leaves_the_expectation_and_the_share():
    kept = drop_out(torch.ones(1, 400, 500), 0.9, [mask_stream("f", "q", 0)])
    assert kept.unique().tolist() == pytest.approx([0.0, 10.0])
    assert kept.mean().item() == pytest.approx(1.0, abs=0.03)


def test_drawing_masks_leaves_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    drop_out(torch.ones(1, 4, 5), 0.5, [mask_stream("f", "q", 0)])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_election_averages_those_that_agree_with_the_weighted_sum():
    updates = [torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([-4.0, 3.0, -4.0, 0.0])]
    # votes at weights .7 and .3: -0.5, 1.6, -0.5, 0; alone in agreement an entry has its full size
    got = elect_and_average(updates, [0.7, 0.3], 1.0)
    assert torch.allclose(got, torch.tensor([-4.0, 1.6, -4.0, 0.0]))


def test_a_negative_weight_turns_its_adapter_round():
    updates = [torch.tensor([1.0, 2.0], dtype=torch.float64), torch.tensor([-3.0, 1.0], dtype=torch.float64)]
    turned = elect_and_average([updates[0], -updates[1]], [0.5, 0.5], 1.0)
    assert torch.equal(elect_and_average(updates, [0.5, -0.5], 1.0), turned)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_votes_that_cancel_elect_nobody(order):
    updates = [torch.tensor([v], dtype=torch.float64) for v in (0.1, 0.2, -0.3)]  # whose sum is not 0 in floats
    got = elect_and_average([updates[i] for i in order], [1.0, 1.0, 1.0], 3.0)
    assert got.item() == 0.0
