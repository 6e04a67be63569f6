"""LoRA-Flow against its equations in plain loops, what it starts from, and what masked members do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composers.base import Pool
from loracompose.composers.lora_flow import LoraFlow
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.gates import GateContext
from loracompose.composition.router import Router
from tests.composers.one_module import factors, tokens

MODULES = ("layers.0.q", "layers.0.v", "layers.1.q", "out")
HIDDEN = 6


def adapters() -> list[Adapter]:
    """Ranks 3, 2 and 4; the second lacks a module of the first layer."""
    made = []
    for i, rank in enumerate((3, 2, 4)):
        modules = [m for m in MODULES if not (i == 1 and m == "layers.0.v")]
        made.append(Adapter(f"a{i}", {m: factors(rank, seed=10 * i + j) for j, m in enumerate(modules)}))
    return [made[i] for i in content_order(made)]


def pool() -> Pool:
    found = adapters()
    return Pool("base", HIDDEN, tuple(a.name for a in found), gather_banks(found))


def random_router(seed: int = 3, **settings: object) -> Router:
    start, generator = LoraFlow.initial(pool(), 0, settings), torch.Generator().manual_seed(seed)
    tensors = {n: torch.randn(t.shape, generator=generator, dtype=torch.float64) for n, t in start.tensors.items()}
    return Router(start.method, start.settings, tensors, start.base_model, start.adapters)


def state(seq: int = 5, batch: int = 2) -> Tensor:
    return torch.randn(batch, seq, HIDDEN, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def run(router: Router, weights: Tensor, x: Tensor, layer_input: Tensor, **fields: object) -> dict[str, Tensor]:
    composer = LoraFlow(router, **fields)  # type: ignore[arg-type]
    scratch: dict[str, Tensor] = {}
    deltas = composer.compose(pool().banks, weights)
    return {m: d.to(x.device, x.dtype)(x, GateContext(m, layer_input, scratch=scratch)) for m, d in deltas.items()}


def naive(router: Router, weights: Tensor, x: Tensor, layer_input: Tensor, module: str, T: float = 1.0) -> Tensor:
    """The equations, token by token and adapter by adapter."""
    layer, found = module.rpartition(".")[0], adapters()
    gate, bias = router.tensors[f"{layer}.gate"].double(), router.tensors[f"{layer}.bias"].double()
    rows = []
    for b in range(x.shape[0]):
        members = [i for i in range(len(found)) if weights[b, i] != 0]
        for t in range(x.shape[1]):
            out = torch.zeros(9, dtype=torch.float64)
            if members:
                exps = {
                    i: torch.exp(sum(gate[i, d] * layer_input[b, t, d] for d in range(HIDDEN)) / T) for i in members
                }
                moved = (sum(bias) - sum(bias[i] for i in members)) / len(members)
                for i in members:
                    share = exps[i] / sum(exps.values()) + bias[i] + moved
                    if module in found[i].factors:
                        f = found[i].factors[module]
                        for r in range(f.rank):
                            out = out + share * f.B[:, r] * (f.A[r] @ x[b, t])
            rows.append(out)
    return torch.stack(rows).reshape(*x.shape[:2], 9)


SETS = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, -0.4], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize("temperature", [None, 0.3])
@pytest.mark.parametrize("module", MODULES[:3])
def test_it_is_the_papers_equations_forward_and_backward(module: str, temperature: float | None):
    fast, slow = random_router(), random_router()
    x, h = tokens(batch=4), state(batch=4)
    for router in (fast, slow):
        for tensor in router.tensors.values():
            tensor.requires_grad_()
    got = run(fast, SETS, x, h, temperature=temperature)[module]
    want = naive(slow, SETS, x, h, module, temperature or 1.0)
    assert torch.allclose(got, want, rtol=1e-10, atol=1e-12)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (got * probe).sum().backward()
    (want * probe).sum().backward()
    layer = module.rpartition(".")[0]
    for name in (f"{layer}.gate", f"{layer}.bias"):
        assert fast.tensors[name].grad.abs().max() > 0
        assert torch.allclose(fast.tensors[name].grad, slow.tensors[name].grad, rtol=1e-9, atol=1e-11)


def test_the_first_step_reaches_the_adapter_that_the_start_leaves_out():
    two, x, h = adapters()[:2], tokens(), state()
    start = LoraFlow.initial(Pool("base", HIDDEN, ("one", "two"), gather_banks(two)), 0, {"task": "two"})
    tensors = {name: tensor.double().requires_grad_() for name, tensor in start.tensors.items()}
    composer = LoraFlow(Router(start.method, start.settings, tensors, start.base_model, start.adapters))
    delta = composer.compose(gather_banks(two), torch.ones(2, 2, dtype=torch.float64))["layers.1.q"]
    got = delta(x, GateContext("layers.1.q", h))
    alone = [x @ a.factors["layers.1.q"].A.mT @ a.factors["layers.1.q"].B.mT for a in two]
    assert torch.equal(got, alone[1])  # the other's share is 1/2 - 1/2 exactly
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (got * probe).sum().backward()
    one, other = ((probe * y).sum(dim=-1) for y in alone)  # (batch, seq): d loss / d share
    gate = ((one - other)[..., None] / 4 * h).sum(dim=(0, 1))  # the softmax's slope at 1/2 is 1/4
    assert torch.allclose(tensors["layers.1.bias"].grad, torch.stack([one.sum(), other.sum()]), rtol=1e-10)
    assert torch.allclose(tensors["layers.1.gate"].grad, torch.stack([gate, -gate]), rtol=1e-10)


def shares(router: Router, weights: Tensor) -> Tensor:
    gate = LoraFlow(router).compose(pool().banks, weights)["layers.0.q"].gate
    return gate.layer.to(torch.device("cpu"), torch.float64).shares(state(batch=len(weights)))


def test_it_starts_as_the_adapter_of_the_task_in_every_set_that_has_it_and_as_the_mean_in_the_others():
    names = pool().names
    task = names.index("a1")
    start = shares(LoraFlow.initial(pool(), 0, {"task": "a1"}), SETS)
    for b, members in enumerate(SETS != 0):
        want = torch.zeros(3, dtype=torch.float64)
        if members[task]:
            want[task] = 1
        elif members.any():
            want[members] = 1 / members.sum()
        assert torch.allclose(start[b], want.expand(5, 3), atol=1e-6)
    bias = LoraFlow.initial(pool(), 0, {"task": "a1"}).tensors["layers.0.bias"]
    assert bias.tolist() == pytest.approx([(name == "a1") - 1 / 3 for name in names])


def test_two_adapters_start_as_the_authors_do():
    two = adapters()[:2]
    start = LoraFlow.initial(Pool("base", HIDDEN, ("language", "task"), gather_banks(two)), 0, {"task": "task"})
    assert start.tensors["layers.0.bias"].tolist() == [-0.5, 0.5]
    assert not start.tensors["layers.0.gate"].any()


def test_every_set_shares_out_the_same_total_and_nobody_else_gets_anything():
    router = random_router()
    found = shares(router, SETS)
    total = 1 + router.tensors["layers.0.bias"].sum()
    for b, members in enumerate(SETS != 0):
        assert torch.equal(found[b][:, ~members], torch.zeros(5, int((~members).sum()), dtype=torch.float64))
        if members.any():
            assert torch.allclose(found[b].sum(dim=-1), total.expand(5))


def test_with_all_adapters_the_bias_stands_outside_the_softmax_as_it_is():
    router = random_router()
    gate, bias = router.tensors["layers.0.gate"], router.tensors["layers.0.bias"]
    want = (state() @ gate.mT).softmax(dim=-1) + bias
    assert torch.allclose(shares(router, torch.ones(2, 3, dtype=torch.float64)), want)


def test_a_row_of_nobody_gets_nothing_and_gives_no_nan_to_the_gradient():
    router = random_router()
    for tensor in router.tensors.values():
        tensor.requires_grad_()
    out = run(router, torch.zeros(2, 3, dtype=torch.float64), tokens(), state())
    assert all(not value.any() for value in out.values())
    sum(value.sum() for value in out.values()).backward()
    for tensor in router.tensors.values():
        assert tensor.grad is None or not tensor.grad.any()


def test_the_modules_of_a_layer_share_one_decision_and_layers_do_not():
    scratch: dict[str, Tensor] = {}
    deltas = LoraFlow(random_router()).compose(pool().banks, SETS)
    for module in MODULES[:3]:
        deltas[module](tokens(batch=4), GateContext(module, state(batch=4), scratch=scratch))
    assert sorted(scratch) == ["lora_flow layers.0 own", "lora_flow layers.1 own"]


def test_outside_the_layers_the_weights_of_the_row_count():
    x, delta = tokens(batch=4), LoraFlow(random_router()).compose(pool().banks, SETS)["out"]
    want = sum(
        SETS[:, i, None, None] * (x @ a.factors["out"].A.mT @ a.factors["out"].B.mT) for i, a in enumerate(adapters())
    )
    assert delta.gate is None
    assert torch.allclose(delta(x), want)


def test_a_base_of_another_width_is_refused():
    delta = LoraFlow(random_router()).compose(pool().banks, SETS)["layers.0.q"]
    with pytest.raises(ValueError, match=r"base of width 6, 'layers.0' has 7"):
        delta(tokens(batch=4), GateContext("layers.0.q", torch.zeros(4, 5, 7, dtype=torch.float64)))


@pytest.mark.parametrize("temperature", [0, -1.0, math.inf, True])
def test_a_temperature_that_is_not_above_0_is_refused(temperature: object):
    with pytest.raises(ValueError, match="LoraFlow: temperature must be"):
        LoraFlow.initial(pool(), 0, {"temperature": temperature})


def test_another_methods_router_is_refused():
    with pytest.raises(ValueError, match="belongs to the composer 'mole'"):
        LoraFlow(Router("mole", {}, {}, "base"))
    with pytest.raises(TypeError, match="must be a Router"):
        LoraFlow("folder")  # type: ignore[arg-type]
