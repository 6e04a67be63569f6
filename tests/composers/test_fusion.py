from __future__ import annotations

import torch

from loracompose.adapters.lora import Adapter
from loracompose.composers.fusion import Fusion
from loracompose.composition.bank import gather_banks
from tests.composers.one_module import factors, pool, tokens


def padded(adapter: Adapter, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    f = adapter.factors["m"]
    pad = rank - f.rank
    return torch.nn.functional.pad(f.A, (0, 0, 0, pad)), torch.nn.functional.pad(f.B, (0, pad))


def test_A_and_B_are_averaged_separately_with_shorter_ranks_padded():
    adapters, x, weights = pool(4, 2, 3), tokens(), [[0.5, -0.3, 0.0], [0.0, 0.6, 0.4]]
    delta = Fusion().compose(gather_banks(adapters), torch.tensor(weights, dtype=torch.float64))["m"]
    for row, w in enumerate(weights):
        sides = [padded(adapter, 4) for adapter in adapters]
        A, B = (sum(w_i * side[k] for w_i, side in zip(w, sides, strict=True)) for k in (0, 1))
        assert torch.allclose(delta(x)[row], x[row] @ A.mT @ B.mT, atol=1e-12)


def test_it_costs_the_largest_rank_of_the_members_once_per_distinct_row():
    banks = gather_banks(pool(4, 2, 7))
    rows = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert Fusion().compose(banks, rows)["m"].A.shape == (4 + 2, 12)


def test_a_member_without_the_module_counts_as_zero():
    adapters, x = [*pool(4), Adapter("elsewhere", {"n": factors(2, 5)})], tokens(batch=1)
    delta = Fusion().compose(gather_banks(adapters), torch.tensor([[0.5, 0.5]], dtype=torch.float64))["m"]
    f = adapters[0].factors["m"]
    assert torch.allclose(delta(x), 0.25 * x @ f.A.mT @ f.B.mT, atol=1e-12)
