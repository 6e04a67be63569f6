from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loracompose.composers.mixture import Mixture
from loracompose.composition.bank import gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.runtime import operator, rows
from loracompose.runtime.forms import GatheredForm, GroupBank, SharedForm, Workspace
from loracompose.runtime.machine import DEFAULT, Machine
from loracompose.runtime.operator import RowOperator, StaticGroup
from loracompose.runtime.rows import RowUse, RowUses
from loracompose.runtime.segments import SegmentedForm
from loracompose.runtime.sharing import OpenProduct
from loracompose.runtime.stacked import StackedForm
from tests.composers.one_module import pool
from tests.runtime.toy import Recorder, random_delta

ROW_BY_ROW, AT_ONCE = Machine(large_stack=1e-9), Machine(large_stack=1e30)  # how a long pass of gathered ranks runs
WEIGHT = st.sampled_from([0.0, 0.0, 1.0, -0.7, 0.25, 1e-30, 3.0])
WIDTHS = {"q": 9, "k": 4, "v": 4}


def rows_of(draw: st.DrawFn, rows: int, ranks: int) -> Tensor:
    """Weights of a batch in which some rows are equal."""
    kinds = draw(st.lists(st.lists(WEIGHT, min_size=ranks, max_size=ranks), min_size=1, max_size=rows))
    return torch.tensor([kinds[draw(st.integers(0, len(kinds) - 1))] for _ in range(rows)], dtype=torch.float64)


@st.composite
def groups(draw: st.DrawFn) -> dict[str, LowRankDelta]:
    """Deltas of modules that read one input, of unequal ranks and widths, some of them of nobody."""
    rows, names = draw(st.integers(1, 6)), draw(st.sampled_from([["q"], ["q", "v"], ["q", "k", "v"]]))
    deltas = {}
    for seed, name in enumerate(names):
        ranks = draw(st.integers(1, 7))
        weights = rows_of(draw, rows, ranks)
        deltas[name] = random_delta(12, WIDTHS[name], ranks=ranks, weights=weights, seed=seed)
    return deltas


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


def group(deltas: dict[str, LowRankDelta], slot: OpenProduct | None = None, **settings: Any) -> StaticGroup:
    settings.setdefault("workspace", Workspace())
    return StaticGroup(deltas, {path: d.weights for path, d in deltas.items()}, slot or OpenProduct(), **settings)


def bank(*deltas: LowRankDelta) -> GroupBank:
    return GroupBank.build(deltas, RowUse.count([delta.weights for delta in deltas]))


@settings(deadline=None, max_examples=80)
@given(groups(), st.integers(1, 3), st.sampled_from([1, 3]))
def test_the_shared_and_the_gathered_form_equal_the_dense_product(
    deltas: dict[str, LowRankDelta], times: int, seq: int
):
    x = given_input(next(iter(deltas.values())), times, seq)
    forms = (("auto", DEFAULT), ("shared", DEFAULT), ("gathered", ROW_BY_ROW), ("gathered", AT_ONCE))
    for (form, machine), writable in itertools.product(forms, ((), tuple(deltas))):
        run = group(deltas, form=form, machine=machine, writable=writable)
        for path, delta in deltas.items():
            output = torch.randn(*x.shape[:2], WIDTHS[path], dtype=torch.float64)
            given = output.clone()
            with torch.no_grad():
                got = run.add(path, output, x)
            assert torch.allclose(got, given + dense(delta, x), atol=1e-12), form
            assert torch.equal(output, got if writable else given)  # written to only where nobody else holds it
            assert torch.allclose(delta.repeat(times)(x), dense(delta, x), atol=1e-12)


def test_nothing_is_written_to_where_gradients_flow():
    deltas = {"q": random_delta(weights=torch.eye(5, dtype=torch.float64))}
    x = given_input(deltas["q"]).requires_grad_()
    output = torch.zeros(5, 3, 9, dtype=torch.float64)
    for form in ("shared", "gathered"):
        group(deltas, form=form, writable=["q"]).add("q", output, x)
        assert not output.any()


def test_gathered_compositions_hold_only_what_the_widest_uses_and_equal_rows_are_gathered_once():
    weights = torch.tensor([[0, 0, 0, 0, 3], [0, 1, 0, 2, 0], [0, 0, 0, 0, 3], [0, 0, 0, 0, 0]], dtype=torch.float64)
    form = GatheredForm(bank(random_delta(weights=weights)))
    assert form._A.shape == (3, 12, 2)
    assert form._B[0].shape == (3, 2, 9)


def test_ranks_that_no_row_uses_are_left_out():
    weights = torch.tensor([[0, 1, 0, 2, 0], [0, 0, 0, 0.5, 0]], dtype=torch.float64)
    assert SharedForm(bank(random_delta(weights=weights)))._A.shape == (2, 12)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_that_overflows_does_not_reach_rows_that_do_not_use_it(dtype: torch.dtype, gradients: bool):
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=dtype)
    made = random_delta(ranks=2, weights=weights)
    made.A[1] = torch.finfo(dtype).max
    delta = LowRankDelta(made.A.to(dtype), made.B.to(dtype), weights)
    for form, seq, machine in itertools.product(("shared", "gathered"), (1, 3), (ROW_BY_ROW, AT_ONCE)):
        x = (given_input(delta, seq=seq).abs() * 10).to(dtype).requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            got = group({"q": delta}, form=form, machine=machine).add("q", torch.zeros(2, seq, 9, dtype=dtype), x)
        assert torch.isfinite(got[0]).all(), (form, seq)
        assert not torch.isfinite(got[1]).any()
        if gradients:
            (gradient,) = torch.autograd.grad(got[0].sum(), x)
            expected = (delta.A[:1].mT @ delta.B[:, :1].sum(dim=0)).expand(seq, 12)
            torch.testing.assert_close(gradient[0], expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("seq", [1, 3])
def test_what_fills_up_a_row_with_few_ranks_leaves_no_trace_of_the_rank_that_it_repeats(weight: float, seq: int):
    weights = weight * torch.tensor([[1.0, 1.0, 0], [0, 0, 1.0]], dtype=torch.float64)
    delta = random_delta(ranks=3, weights=weights)
    x = given_input(delta, seq=seq).abs() * 10
    want = dense(delta, x)[1]
    delta.A[0] = torch.finfo(torch.float64).max  # of the first row alone
    with torch.no_grad():
        run = group({"q": delta}, form="gathered", machine=AT_ONCE)
        got = run.add("q", torch.zeros(2, seq, 9, dtype=torch.float64), x)
    assert torch.allclose(got[1], want, atol=1e-12)
    assert not torch.isfinite(got[0]).any()


@pytest.mark.parametrize(
    ("machine", "name", "form"),
    [
        pytest.param(lambda: ROW_BY_ROW, "SegmentedForm", SegmentedForm, id="row by row"),
        pytest.param(lambda: AT_ONCE, "StackedForm", StackedForm, id="at once"),
    ],
)
def test_a_form_of_decoding_steps_is_built_once_and_kept_and_one_of_long_passes_is_not(machine, name, form):
    delta = random_delta(weights=torch.eye(5, dtype=torch.float64).repeat(4, 1))
    run = group({"q": delta}, form="gathered", machine=machine())
    output = torch.zeros(20, 1, 9, dtype=torch.float64)
    with (
        torch.no_grad(),
        mock.patch.object(operator, "GatheredForm", wraps=GatheredForm) as kept,
        mock.patch.object(operator, name, wraps=form) as dropped,
    ):
        for seq in (4, 4, 1, 1, 1):
            run.add("q", output.expand(20, seq, 9), given_input(delta, seq=seq))
        run.add("q", output.repeat(2, 1, 1), given_input(delta, times=2, seq=1))
    assert (kept.call_count, dropped.call_count) == (1, 2)


def test_a_stack_holds_one_bank_a_composition_where_its_rows_stand_together_and_one_a_row_elsewhere():
    weights = torch.tensor([[0, 0, 0, 0, 3], [0, 1, 0, 2, 0]], dtype=torch.float64)
    together = StackedForm(bank(random_delta(weights=weights.repeat_interleave(2, dim=0))), Workspace())
    apart = StackedForm(bank(random_delta(weights=weights.repeat(2, 1))), Workspace())
    assert (together._A.shape, together._B[0].shape) == ((2, 12, 2), (2, 2, 9))
    assert (apart._A.shape, apart._B[0].shape) == ((4, 12, 2), (4, 2, 9))


def test_groups_of_one_request_are_counted_once_only_where_their_weights_are_equal():
    uses, weights = RowUses(), torch.tensor([[1.0, 0, 2.0], [0, 1.0, 0]], dtype=torch.float64)
    first = uses.count([weights, weights])
    assert uses.count([weights.clone(), weights.clone()]) is first
    others = ([weights, 2 * weights], [weights.flip(0), weights], [weights.float(), weights.float()], [weights])
    widths = [torch.cat([weights, weights[:, :1]], dim=1), weights[:, 1:]]  # side by side the same numbers
    for other in (*others, widths):
        counted, want = uses.count(other), RowUse.count(other)
        assert counted is not first
        assert all(torch.equal(a, b) for a, b in zip(counted.weights, want.weights, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(counted.used, want.used, strict=True))


def test_the_very_same_weights_are_not_looked_at_again_and_new_ones_in_their_place_are():
    uses, weights = RowUses(), torch.eye(3, dtype=torch.float64)
    with mock.patch.object(rows, "_beside", wraps=rows._beside) as looked:
        first = uses.count([weights])
        before = looked.call_count
        assert uses.count([weights]) is first
        assert looked.call_count == before
    for i in range(50):  # a tensor that is freed leaves its place, and so its id, to the next
        assert uses.count([torch.full((1, 1), float(i), dtype=torch.float64)]).weights[0].sum() == i


def test_a_bank_of_all_ranks_of_one_module_copies_nothing():
    banks = gather_banks(pool(4, 2))
    delta = Mixture().compose(banks, torch.ones(1, 2).double())["m"]
    made = bank(delta)
    assert made.A.data_ptr() == delta.A.data_ptr()
    assert made.B[0].data_ptr() == delta.B.data_ptr()


@pytest.mark.parametrize("weight", [1.0, 0.5])
def test_compositions_that_stand_in_the_bank_one_after_another_are_run_from_there(weight: float):
    weights = weight * torch.eye(3, dtype=torch.float64).repeat_interleave(2, dim=1)
    made = bank(random_delta(ranks=6, weights=weights))
    gathered, stacked = GatheredForm(made), StackedForm(made, Workspace())
    for form in (gathered, stacked):
        assert form._A.data_ptr() == made.A.data_ptr()
    assert stacked._B[0].data_ptr() == made.B[0].data_ptr()
    assert (gathered._B[0].data_ptr() == made.B[0].data_ptr()) == (weight == 1)
    x = given_input(random_delta(ranks=6, weights=weights), seq=4)
    want = dense(random_delta(ranks=6, weights=weights), x)
    for form in (gathered, stacked):
        output = torch.zeros_like(want)
        assert torch.allclose(form.add(0, form.shrink(x), output, own=True), want, atol=1e-12)
    assert torch.equal(made.B[0], random_delta(ranks=6, weights=weights).B.mT)


def test_ranks_that_stand_side_by_side_are_not_copied():
    weights = torch.tensor([[1.0, 1.0, 0, 0], [0, 0, 1.0, 1.0], [1.0, 0, 1.0, 0]], dtype=torch.float64)
    made = bank(random_delta(ranks=4, weights=weights))
    form = SegmentedForm(made, Workspace())
    shared = [B.untyped_storage().data_ptr() == made.B[0].untyped_storage().data_ptr() for B in form._B[0]]
    assert shared == [True, True, False]


def test_the_kernels_do_not_run_under_autocast_which_does_not_reach_them():
    class Kernels(GatheredForm):
        pass

    delta = random_delta(12, 9, ranks=6, weights=torch.eye(2, dtype=torch.float64).repeat_interleave(3, dim=1))
    group = StaticGroup({"q": delta}, {"q": delta.weights}, OpenProduct(), form="gathered")
    there = mock.patch.multiple(operator, kernels_run=lambda *_: True, GroupedForm=Kernels)
    with there, torch.no_grad():
        assert isinstance(group._form(2, 1), Kernels)
        with torch.autocast("cpu", torch.bfloat16):
            assert not isinstance(group._form(2, 1), Kernels)
        assert isinstance(group._form(2, 1), Kernels)


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize("gradients", [False, True])
def test_groups_that_take_turns_do_not_disturb_each_other(gradients: bool, at_once: bool):
    """They gather into the same memory; gradients need what was there."""
    weights = torch.eye(5, dtype=torch.float64)[:3]
    deltas = {path: random_delta(12, WIDTHS[path], weights=weights, seed=i) for i, path in enumerate(WIDTHS)}
    slot, settings = OpenProduct(), {"form": "gathered", "workspace": Workspace()}
    settings["machine"] = AT_ONCE if at_once else ROW_BY_ROW
    first = group({"q": deltas["q"], "v": deltas["v"]}, slot, **settings)
    second = group({"k": deltas["k"]}, slot, **settings)
    x = given_input(deltas["q"]).requires_grad_(gradients)
    with torch.set_grad_enabled(gradients):
        for path, run in (("q", first), ("k", second), ("v", first), ("k", second)):
            got = run.add(path, torch.zeros(3, 3, WIDTHS[path], dtype=torch.float64), x)
            assert torch.allclose(got, dense(deltas[path], x), atol=1e-12)
            if gradients:
                (was,) = torch.autograd.grad(got.sum(), x, retain_graph=True)
                (want,) = torch.autograd.grad(dense(deltas[path], x).sum(), x)
                assert torch.allclose(was, want, atol=1e-12)


def test_an_embedding_is_looked_up_in_the_bank_of_all_rows():
    delta = random_delta(weights=torch.eye(5, dtype=torch.float64), kind="embedding")
    x = given_input(delta, times=2)
    assert torch.allclose(RowOperator(delta)(x, GateContext("m")), dense(delta, x), atol=1e-12)


def test_a_gate_sees_the_rows_of_every_beam():
    gate = Recorder()
    base = random_delta(weights=torch.rand(2, 5, dtype=torch.float64))
    delta = LowRankDelta(base.A, base.B, base.weights, gate)
    x = given_input(delta, times=3)
    assert torch.allclose(RowOperator(delta)(x, GateContext("m")), dense(base, x), atol=1e-12)
    assert len(gate.seen) == 1


def test_rows_must_be_a_multiple_of_the_compositions():
    delta, x = random_delta(weights=torch.ones(2, 5, dtype=torch.float64)), torch.zeros(3, 1, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="m: 3 rows of input for 2 compositions"):
        RowOperator(delta)(x, GateContext("m"))
    with pytest.raises(ValueError, match="m: 3 rows of input for 2 compositions"):
        group({"m": delta}).add("m", x, x)
