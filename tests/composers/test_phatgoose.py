from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composers import compose
from loracompose.composers.phatgoose import Phatgoose
from loracompose.composition.router import Router
from tests.composers.one_module import factors
from tests.composers.two_layers import (
    BATCH,
    MODULES,
    Q0,
    SEQ,
    SHAPES,
    WEIGHTS,
    adapters,
    composed,
    gradients,
    inputs,
    learned,
    pool,
    run,
    score,
)


def layer_norm(v: Tensor) -> Tensor:
    mean = sum(v) / len(v)
    return (v - mean) / (sum((x - mean) ** 2 for x in v) / len(v) + 1e-5).sqrt()


def by_hand(router: Router, x: dict[str, Tensor], top_k: int) -> dict[str, Tensor]:
    """Token by token: the best k of the row's adapters that have the module."""
    chosen, outputs = adapters(), {}
    for path in MODULES:
        y = torch.zeros(BATCH, SEQ, SHAPES[path][1], dtype=torch.float64)
        v, d = router.tensors[f"{path}.gate"], SHAPES[path][0]
        for row in range(BATCH):
            members = [i for i, w in enumerate(WEIGHTS[row]) if w and path in chosen[i].factors]
            for t in range(SEQ):
                u = x[path][row, t]
                scores = {i: layer_norm(v[i]).dot(layer_norm(u)) / d**0.5 for i in members}
                best = sorted(scores, key=lambda i: -scores[i].item())[:top_k]
                total = sum(scores[i].exp() for i in best)
                for i in best:
                    part = chosen[i].factors[path]
                    y[row, t] = y[row, t] + scores[i].exp() / total * (part.B @ (part.A @ u))
        outputs[path] = y
    return outputs


@pytest.mark.parametrize("top_k", [1, 2, None])
def test_routing_and_its_gradients_are_those_of_the_papers_equations_written_out(top_k: int | None):
    router, x = learned(Phatgoose), inputs()
    got, want = run(composed(Phatgoose(router, top_k)), x), by_hand(router, x, top_k or 4)
    for path in MODULES:
        assert torch.allclose(got[path], want[path], atol=1e-12)
    mine, theirs = gradients(score(got), router), gradients(score(want), router)
    for name in router.tensors:
        assert torch.allclose(mine[name], theirs[name], atol=1e-10)
        assert (theirs[name].abs().max() > 1e-6) == (
            top_k != 1
        )  # the share of the only one left is 1, whatever its score


def test_training_is_one_sigmoid_of_the_rows_own_adapter_and_reaches_no_other_vector():
    router, x, chosen = learned(Phatgoose), inputs(), adapters()
    own = next(i for i, a in enumerate(chosen) if Q0 in a.factors)
    rows = [[float(i == own) for i in range(4)]] * BATCH
    got = run(composed(Phatgoose.training(router), rows), x)
    want = {}
    for path in MODULES:
        want[path] = torch.zeros(BATCH, SEQ, SHAPES[path][1], dtype=torch.float64)
        part = chosen[own].factors.get(path)
        for row in range(BATCH if part is not None else 0):
            for t in range(SEQ):
                u = x[path][row, t]
                gate = 1 / (1 + (-router.tensors[f"{path}.gate"][own].dot(u)).exp())
                want[path][row, t] = gate * (part.B @ (part.A @ u))
        assert torch.allclose(got.get(path, want[path]), want[path], atol=1e-12)
    mine, theirs = gradients(score(got), router), gradients(score(want), router)
    for name in router.tensors:
        assert torch.allclose(mine[name], theirs[name], atol=1e-10)
    assert mine[f"{Q0}.gate"][own].any()
    assert not mine[f"{Q0}.gate"][[i for i in range(4) if i != own]].any()


def test_the_start_is_half_of_the_adapter_in_training_and_the_mean_of_all_in_routing():
    router, x = Phatgoose.initial(pool(), 0, {}), inputs()
    assert not any(t.any() for t in router.tensors.values())
    plain = adapters()
    has = [i for i, a in enumerate(plain) if Q0 in a.factors]
    both = [[float(i in has[:2]) for i in range(4)]] * BATCH
    dense = [a.factors[Q0].B @ a.factors[Q0].A for a in (plain[i] for i in has[:2])]
    mean = composed(Phatgoose(router, top_k=None), both)[Q0]
    assert torch.allclose(mean.to(torch.device("cpu"), torch.float64)(x[Q0]), x[Q0] @ (sum(dense) / 2).mT, atol=1e-12)
    first = [[float(i == has[0]) for i in range(4)]] * BATCH
    half = composed(Phatgoose.training(router), first)[Q0].to(torch.device("cpu"), torch.float64)
    assert torch.allclose(half(x[Q0]), x[Q0] @ dense[0].mT / 2, atol=1e-12)


@pytest.mark.parametrize("phase", ["routing", "training"])
def test_dropping_all_members_is_the_base_and_leaves_no_nan_in_any_gradient(phase: str):
    router = learned(Phatgoose)
    outputs = run(composed(Phatgoose(router, phase=phase), [[0.0] * 4] * BATCH), inputs())
    assert not any(y.any() for y in outputs.values())
    assert not any(g.any() for g in gradients(score(outputs), router).values())


def test_a_row_of_several_members_cannot_be_trained_on():
    with pytest.raises(ValueError, match="a row has several members"):
        composed(Phatgoose.training(learned(Phatgoose)))


def test_an_adapter_it_was_not_trained_for_is_refused_by_name():
    with pytest.raises(LookupError, match="it knows a"):
        composed(Phatgoose(learned(Phatgoose)), [[1.0]], [Adapter("new", {Q0: factors(2, 99, 6, 9)})])


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"top_k": 0}, "top_k must be"), ({"phase": "both"}, "phase must be one of routing, training")],
)
def test_values_out_of_range_are_refused(fields: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Phatgoose(learned(Phatgoose), **fields)


def test_it_has_no_settings_and_takes_no_other_methods_router():
    with pytest.raises(ValueError, match="has no setting steps"):
        Phatgoose.initial(pool(), 0, {"steps": 100})
    with pytest.raises(ValueError, match="belongs to the composer 'mole'"):
        Phatgoose(Router("mole", {}, {}, "toy"))


def test_it_cannot_be_merged():
    with pytest.raises(ValueError, match="gates the ranks by token"):
        compose(adapters(), composer=Phatgoose(learned(Phatgoose)))
