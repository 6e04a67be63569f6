from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composition.bank import gather_banks
from loracompose.composition.canonical import canonical_banks
from loracompose.composition.linalg import canonical, factored_svd, frobenius, truncate
from tests.composers.one_module import pool

SHAPES = [(3, 12, 9), (1, 5, 5), (7, 4, 9), (9, 12, 4)]  # rank, d_in, d_out; also more ranks than width


def stack(rank: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    A = torch.randn(2, rank, d_in, generator=generator, dtype=torch.float64)
    return A, torch.randn(2, d_out, rank, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_factored_svd_is_that_of_the_dense_update_with_a_fixed_sign(shape):
    A, B = stack(*shape)
    U, S, Vt = factored_svd(A, B)
    assert torch.allclose(S, torch.linalg.svdvals(B @ A)[:, : min(shape)], atol=1e-12)
    assert torch.allclose(U @ torch.diag_embed(S) @ Vt, B @ A, atol=1e-12)
    eye = torch.eye(min(shape), dtype=torch.float64).expand(2, -1, -1)
    assert torch.allclose(Vt @ Vt.mT, eye, atol=1e-12)
    assert torch.allclose(U.mT @ U, eye, atol=1e-12)
    assert (Vt.gather(-1, Vt.abs().argmax(-1, keepdim=True)) > 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_canonical_ranks_are_the_same_update_balanced_sorted_and_as_many(shape):
    A, B = stack(*shape)
    a, b = canonical(A, B)
    assert (a.shape, b.shape) == (A.shape, B.shape)
    assert torch.allclose(b @ a, B @ A, atol=1e-12)
    assert torch.allclose(a.norm(dim=-1), b.norm(dim=-2), atol=1e-12)
    assert (a.norm(dim=-1).diff(dim=-1) <= 1e-12).all()


def test_canonical_ranks_of_no_update_and_beyond_its_rank_are_exactly_zero():
    A, B = stack(4, 12, 9)
    a, b = canonical(A, torch.zeros_like(B))
    assert not a.any()
    assert not b.any()
    A[:, 3] = A[:, 2]  # rank 3 in 4 ranks
    a, b = canonical(A, B)
    assert not a[:, 3].any()
    assert not b[:, :, 3].any()


def test_half_precision_is_decomposed_in_float32_and_rounded_back():
    A, B = (t.to(torch.bfloat16) for t in stack(3, 12, 9))
    assert factored_svd(A, B)[1].dtype == torch.float32
    assert canonical(A, B)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("rank", [1, 2, 3, 99])
def test_truncation_is_the_best_approximation_of_that_rank(rank: int):
    A, B = stack(4, 12, 9)
    a, b = truncate(A, B, rank)
    assert a.shape[-2] == min(rank, 4)
    S = torch.linalg.svdvals(B @ A)[:, :4]
    assert torch.allclose((B @ A - b @ a).norm(dim=(-2, -1)), S[:, rank:].norm(dim=-1), atol=1e-11)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        truncate(A, B, 0)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_frobenius_norm_is_that_of_the_dense_update_also_where_it_nearly_cancels(shape):
    A, B = stack(*shape)
    assert torch.allclose(frobenius(A, B), (B @ A).norm(dim=(-2, -1)))
    doubled = torch.cat([A, A], dim=-2), torch.cat([B, -(1 + 1e-7) * B], dim=-1)
    assert torch.allclose(frobenius(*doubled), 1e-7 * (B @ A).norm(dim=(-2, -1)), rtol=1e-5)


def test_canonical_banks_rewrite_each_adapter_alone_and_keep_holes():
    adapters = [*pool(4, 2), Adapter("elsewhere", {"n": pool(3)[0].factors["m"]})]
    banks = gather_banks(adapters)
    found = canonical_banks(banks)
    assert [part is None for part in found["m"].parts] == [False, False, True]
    assert [part is None for part in found["n"].parts] == [True, True, False]
    assert found["m"].fingerprints == banks["m"].fingerprints
    for module, bank in banks.items():
        for i, part in bank.present:
            own = found[module].parts[i]
            A, B = canonical(part.A, part.B)
            assert torch.allclose(own.A, A)
            assert torch.allclose(own.B, B)


def test_a_truncation_in_single_precision_keeps_what_that_in_double_precision_keeps():
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(60, 24, 64, generator=generator), torch.randn(60, 48, 24, generator=generator)
    a, b = truncate(A, B, 8)
    exact_a, exact_b = truncate(A.double(), B.double(), 8)
    exact = exact_b @ exact_a
    errors = (b @ a - exact).abs().amax((1, 2)) / exact.abs().amax((1, 2))
    assert errors.max() < 4e-6  # 1.1e-5 with the core in single precision
