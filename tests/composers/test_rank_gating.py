from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers import compose
from loracompose.composers.rank_gating import RankGating
from loracompose.composition.bank import gather_banks
from tests.composers.one_module import factors, pool, tokens


def output(m: int, adapters: list[Adapter], weights: list[list[float]], x: Tensor) -> Tensor:
    return RankGating(m).compose(gather_banks(adapters), torch.tensor(weights, dtype=torch.float64))["m"](x)


def by_hand(m: int, adapters: list[Adapter], weights: list[float], x: Tensor) -> Tensor:
    """The m longest of what all singular directions of all adapters add, token by token."""
    updates = [a.factors["m"].B @ a.factors["m"].A for a in adapters]
    triples = [(w, *torch.linalg.svd(U)) for U, w in zip(updates, weights, strict=True)]
    y = torch.zeros(*x.shape[:-1], 9, dtype=torch.float64)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            added = [w * U[:, i] * S[i] * (Vh[i] @ x[b, t]) for w, U, S, Vh in triples for i in range(S.shape[0])]
            y[b, t] = sum(sorted(added, key=lambda vector: -vector.norm().item())[:m])
    return y


@pytest.mark.parametrize("m", [1, 3, 6, 8])
def test_each_token_keeps_the_m_singular_directions_that_add_most(m: int):
    adapters, weights, x = pool(4, 2, 1, 6), [0.5, -0.3, 0.0, 0.2], tokens()
    assert torch.allclose(output(m, adapters, [weights] * 2, x), by_hand(m, adapters, weights, x), atol=1e-12)


def test_a_budget_of_all_ranks_is_the_weighted_sum():
    adapters, x = pool(4, 2), tokens()
    want = sum(w * x @ a.factors["m"].A.mT @ a.factors["m"].B.mT for a, w in zip(adapters, [0.7, 0.3], strict=True))
    assert torch.allclose(output(6, adapters, [[0.7, 0.3]] * 2, x), want, atol=1e-12)
    assert not torch.allclose(output(5, adapters, [[0.7, 0.3]] * 2, x), want, atol=1e-3)


def test_the_budget_counts_what_the_row_uses_not_what_the_batch_holds():
    adapters, x = pool(2, 8), tokens()
    want = x[:1] @ adapters[0].factors["m"].A.mT @ adapters[0].factors["m"].B.mT
    assert torch.allclose(output(2, adapters, [[1.0, 0.0], [0.0, 1.0]], x)[:1], want, atol=1e-12)


def test_a_barely_retrieved_adapter_cannot_displace_a_well_retrieved_one():
    strong, loud = pool(2, 2)
    loud = Adapter("loud", {"m": LoraFactors(loud.factors["m"].A * 10, loud.factors["m"].B)})
    x = tokens()
    got = output(2, [strong, loud], [[1.0, 1e-4]] * 2, x)
    assert torch.allclose(got, x @ strong.factors["m"].A.mT @ strong.factors["m"].B.mT, atol=1e-12)


def test_ranks_that_add_nothing_displace_none():
    x, (plain,) = tokens(), pool(3)
    dead = Adapter("dead", {"m": LoraFactors(factors(5, 8).A * 100, torch.zeros(9, 5, dtype=torch.float64))})
    want = x @ plain.factors["m"].A.mT @ plain.factors["m"].B.mT
    assert torch.allclose(output(3, [dead, plain], [[1.0, 1.0]] * 2, x), want, atol=1e-12)


def test_it_cannot_be_merged():
    with pytest.raises(ValueError, match="gates the ranks by token"):
        compose(pool(2, 2), composer="rank_gating")


def test_a_budget_of_no_rank_is_refused():
    with pytest.raises(ValueError, match="m must be an integer of at least 1"):
        RankGating(m=0)
