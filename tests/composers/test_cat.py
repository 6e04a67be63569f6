"""CAT against its equation in plain loops, and its export as a plain adapter."""

from __future__ import annotations

import json

import pytest
import torch

from loracompose import compose
from loracompose.adapters.checkpoint import load_adapter, save_adapter
from loracompose.adapters.lora import Adapter
from loracompose.composers.base import Pool
from loracompose.composers.cat import Cat
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.router import Router
from tests.composers.one_module import factors, pool, tokens

SETS = torch.tensor([[0.2, 0.3, 0.5], [0.0, 1.0, -0.4], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]], dtype=torch.float64)


def adapters() -> list[Adapter]:
    """Ranks 3, 2 and 4; one lacks a module."""
    made = pool(3, 2, 4)
    made[0] = Adapter("a0", {**made[0].factors, "n": factors(5, seed=9)})
    made[2] = Adapter("a2", {**made[2].factors, "n": factors(1, seed=8)})
    return [made[i] for i in content_order(made)]


def given() -> Pool:
    found = adapters()
    return Pool("base", 4, tuple(a.name for a in found), gather_banks(found))


def router(dtype: torch.dtype = torch.float64) -> Router:
    start = Cat.initial(given(), 7, {})
    tensors = {name: tensor.to(dtype, copy=True) for name, tensor in start.tensors.items()}
    return Router(start.method, start.settings, tensors, start.base_model, start.adapters)


def naive(learned: Router, module: str, x: torch.Tensor) -> torch.Tensor:
    found, rows = adapters(), []
    for b in range(len(SETS)):
        members = [i for i in range(3) if SETS[b, i] != 0 and module in found[i].factors]
        exps = {i: torch.exp(learned.tensors[module][i]) for i in members}
        out = torch.zeros(x.shape[1], 9, dtype=torch.float64)
        for i in members:
            f = found[i].factors[module]
            out = out + exps[i] / sum(exps.values()) * (x[b] @ f.A.mT @ f.B.mT)
        rows.append(out)
    return torch.stack(rows)


@pytest.mark.parametrize("module", ["m", "n"])
def test_it_is_the_papers_equation_forward_and_backward(module: str):
    fast, slow, x = router(), router(), tokens(batch=4)
    for learned in (fast, slow):
        learned.tensors[module].requires_grad_()
    got, want = Cat(fast).compose(given().banks, SETS)[module](x), naive(slow, module, x)
    assert torch.allclose(got, want, rtol=1e-12)
    probe = torch.randn(got.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (got * probe).sum().backward()
    (want * probe).sum().backward()
    assert fast.tensors[module].grad.abs().max() > 0
    assert torch.allclose(fast.tensors[module].grad, slow.tensors[module].grad, rtol=1e-9, atol=1e-12)


def test_its_set_is_exported_as_a_plain_adapter_that_says_which_router_made_it(tmp_path):
    learned, found = router(torch.float32), adapters()
    merged = compose(found, composer=Cat(learned))
    x = tokens(batch=4)
    for module in ("m", "n"):
        f = merged.factors[module]
        assert torch.allclose(x[:1] @ f.A.mT @ f.B.mT, naive(learned, module, x)[:1], rtol=1e-6, atol=1e-6)
    save_adapter(merged, tmp_path / "merged")
    assert load_adapter(tmp_path / "merged").factors.keys() == {"m", "n"}
    recipe = json.loads((tmp_path / "merged" / "recipe.json").read_text())
    assert recipe["hyper_parameters"]["router"]["fingerprint"] == learned.fingerprint


def test_an_adapter_that_it_was_not_trained_for_is_named():
    with pytest.raises(LookupError, match=r"not trained for the adapter 'new' .*it knows a"):
        compose([*adapters()[:2], Adapter("new", {"m": factors(2, seed=99)})], composer=Cat(router()))


def test_it_starts_from_random_logits_of_the_seed_or_from_the_mean():
    one, two = Cat.initial(given(), 1, {}), Cat.initial(given(), 2, {})
    assert not torch.equal(one.tensors["m"], two.tensors["m"])
    assert torch.equal(one.tensors["m"], Cat.initial(given(), 1, {}).tensors["m"])
    assert not Cat.initial(given(), 1, {"spread": 0.0}).tensors["m"].any()
    with pytest.raises(ValueError, match="spread must be a finite number of at least 0, got -1"):
        Cat.initial(given(), 1, {"spread": -1})


def test_a_router_of_other_shapes_is_refused():
    start = router()
    fewer = Router(start.method, start.settings, {**start.tensors, "m": torch.zeros(2)}, "base", start.adapters)
    with pytest.raises(ValueError, match=r"'m' has shape \(2,\), expected \(3,\)"):
        Cat(fewer).compose(given().banks, SETS)
    with pytest.raises(LookupError, match="no tensor 'n'"):
        Cat(Router("cat", {}, {"m": start.tensors["m"]}, "base", start.adapters)).compose(given().banks, SETS)
