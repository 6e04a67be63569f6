from __future__ import annotations

import pytest
import torch

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composition.bank import gather_banks
from loracompose.composition.blocks import BLOCK_BYTES, chunks, compress, member_updates, picked_entries, row_blocks
from loracompose.composition.grouping import group_modules
from tests.composers.pool import hostile_pool, random_adapter, update

SMALL = 300  # bytes: two or three rows of the small modules


def wide_group(d_out=60, d_in=50):
    factors = {m: LoraFactors(torch.zeros(2, d_in).double(), torch.zeros(d_out, 2).double()) for m in ("x", "y")}
    (group,) = group_modules(gather_banks([Adapter("wide", factors)]))
    return group


def full_rank(d_out=60, d_in=50):
    """Two matrices whose singular values fall by 0.8."""
    generator = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(2, d, 50, generator=generator, dtype=torch.float64)).Q for d in (d_out, d_in)
    )
    return (left * 0.8 ** torch.arange(50).double()) @ right.mT


def cut(matrix, height):
    def blocks():
        for start in range(0, matrix.shape[1], height):
            rows = slice(start, start + height)
            yield rows, matrix[:, rows]

    return blocks


@pytest.mark.parametrize("budget", [1, SMALL, BLOCK_BYTES])
def test_blocks_of_rows_put_together_are_the_updates(budget):
    pool = hostile_pool()
    seen = set()
    for chunk in chunks(group_modules(gather_banks(pool)), budget):
        rows = list(row_blocks(chunk, budget))
        dense = [torch.cat(parts, dim=1) for parts in zip(*(member_updates(chunk, r) for r in rows), strict=True)]
        for member, updates in zip(chunk.members, dense, strict=True):
            for module, delta in zip(chunk.modules, updates, strict=True):
                assert torch.allclose(delta, update(pool[member], module), rtol=1e-12, atol=1e-12)
                seen.add((member, module))
    assert seen == {(i, m) for i, a in enumerate(pool) for m in a.factors}


@pytest.mark.parametrize("stride", [1, 3, 7, 1001])
def test_picked_entries_are_every_so_manieth_of_the_updates(stride):
    alike = [random_adapter("a", 2, seed=1), random_adapter("b", 3, seed=2)]
    for chunk in chunks(group_modules(gather_banks(alike)), BLOCK_BYTES):
        for place, whole in enumerate(member_updates(chunk, slice(None))):
            assert torch.allclose(picked_entries(chunk, place, stride), whole.flatten()[::stride], rtol=1e-12)


@pytest.mark.parametrize("budget", [1, SMALL, 3000])
def test_no_block_is_larger_than_the_budget_or_one_row(budget):
    alike = [random_adapter("a", 2, seed=1), random_adapter("b", 3, seed=2)]
    for chunk in chunks(group_modules(gather_banks(alike)), budget):
        for rows in row_blocks(chunk, budget):
            height = rows.stop - rows.start
            size = len(chunk.modules) * height * chunk.d_in * 8
            assert size <= budget or (height == 1 and len(chunk.modules) == 1)


@pytest.mark.parametrize("budget", [1, BLOCK_BYTES])
@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_compression_is_within_a_per_mille_of_the_best_rank_k_error(budget, shape):
    matrix = full_rank(*shape)
    A, B = compress(wide_group(*shape), cut(matrix, 7), 6, 0, budget)
    assert A.shape == (2, 6, shape[1])
    best = (0.8 ** (2 * torch.arange(6, 50).double())).sum().sqrt()
    errors = torch.linalg.matrix_norm(B @ A - matrix)
    assert (errors >= best * (1 - 1e-9)).all()
    assert (errors <= best * 1.001).all()


@pytest.mark.parametrize("budget", [1, BLOCK_BYTES])
def test_an_update_of_low_rank_is_recovered_exactly(budget):
    matrix = full_rank()
    U, S, Vt = torch.linalg.svd(matrix)
    low = (U[..., :4] * S[:, None, :4]) @ Vt[:, :4]
    A, B = compress(wide_group(), cut(low, 11), 4, 0, budget)
    assert torch.allclose(B @ A, low, atol=1e-12)


@pytest.mark.parametrize("shape", [(60, 50), (50, 60)])
def test_as_many_ranks_as_the_narrow_side_hand_the_update_back_untouched(shape):
    matrix = full_rank(*shape)
    A, B = compress(wide_group(*shape), cut(matrix, 7), 10**6, 0, 1)
    assert A.shape[1] == 50
    assert torch.equal(B @ A, matrix)


@pytest.mark.parametrize(("budget", "calls"), [(BLOCK_BYTES, 1), (1, 6)])
def test_blocks_are_made_once_if_they_fit_the_budget_and_six_times_otherwise(budget, calls):
    count = 0
    matrix = full_rank()

    def blocks():
        nonlocal count
        count += 1
        yield from cut(matrix, 7)()

    compress(wide_group(), blocks, 6, 0, budget)
    assert count == calls
