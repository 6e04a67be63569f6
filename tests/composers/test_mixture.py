from __future__ import annotations

import torch

from loracompose.adapters.lora import Adapter
from loracompose.composers.mixture import Mixture
from loracompose.composition.bank import gather_banks
from tests.composers.one_module import factors, pool, tokens


def test_each_row_is_the_weighted_sum_of_the_outputs_whatever_the_ranks_and_signs():
    adapters, x = [*pool(4, 2, 1), Adapter("elsewhere", {"n": factors(2, 5)})], tokens()
    weights = torch.tensor([[0.5, -2.0, 0.0, 0.7], [0.0, 0.0, 3.0, 0.1]], dtype=torch.float64)
    delta = Mixture().compose(gather_banks(adapters), weights)["m"]
    for row in range(2):
        dense = sum(weights[row, i] * adapters[i].factors["m"].B @ adapters[i].factors["m"].A for i in range(3))
        assert torch.allclose(delta(x)[row], x[row] @ dense.mT, atol=1e-12)


def test_modules_of_one_adapter_only_are_composed_too():
    adapters = [*pool(4), Adapter("elsewhere", {"n": factors(2, 5)})]
    deltas = Mixture().compose(gather_banks(adapters), torch.tensor([[0.5, 0.5]], dtype=torch.float64))
    assert set(deltas) == {"m", "n"}
    assert deltas["n"].weights.tolist() == [[0.5, 0.5]]
