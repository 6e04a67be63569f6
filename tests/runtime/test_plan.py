from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.machine import Machine
from loracompose.runtime.plan import check_form, choose_form, floor_seconds, fold_pays, stack_pays
from tests.runtime.toy import random_delta

SIZES = list(itertools.product([1, 2, 8, 64], [1, 16, 512], [2, 4, 8]))


@pytest.mark.parametrize(("rows", "seq", "itemsize"), SIZES)
def test_once_the_shared_bank_is_cheaper_wider_rows_keep_it(rows: int, seq: int, itemsize: int):
    forms = [choose_form(rows, seq, 64, used, itemsize) for used in range(1, 65)]
    assert forms == sorted(forms)  # "gathered" before "shared"
    assert forms[-1] == "shared"  # a row that uses every rank has nothing to gather


@pytest.mark.parametrize(("rows", "seq", "itemsize"), SIZES)
def test_once_gathering_is_cheaper_a_larger_pool_keeps_it(rows: int, seq: int, itemsize: int):
    forms = [choose_form(rows, seq, ranks, 8, itemsize) for ranks in range(8, 2048, 8)]
    assert forms == sorted(forms, reverse=True)


def test_one_row_that_uses_part_of_the_bank_gathers_it():
    assert choose_form(1, 1, 64, 8, 4) == "gathered"
    assert choose_form(1, 1, 8, 8, 4) == "shared"


def test_rows_with_one_composition_share_it():
    assert choose_form(16, 128, 8, 8, 4) == "shared"


def test_equal_rows_make_gathering_cheaper():
    assert choose_form(16, 1, 100, 24, 4) == "shared"
    assert choose_form(16, 1, 100, 24, 4, distinct=4) == "gathered"


def test_a_machine_whose_products_per_row_are_slow_shares_the_bank():
    slow = Machine(small_bmm=4e8, large_bmm=4e8, large_stack=4e8)
    assert choose_form(16, 64, 180, 40, 4) == "gathered"
    assert choose_form(16, 64, 180, 40, 4, machine=slow) == "shared"
    for one in ("large_bmm", "large_stack"):  # the faster of the two counts
        assert choose_form(16, 64, 180, 40, 4, machine=replace(slow, **{one: 4e10})) == "gathered"


def test_rows_are_filled_up_to_one_product_where_that_is_faster_by_more_than_what_is_filled_up():
    twice = Machine(large_bmm=1e10, large_stack=2e10)
    assert stack_pays(100, 200, twice)
    assert not stack_pays(100, 201, twice)
    assert stack_pays(100, 160)  # where nothing was measured
    assert not stack_pays(100, 161)


def test_folding_pays_for_long_answers_and_not_for_one_token():
    pays = [fold_pays(steps, 16, 576, 576, 24, 4) for steps in range(1, 400)]
    assert pays == sorted(pays)
    assert not pays[0]
    assert pays[-1]


def test_the_floor_reads_each_used_rank_once_and_multiplies_what_each_row_uses():
    weights = torch.tensor([[1, 1, 0, 0, 0], [0, 1, 2, 0, 0]], dtype=torch.float64)  # 3 ranks used, 4 products
    deltas = {"a": random_delta(weights=weights), "b": random_delta(weights=torch.zeros(2, 5, dtype=torch.float64))}
    of_bytes = Machine(1e3, *[1e12] * 4, large_stack=1e12)
    assert floor_seconds(deltas, 1, machine=of_bytes) == pytest.approx(3 * 21 * 8 / 1e3)
    assert floor_seconds(deltas, 1, itemsize=2, machine=of_bytes) == pytest.approx(3 * 21 * 2 / 1e3)
    of_operations = Machine(1e12, 1.0, 1e3, 1.0, 1.0, large_stack=1.0)
    assert floor_seconds(deltas, 5, machine=of_operations) == pytest.approx(2 * 4 * 5 * 21 / 1e3)
    own = LowRankDelta(torch.ones(2, 5, 12), torch.ones(2, 9, 5), weights)
    assert floor_seconds({"a": own}, 1, itemsize=8, machine=of_bytes) == pytest.approx(4 * 21 * 8 / 1e3)


def test_an_unknown_form_is_refused_by_name():
    with pytest.raises(ValueError, match="auto, shared, gathered, folded, got 'merged'"):
        check_form("merged")
