"""RAMoLE against its equations, one token and one adapter after another."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers.base import Pool
from loracompose.composers.ramole import Ramole
from loracompose.composers.router_lora import RouterPair
from loracompose.composition.bank import gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.router import Router
from tests.composers.one_module import factors, pool, tokens


def initial(adapters: list[Adapter], rank: int = 3) -> Router:
    banks = gather_banks(adapters)
    return Ramole.initial(Pool("base", 12, tuple(a.name for a in adapters), banks), 0, {"rank": rank})


def trained(adapters: list[Adapter], rank: int = 3) -> Router:
    """A router of random tensors in float64."""
    generator = torch.Generator().manual_seed(3)
    start = initial(adapters, rank)
    drawn = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in start.tensors.items()}
    return replace(start, tensors=drawn)


def composed(composer: Ramole, adapters: list[Adapter], weights: list[list[float]]) -> LowRankDelta:
    return composer.compose(gather_banks(adapters), torch.tensor(weights, dtype=torch.float64))["m"]


def by_hand(x: Tensor, adapters: list[Adapter], A_r: Tensor, B_r: Tensor) -> Tensor:
    """Eqs. 6-11 for the adapters of one row: x (seq, d_in) to (seq, d_out)."""
    out = []
    for token in x:
        values = [a.factors["m"].B @ (a.factors["m"].A @ token) for a in adapters]
        query = A_r @ token
        scores = [sum((B_r[:, j] @ v) * query[j] for j in range(len(query))) / math.sqrt(len(query)) for v in values]
        total = sum(torch.exp(s) for s in scores)
        out.append(sum(torch.exp(s) / total * v for s, v in zip(scores, values, strict=True)))
    return torch.stack(out)


ROWS = [[1.0, 0.5, 0.0, -2.0], [0.0, 0.0, 1e-9, 1.0], [0.0, 3.0, 0.0, 0.0]]
MEMBERS = [[0, 1, 3], [2, 3], [1]]


def test_each_token_mixes_the_rows_adapters_by_what_they_would_add():
    adapters, x = pool(4, 2, 1, 6), 0.2 * tokens(3)
    router = trained(adapters)
    A_r, B_r = router.tensors["m.A"], router.tensors["m.B"]
    got = composed(Ramole(router), adapters, ROWS)(x)
    for row, members in enumerate(MEMBERS):
        want = by_hand(x[row], [adapters[i] for i in members], A_r, B_r)
        assert torch.allclose(got[row], want, atol=1e-12)


def test_gradients_of_the_router_are_those_of_the_equations():
    adapters, x = pool(4, 2, 1, 6), 0.2 * tokens(3)
    target = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    live, plain = ({n: t.clone().requires_grad_() for n, t in trained(adapters).tensors.items()} for _ in range(2))
    router = replace(trained(adapters), tensors=live)
    ((composed(Ramole(router), adapters, ROWS)(x) - target) ** 2).sum().backward()
    rows = [by_hand(x[i], [adapters[j] for j in m], plain["m.A"], plain["m.B"]) for i, m in enumerate(MEMBERS)]
    ((torch.stack(rows) - target) ** 2).sum().backward()
    for name in live:
        assert torch.allclose(live[name].grad, plain[name].grad, atol=1e-11)
        assert live[name].grad.abs().max() > 1e-2


def test_a_new_router_is_the_uniform_mixture_and_its_first_gradient_reaches_B_alone():
    adapters, x = pool(4, 2, 1), tokens(1)
    start = initial(adapters)
    live = {n: t.clone().requires_grad_() for n, t in start.tensors.items()}
    got = composed(Ramole(replace(start, tensors=live)), adapters, [[1.0, 0.0, 1.0]])(x)
    values = [x @ (f.B @ f.A).mT for f in (adapters[0].factors["m"], adapters[2].factors["m"])]
    assert torch.allclose(got, (values[0] + values[1]) / 2, atol=1e-12)
    got.pow(2).sum().backward()
    assert live["m.B"].grad.abs().max() > 1e-3
    assert not live["m.A"].grad.any()
    assert 0.9 < start.tensors["m.A"].abs().max() * math.sqrt(12) <= 1  # Kaiming-uniform with a = √5
    assert start.tensors["m.A"].std().item() == pytest.approx(1 / math.sqrt(3 * 12), rel=0.2)


def test_the_shares_of_a_rows_members_sum_to_one():
    adapters = pool(4, 2, 1, 6)
    delta = composed(Ramole(trained(adapters)), adapters, ROWS)
    x = tokens(3)
    gates = delta.gate(x, delta.shrink(x), delta.weights, None)  # (batch, seq, R)
    firsts = torch.tensor([0, 4, 6, 7])  # one rank of each adapter
    assert torch.allclose(gates[..., firsts].sum(-1), torch.ones(3, 5, dtype=torch.float64), atol=1e-12)
    assert all((gates[row][..., delta.weights[row] == 0] == 0).all() for row in range(3))


def test_rows_that_lost_all_their_adapters_gain_nothing_and_spoil_no_gradient():
    adapters, x = pool(4, 2), tokens(2)
    live = {n: t.clone().requires_grad_() for n, t in trained(adapters).tensors.items()}
    router = replace(trained(adapters), tensors=live)
    with torch.autograd.set_detect_anomaly(True):
        got = composed(Ramole(router), adapters, [[0.0, 0.0], [1.0, 1.0]])(x)
        got.sum().backward()
    assert not got[0].any()
    assert all(t.grad.isfinite().all() and t.grad.any() for t in live.values())
    nobody = {n: t.clone().requires_grad_() for n, t in router.tensors.items()}
    nothing = composed(Ramole(replace(router, tensors=nobody)), adapters, [[0.0, 0.0]] * 2)(x)
    assert torch.equal(nothing, torch.zeros_like(nothing))


def test_an_adapter_that_overflows_does_not_reach_rows_that_do_not_use_it():
    plain, x = pool(4, 2), tokens(1)
    loud = Adapter("loud", {"m": LoraFactors(torch.full((1, 12), torch.inf).double(), torch.ones(9, 1).double())})
    live = {n: t.clone().requires_grad_() for n, t in trained(plain).tensors.items()}
    router = replace(trained(plain), tensors=live)
    got = composed(Ramole(router), [*plain, loud], [[1.0, 1.0, 0.0]])(x)
    assert torch.allclose(got, composed(Ramole(router), plain, [[1.0, 1.0]])(x), atol=1e-12)
    got.sum().backward()
    assert live["m.A"].grad.isfinite().all()


def test_one_router_serves_adapters_uploaded_later():
    x = tokens(1)
    router = trained(pool(4, 2))
    assert router.adapters is None
    later = [Adapter("new", {"m": factors(5, seed=8)}), Adapter("newer", {"m": factors(1, seed=9)})]
    got = composed(Ramole(router), later, [[1.0, 1.0]])(x)
    assert torch.allclose(got[0], by_hand(x[0], later, router.tensors["m.A"], router.tensors["m.B"]), atol=1e-9)


def test_a_module_the_router_was_not_trained_on_is_refused_by_name_or_mixed_uniformly():
    x, router = tokens(1), trained(pool(4))
    two = [Adapter(f"n{i}", {"n": factors(2, seed=i), "m": factors(1, seed=4)}) for i in (1, 2)]
    weights = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    with pytest.raises(LookupError, match="without the module 'n'"):
        Ramole(router).compose(gather_banks(two), weights)
    delta = Ramole(router, elsewhere="untrained").compose(gather_banks(two), weights)["n"]
    want = sum(x @ (a.factors["n"].B @ a.factors["n"].A).mT / 2 for a in two)
    assert torch.allclose(delta(x), want, atol=1e-12)
    stranger = torch.tensor([[0.0, 0.0]], dtype=torch.float64)
    assert not Ramole(router).compose(gather_banks(two), stranger)["n"](x).any()  # nobody uses it: no refusal


def test_embeddings_are_mixed_uniformly_among_those_that_have_them():
    tables = [LoraFactors(f.A, f.B, "embedding") for f in (factors(3, 1), factors(2, 2))]
    adapters = [*(Adapter(f"a{i}", {"m": t}) for i, t in enumerate(tables)), Adapter("b", {"n": factors(1, 3)})]
    banks = gather_banks(adapters)
    router = Ramole.initial(Pool("base", 12, ("a0", "a1", "b"), banks), 0, {})
    assert sorted(router.tensors) == ["n.A", "n.B"]
    ids = torch.randint(0, 12, (1, 5), generator=torch.Generator().manual_seed(3))
    got = Ramole(router).compose(banks, torch.tensor([[1.0, -3.0, 1.0]], dtype=torch.float64))["m"](ids)
    want = sum((t.B @ t.A).mT[ids] / 2 for t in tables)
    assert torch.allclose(got, want, atol=1e-12)


def test_a_router_of_wrong_shape_another_method_or_an_unknown_setting_is_refused():
    adapters = pool(4, 2)
    router = trained(adapters)
    short = replace(router, tensors={**router.tensors, "m.B": torch.zeros(8, 3)})
    with pytest.raises(ValueError, match=r"'m.B' has shape \(8, 3\)"):
        composed(Ramole(short), adapters, [[1.0, 1.0]])
    with pytest.raises(ValueError, match="belongs to the composer 'smora', not to 'ramole'"):
        Ramole(replace(router, method="smora"))
    with pytest.raises(ValueError, match="Ramole has no setting ranks"):
        Ramole.initial(Pool("base", 12, ("a0", "a1"), gather_banks(adapters)), 0, {"ranks": 2})
    with pytest.raises(ValueError, match="elsewhere must be one of refuse, untrained, got 'skip'"):
        Ramole(router, elsewhere="skip")


def test_keys_are_made_where_the_adapters_lie_wherever_the_router_was_read_to():
    pair = RouterPair(torch.ones(2, 4), torch.ones(3, 2))
    assert pair.key(torch.ones(3, 5, device="meta")).device.type == "meta"
