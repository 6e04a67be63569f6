from __future__ import annotations

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.runtime import operator
from loracompose.runtime.operator import RowOperator, gather_rows
from loracompose.runtime.plan import choose_form
from tests.runtime.toy import Recorder, random_delta

WEIGHT = st.sampled_from([0.0, 0.0, 1.0, -0.7, 0.25, 1e-30, 3.0])


@st.composite
def deltas(draw: st.DrawFn) -> LowRankDelta:
    ranks, rows = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    weights = draw(st.lists(st.lists(WEIGHT, min_size=ranks, max_size=ranks), min_size=rows, max_size=rows))
    kind = draw(st.sampled_from(["linear", "embedding"]))
    return random_delta(ranks=ranks, weights=torch.tensor(weights, dtype=torch.float64), kind=kind)


def given_input(delta: LowRankDelta, times: int = 1, seq: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = delta.batch * times
    if delta.kind == "embedding":
        return torch.randint(0, 12, (rows, seq), generator=generator)
    return torch.randn(rows, seq, 12, generator=generator, dtype=torch.float64)


def dense(delta: LowRankDelta, x: Tensor) -> Tensor:
    """Row after row, from dense updates."""
    hot = torch.nn.functional.one_hot(x, 12).double() if delta.kind == "embedding" else x
    times = x.shape[0] // delta.batch
    updates = [(delta.B * w) @ delta.A for w in delta.weights]
    return torch.stack([row @ updates[i // times].mT for i, row in enumerate(hot)])


@settings(deadline=None, max_examples=60)
@given(deltas(), st.integers(1, 3))
def test_the_shared_and_the_gathered_form_equal_the_dense_product(delta: LowRankDelta, times: int):
    x = given_input(delta, times)
    want = dense(delta, x)
    for form in (delta, gather_rows(delta)):
        assert torch.allclose(form.repeat(times)(x), want, atol=1e-12)
    for forced in ("shared", "gathered"):
        with mock.patch.object(operator, "choose_form", return_value=forced):
            assert torch.allclose(RowOperator(delta)(x, GateContext("m")), want, atol=1e-12)


def test_gathered_rows_hold_only_what_the_widest_row_uses():
    weights = torch.tensor([[0, 1, 0, 2, 0], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]], dtype=torch.float64)
    gathered = gather_rows(random_delta(weights=weights))
    assert gathered.A.shape == (3, 2, 12)
    assert gathered.B.shape == (3, 9, 2)


def test_a_form_is_built_once_and_kept():
    delta = random_delta(weights=torch.eye(5, dtype=torch.float64).repeat(4, 1))
    run = RowOperator(delta)
    always = mock.patch.object(operator, "choose_form", return_value="gathered")
    with always, mock.patch.object(operator, "gather_rows", wraps=gather_rows) as gather:
        for _ in range(3):
            run(given_input(delta, seq=1), GateContext("m"))
            run(given_input(delta, times=2, seq=1), GateContext("m"))
    assert gather.call_count == 2  # one for each number of rows, not one for each step


def test_an_embedding_is_never_gathered_row_by_row():
    delta = random_delta(weights=torch.eye(5, dtype=torch.float64), kind="embedding")
    with mock.patch.object(operator, "gather_rows", side_effect=AssertionError):
        RowOperator(delta)(given_input(delta), GateContext("m"))


def test_a_gate_sees_the_rows_of_every_beam():
    gate = Recorder()
    base = random_delta(weights=torch.rand(2, 5, dtype=torch.float64))
    delta = LowRankDelta(base.A, base.B, base.weights, gate)
    x = given_input(delta, times=3)
    assert torch.allclose(RowOperator(delta)(x, GateContext("m")), dense(base, x), atol=1e-12)
    assert len(gate.seen) == 1


def test_rows_must_be_a_multiple_of_the_compositions():
    delta = random_delta(weights=torch.ones(2, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match="m: 3 rows of input for 2 compositions"):
        RowOperator(delta)(torch.zeros(3, 1, 12, dtype=torch.float64), GateContext("m"))


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
