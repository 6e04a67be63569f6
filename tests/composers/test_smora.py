"""SMoRA in both forms against its equations, one token and one rank after another."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers.base import Pool
from loracompose.composers.rank_gating import RankGating
from loracompose.composers.smora import Smora
from loracompose.composers.smora_gates import LOAD
from loracompose.composition.bank import gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.composition.router import Router
from loracompose.runtime import operator
from loracompose.runtime.attach import attach
from loracompose.runtime.first_pass import CACHE
from loracompose.runtime.operator import RowOperator
from loracompose.runtime.plan import active_pays
from tests import laws
from tests.composers.one_module import factors, pool, tokens


def initial(adapters: list[Adapter], **settings: Any) -> Router:
    return Smora.initial(Pool("base", 12, tuple(a.name for a in adapters), gather_banks(adapters)), 0, settings)


def trained(adapters: list[Adapter], **settings: Any) -> Router:
    """A router of random tensors in float64."""
    generator, start = torch.Generator().manual_seed(3), initial(adapters, **settings)
    drawn = {n: 0.3 * torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in start.tensors.items()}
    return replace(start, tensors=drawn)


def composed(composer: Smora, adapters: list[Adapter], weights: list[list[float]]) -> LowRankDelta:
    return composer.compose(gather_banks(adapters), torch.tensor(weights, dtype=torch.float64))["m"]


def live(router: Router) -> tuple[Router, dict[str, Tensor]]:
    tensors = {n: t.clone().requires_grad_() for n, t in router.tensors.items()}
    return replace(router, tensors=tensors), tensors


# ---------------------------------------------------------------- the paper's form


def adapter_by_hand(
    x: Tensor, own: LoraFactors, W_g: Tensor, c: Tensor, *, k: int, b: int, bias_in_gate: bool, normalised: bool
) -> Tensor:
    """What the authors' code computes, rank by rank: x (seq, d_in), y = (alpha/k) B (g ∘ A x) with the sum of g k.

    `own` has alpha/r folded into B, which is divided out.
    """
    r, out = own.rank, []
    for token in x:
        z = [1 / (1 + torch.exp(-(W_g[i // b] @ token))) for i in range(r)]
        t = [z[i] + c[i // b] for i in range(r)]
        best = sorted(range(r), key=lambda i: (-t[i].item(), i))[:k]
        value = {i: (torch.clamp(t[i], min=0.0) if bias_in_gate else z[i]) for i in best}
        total = sum(value.values())
        gate = {i: k * v / total if normalised else v for i, v in value.items()}
        alpha_over_k = r / k  # in units of alpha/r, which B has already
        out.append(alpha_over_k * sum(gate[i] * (own.A[i] @ token) * own.B[:, i] for i in best))
    return torch.stack(out)


VARIANTS = [
    {"active": 4, "block": 1},
    {"active": 4, "block": 2},
    {"active": 1, "block": 1, "normalised": False},
    {"active": 4, "block": 4, "normalised": False},
    {"active": 3, "block": 1, "bias_in_gate": True},
    {"active": 12, "block": 12},
]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_adapter_form_is_the_authors_forward_pass_and_has_its_gradients(settings: dict[str, Any]):
    adapters, x = pool(12), 0.5 * tokens(2)
    router, tensors = live(trained(adapters, form="adapter", **settings))
    plain = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    options = {"bias_in_gate": False, "normalised": True} | {
        key: value for key, value in settings.items() if key in ("bias_in_gate", "normalised")
    }
    numbers = {"k": settings["active"], "b": settings["block"]}
    got = composed(Smora(router), adapters, [[1.0], [-0.5]])(x)
    own = adapters[0].factors["m"]
    rows = [adapter_by_hand(row, own, plain["m.router"], plain["m.bias"], **numbers, **options) for row in x]
    want = torch.stack([rows[0], -0.5 * rows[1]])
    assert torch.allclose(got, want, atol=1e-12)
    for y in (got, want):
        (y**2).sum().backward()
    assert torch.allclose(tensors["m.router"].grad, plain["m.router"].grad, atol=1e-11)
    constant = settings["active"] == 12  # one block of all ranks: a plain LoRA
    assert constant == (tensors["m.router"].grad.abs().max().item() < 1e-9)
    if not options["bias_in_gate"]:
        assert tensors["m.bias"].grad is None


def test_with_every_rank_active_and_no_preference_it_is_the_stored_adapter():
    adapters, x = pool(6), tokens(1)
    start = initial(adapters, form="adapter", active=6)
    even = replace(start, tensors={n: torch.zeros_like(t).double() for n, t in start.tensors.items()})
    own = adapters[0].factors["m"]
    got = composed(Smora(even), adapters, [[1.0]])(x)
    assert torch.allclose(got, x @ (own.B @ own.A).mT, atol=1e-12)


def test_gates_sum_to_the_rank_so_that_their_mean_under_balanced_load_is_one():
    adapters, x = pool(12), tokens(4)
    for active in (1, 3, 12):
        delta = composed(Smora(trained(adapters, form="adapter", active=4), active), adapters, [[1.0]] * 4)
        gates = gate(delta, x)
        assert torch.allclose(gates.sum(-1), torch.full((4, 5), 12.0, dtype=torch.float64), atol=1e-12)
        assert ((gates != 0).sum(-1) == active).all()


def gate(delta: LowRankDelta, x: Tensor, context: GateContext | None = None) -> Tensor:
    return delta.gate(x, delta.shrink(x), delta.weights, context or GateContext("m"))


def test_a_bias_that_outweighs_every_gate_gives_finite_gates():
    adapters, x = pool(6), tokens(1)
    start = trained(adapters, form="adapter", active=2, bias_in_gate=True)
    drowned = replace(start, tensors={**start.tensors, "m.bias": torch.full((6,), -5.0).double()})
    got = composed(Smora(drowned), adapters, [[1.0]])(x)
    assert not got.any()


def test_the_bias_moves_the_choice_and_not_the_value():
    adapters, x = pool(6), tokens(1)
    start = trained(adapters, form="adapter", active=6)
    pushed = replace(start, tensors={**start.tensors, "m.bias": torch.arange(6.0).double()})
    without, with_bias = (gate(composed(Smora(r), adapters, [[1.0]]), x) for r in (start, pushed))
    assert torch.allclose(without, with_bias, atol=1e-12)
    chosen = gate(composed(Smora(pushed, active=1), adapters, [[1.0]]), x)
    assert torch.allclose(chosen[..., 5], torch.full((1, 5), 6.0).double())


def test_the_load_counts_real_tokens_of_rows_that_use_the_adapter():
    adapters, x = pool(6), tokens(3)
    delta = composed(Smora(trained(adapters, form="adapter", active=2)), adapters, [[1.0], [0.0], [1.0]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    context = GateContext("m", attention_mask=mask)
    gates = gate(delta, x, context)
    want = (gates[0] != 0).sum(0) + (gates[2, :2] != 0).sum(0)
    assert torch.equal(context.scratch[LOAD + "m"], want)
    assert want.sum() == 2 * 7
    with torch.no_grad():
        gate(delta, x, still := GateContext("m"))
    assert still.scratch == {}  # nothing is counted where nothing trains


def test_a_balancing_step_lifts_blocks_below_the_mean_load_and_lowers_those_above():
    adapters = pool(6)
    start = initial(adapters, form="adapter", active=2, balance=0.25)
    composer = Smora(start)
    assert composer.untrained == {"m.bias"}
    new = composer.after_step({LOAD + "m": torch.tensor([9, 3, 4, 4, 4, 0]), "other": torch.zeros(2)})
    assert torch.equal(new["m.bias"], torch.tensor([-0.25, 0.25, 0.0, 0.0, 0.0, 0.25]))
    assert composer.after_step({}) == {}
    assert not start.tensors["m.bias"].any()  # what it was given is left alone


def test_balancing_evens_out_the_load_of_a_router_that_prefers_one_rank():
    adapters, x = pool(6), tokens(8)
    start = trained(adapters, form="adapter", active=2, balance=0.02)
    router = replace(start, tensors={**start.tensors, "m.bias": torch.tensor([0.6, 0, 0, 0, 0, 0]).double()})
    spread = []
    for _ in range(60):
        context = GateContext("m")
        gate(composed(Smora(router), adapters, [[1.0]] * 8), x, context)
        load = context.scratch[LOAD + "m"].double()
        spread.append((load.max() / load.mean()).item())
        router = replace(router, tensors={**router.tensors, **Smora(router).after_step(context.scratch)})
    assert spread[0] > 2.5
    assert max(spread[-5:]) < 1.5


def test_the_adapter_form_refuses_every_other_adapter_by_name_but_not_one_that_no_row_uses():
    own, other = pool(6, 3)
    router, x = trained([own], form="adapter", active=2), tokens(1)
    with pytest.raises(LookupError, match="not trained for the adapter of fingerprint"):
        composed(Smora(router), [own, other], [[0.5, 0.5]])
    beside = composed(Smora(router), [other, own], [[0.0, 1.0]])(x)
    assert torch.allclose(beside, composed(Smora(router), [own], [[1.0]])(x), atol=1e-12)
    twice = composed(Smora(router), [own, replace(own, name="again")], [[0.25, 0.75]])(x)
    assert torch.allclose(twice, beside, atol=1e-12)
    with pytest.raises(ValueError, match="trained with one adapter, got a0, a1"):
        initial([own, other], form="adapter")


# ---------------------------------------------------------------- the composition form


def pool_by_hand(x: Tensor, adapters: list[Adapter], weights: list[float], A_q: Tensor, B_q: Tensor, k: int) -> Tensor:
    """The formulas of the docstring, from dense updates, rank by rank."""
    out = []
    for token in x:
        ranks = []
        for adapter, w in zip(adapters, weights, strict=True):
            if w == 0:
                continue
            f = adapter.factors["m"]
            U, S, Vh = torch.linalg.svd(f.B @ f.A)
            for i in range(f.rank):
                s = (A_q @ token) @ (B_q.mT @ U[:, i]) * (Vh[i] @ token) / math.sqrt(len(A_q))
                t = 1 / (1 + torch.exp(-s))
                ranks.append((t, w, S[i] * (Vh[i] @ token) * U[:, i]))
        lengths = [abs(w) * v.norm().item() for _, w, v in ranks]
        best = sorted(range(len(ranks)), key=lambda i: -lengths[i] * ranks[i][0].item())[:k]
        mean = sum(lengths[i] * ranks[i][0] for i in best) / sum(lengths[i] for i in best)
        out.append(sum(ranks[i][1] * ranks[i][0] / mean * ranks[i][2] for i in best))
    return torch.stack(out)


@pytest.mark.parametrize("k", [1, 3, 8, 40])
def test_the_pool_form_moves_length_between_the_singular_directions_it_keeps(k: int):
    adapters, x = pool(4, 2, 1, 6), 0.5 * tokens(2)
    start = trained(adapters, rank=3)
    strong = {name: 3 * tensor for name, tensor in start.tensors.items()}  # enough to change the choice
    router, tensors = live(replace(start, tensors=strong))
    plain = {n: t.detach().clone().requires_grad_() for n, t in tensors.items()}
    weights = [[0.5, 0.2, 0.0, -0.3], [0.0, 0.7, 0.3, 0.0]]
    got = composed(Smora(router, k), adapters, weights)(x)
    pairs = zip(x, weights, strict=True)
    want = torch.stack([pool_by_hand(row, adapters, w, plain["m.A"], plain["m.B"], k) for row, w in pairs])
    assert torch.allclose(got, want, atol=1e-11)
    for y in (got, want):
        (y**2).sum().backward()
    for name in ("m.A", "m.B"):
        assert torch.allclose(tensors[name].grad, plain[name].grad, atol=1e-9)
    assert (k == 1) == (tensors["m.B"].grad.abs().max().item() < 1e-9)  # one rank alone keeps its length


def test_a_new_pool_router_is_rank_gating_and_its_first_gradient_reaches_B_alone():
    adapters, x = pool(4, 2, 1, 6), tokens(2)
    router, tensors = live(initial(adapters))
    weights = [[0.5, 0.2, 0.0, -0.3], [0.0, 0.7, 0.3, 0.0]]
    got = composed(Smora(router, 3), adapters, weights)(x)
    same = RankGating(3).compose(gather_banks(adapters), torch.tensor(weights, dtype=torch.float64))["m"](x)
    assert torch.allclose(got, same, atol=1e-12)
    got.pow(2).sum().backward()
    assert tensors["m.B"].grad.abs().max() > 1e-3
    assert not tensors["m.A"].grad.any()


def test_the_total_length_of_what_is_added_is_that_of_rank_gating_with_the_same_ranks():
    adapters, x = pool(4, 2), tokens(1)
    delta = composed(Smora(trained(adapters), active=40), adapters, [[0.6, 0.4]])
    added = delta.shrink(x).abs() * delta.B.norm(dim=0)
    learned, plain = (gate(delta, x) * added).sum(-1), (delta.weights[:, None] * added).sum(-1)
    assert torch.allclose(learned, plain, atol=1e-10)


def test_rows_without_members_gain_nothing_and_spoil_no_gradient():
    adapters, x = pool(4, 2), tokens(2)
    router, tensors = live(trained(adapters))
    with torch.autograd.set_detect_anomaly(True):
        got = composed(Smora(router), adapters, [[0.0, 0.0], [1.0, 1.0]])(x)
        got.sum().backward()
    assert not got[0].any()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in tensors.values())


def test_ranks_that_add_nothing_change_nothing():
    adapters, x = pool(4, 2), tokens(1)
    f = adapters[1].factors["m"]
    B = torch.cat([f.B, torch.zeros(9, 3, dtype=torch.float64)], dim=1)
    padded = Adapter("padded", {"m": LoraFactors(torch.cat([f.A, tokens(1, 3)[0]]), B)})
    router = trained(adapters)
    got = composed(Smora(router, 5), [adapters[0], padded], [[0.6, 0.4]])(x)
    assert torch.allclose(got, composed(Smora(router, 5), adapters, [[0.6, 0.4]])(x), atol=1e-10)


def test_an_overflowing_adapter_does_not_reach_rows_that_do_not_use_it():
    adapters, x = pool(4, 2), tokens(1)
    router, tensors = live(trained(adapters))
    delta = composed(Smora(router), adapters, [[1.0, 0.0]])
    A = torch.where(torch.arange(6)[:, None] < 4, delta.A, torch.inf)
    got = replace(delta, A=A)(x)
    assert torch.equal(got, delta(x))
    got.sum().backward()
    assert tensors["m.A"].grad.isfinite().all()


def test_a_module_the_pool_router_was_not_trained_on_is_refused_by_name_or_gated_untrained():
    x, router = tokens(1), trained(pool(4))
    two = [Adapter(f"n{i}", {"n": factors(2, seed=i)}) for i in (1, 2)]
    weights = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    with pytest.raises(LookupError, match="without the module 'n'"):
        Smora(router).compose(gather_banks(two), weights)
    got = Smora(router, 3, "untrained").compose(gather_banks(two), weights)["n"](x)
    assert torch.allclose(got, RankGating(3).compose(gather_banks(two), weights)["n"](x), atol=1e-12)


@pytest.mark.parametrize("form", ["pool", "adapter"])
def test_embeddings_are_left_at_their_weight(form: str):
    table = factors(3, 1)
    own = Adapter("a", {"m": LoraFactors(table.A, table.B, "embedding"), "n": factors(8, 2)})
    router = trained([own], form=form)
    assert not any(name.startswith("m.") for name in router.tensors)
    ids = torch.randint(0, 12, (1, 5), generator=torch.Generator().manual_seed(3))
    got = composed(Smora(router), [own], [[0.5]])(ids)
    assert torch.allclose(got, 0.5 * (table.B @ table.A).mT[ids], atol=1e-12)


WRONG = [
    ({"form": "both"}, "form must be one of pool, adapter, got 'both'"),
    ({"block": 2}, "Smora has no setting block"),
    ({"form": "adapter", "block": 5, "active": 5}, "6 ranks, which must be a multiple of block = 5"),
    ({"form": "adapter", "active": 7}, "at least active = 7"),
    ({"form": "adapter", "active": 3, "block": 2}, "active must be a multiple of block = 2, got 3"),
    ({"form": "adapter", "active": 2, "block": 2}, "the one block of 2 ranks that acts would always have the gate 3"),
    ({"form": "adapter", "active": 2, "balance": math.nan}, "balance must be a finite number of at least 0, got nan"),
    ({"form": "adapter", "active": 2, "normalised": 1}, "normalised must be True or False, got 1"),
    ({"active": 0}, "active must be an integer of at least 1, got 0"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        initial(pool(6), **settings)


# ---------------------------------------------------------------- running it


@pytest.mark.parametrize("block", [1, 2])
def test_the_products_of_the_active_ranks_alone_are_those_of_all_ranks_masked(block: int):
    adapters, x = pool(12), tokens(4)
    router = trained(adapters, form="adapter", active=4, block=block)
    delta = composed(Smora(router), adapters, [[1.0], [0.0], [-0.5], [2.0]])
    runs = []
    for pays in (True, False):
        context = GateContext("m")
        with mock.patch.object(operator, "active_pays", return_value=pays) as asked:
            runs.append((RowOperator(delta)(x, context), context.scratch[LOAD + "m"]))
        assert asked.call_args.args == (20, 12, 4, 21, 8)
    assert torch.allclose(runs[0][0], runs[1][0], atol=1e-12)
    assert not runs[0][0][1].any()
    assert torch.equal(runs[0][1], runs[1][1])
    beams = delta.repeat(2)
    with mock.patch.object(operator, "active_pays", return_value=True):
        twice = RowOperator(delta)(x.repeat_interleave(2, dim=0), GateContext("m"))
    assert torch.allclose(twice, beams(x.repeat_interleave(2, dim=0), GateContext("m")), atol=1e-12)


def test_active_ranks_are_named_only_where_the_bank_is_the_adapters_own():
    own, other = pool(6, 3)
    router = trained([own], form="adapter", active=2)
    assert composed(Smora(router), [own], [[1.0]]).gate.n_active == 2
    beside = composed(Smora(router), [own, other], [[1.0, 0.0]])
    assert beside.gate.n_active is None
    with mock.patch.object(operator, "active_pays", side_effect=AssertionError):
        RowOperator(beside)(tokens(1), GateContext("m"))


def test_gathering_active_ranks_pays_for_few_tokens_of_wide_modules_and_never_for_a_prefill():
    assert active_pays(1, 64, 8, 8192, 4)
    assert not active_pays(1, 64, 8, 1152, 4)
    assert not active_pays(1, 8, 8, 8192, 4)
    assert not any(active_pays(512, ranks, 8, 8192, 4) for ranks in (8, 64, 256))
    pays = [active_pays(tokens, 256, 8, 8192, 4) for tokens in range(1, 40)]
    assert pays == sorted(pays, reverse=True)


def test_the_adapter_form_keeps_the_laws_of_the_one_adapter_it_serves():
    own = laws.hostile_adapters()[0]
    linear = [own]
    start = Smora.initial(Pool("base", 32, ("own",), gather_banks(linear)), 0, {"form": "adapter", "active": 2})
    noisy = {n: t + torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in start.tensors.items()}
    composer, rows = Smora(replace(start, tensors=noisy)), [[1.0], [0.0], [0.5]]
    inputs = torch.stack(laws.prompts([8] * 3))
    model = laws.base("llama")
    with torch.no_grad():
        plain = model(input_ids=inputs).logits
        with attach(model, laws.compose_rows(composer, linear, rows)):
            full = model(input_ids=inputs).logits
        with attach(model, laws.compose_rows(composer, linear, rows)):
            first = model(input_ids=inputs[:, :5], use_cache=True)
            rest = model(input_ids=inputs[:, 5:], **{CACHE: first[CACHE]}).logits
        with attach(model, laws.compose_rows(composer, linear, rows[2:])):
            alone = model(input_ids=inputs[2:]).logits
    assert laws.distance(torch.cat([first.logits, rest], dim=1), full) < 1e-6
    assert laws.distance(full[2:], alone) < 1e-6
    assert torch.equal(full[1], plain[1])
    assert laws.distance(full[0], plain[0]) > 1e-3
