from __future__ import annotations

import pytest
import torch

from loracompose.adapters.lora import Adapter
from loracompose.composers.fusion import Fusion, fuse
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


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_adapters_of_two_dtypes_are_averaged_in_the_wider_one_in_either_order(order: tuple[int, int]):
    adapters = [pool(3)[0].to(dtype=torch.bfloat16), pool(3, 2)[1].to(dtype=torch.float32)]
    banks = gather_banks([adapters[i] for i in order])
    A, B = fuse(banks, torch.tensor([1 / 3, 1 / 3], dtype=torch.float64))["m"]
    assert (A.dtype, B.dtype) == (torch.float32, torch.float32)
    wide = [padded(adapter.to(dtype=torch.float64), 3) for adapter in adapters]
    torch.testing.assert_close(A.double(), (wide[0][0] + wide[1][0]) / 3, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(B.double(), (wide[0][1] + wide[1][1]) / 3, rtol=1e-6, atol=1e-6)


def test_an_average_in_half_precision_is_rounded_once():
    adapters = [adapter.to(dtype=torch.bfloat16) for adapter in pool(3, 3, 3, 3, 3)]
    A, B = fuse(gather_banks(adapters), torch.full((5,), 0.2, dtype=torch.float64))["m"]
    exact = [sum(padded(adapter.to(dtype=torch.float64), 3)[k] for adapter in adapters) / 5 for k in (0, 1)]
    for got, want in zip((A, B), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert torch.allclose(got.double(), want, rtol=2**-8, atol=1e-6)  # half a unit in the last place


def test_a_member_without_the_module_counts_as_zero():
    adapters, x = [*pool(4), Adapter("elsewhere", {"n": factors(2, 5)})], tokens(batch=1)
    delta = Fusion().compose(gather_banks(adapters), torch.tensor([[0.5, 0.5]], dtype=torch.float64))["m"]
    f = adapters[0].factors["m"]
    assert torch.allclose(delta(x), 0.25 * x @ f.A.mT @ f.B.mT, atol=1e-12)
