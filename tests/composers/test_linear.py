from __future__ import annotations

import pytest
import torch

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers import compose
from loracompose.composers.linear import Linear
from tests.composers.pool import SHAPES, close, hostile_pool, regauged, same_updates, update, weighted_sum, zero_adapter

WEIGHTS = [0.5, 0.7, -0.4]


@pytest.mark.parametrize("module", SHAPES)
@pytest.mark.parametrize("rank", [1, 3])
def test_a_rank_keeps_the_leading_singular_directions_of_the_weighted_sum(module, rank):
    pool = hostile_pool()
    U, S, Vt = torch.linalg.svd(weighted_sum(pool, WEIGHTS, module), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vt[:rank]
    merged = compose(pool, WEIGHTS, Linear(rank=rank))
    assert merged.factors[module].rank == rank
    assert close(update(merged, module), best)


@pytest.mark.parametrize("rank", [9, 10**6])
def test_as_many_ranks_as_the_members_have_together_give_the_exact_sum(rank):
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Linear(rank=rank))
    assert all(close(update(merged, m), weighted_sum(pool, WEIGHTS, m), 1e-13) for m in SHAPES)
    assert merged.recipe["relative_error"] < 1e-12


def test_the_default_rank_is_the_largest_among_the_members_of_each_module():
    merged = compose(hostile_pool(), WEIGHTS, "linear")
    assert {m: f.rank for m, f in merged.factors.items()} == {"q": 4, "k": 3, "v": 3, "o": 4}


def test_one_adapter_comes_back_as_it_is_by_default():
    adapter = hostile_pool()[1]
    merged = compose([adapter], [1.0], "linear")
    assert all(torch.equal(merged.factors[m].A, adapter.factors[m].A) for m in adapter.factors)


def test_the_recipe_reports_the_error_of_the_truncation():
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Linear(rank=2))
    off = sum((update(merged, m) - weighted_sum(pool, WEIGHTS, m)).square().sum() for m in SHAPES)
    size = sum(weighted_sum(pool, WEIGHTS, m).square().sum() for m in SHAPES)
    assert merged.recipe["relative_error"] == pytest.approx((off / size).sqrt().item(), rel=1e-9)
    assert merged.recipe["relative_error"] > 1e-3


def test_the_factorisation_of_the_members_is_irrelevant():
    pool = hostile_pool()
    assert same_updates(
        compose(pool, WEIGHTS, Linear(rank=2)), compose([regauged(a) for a in pool], WEIGHTS, Linear(rank=2)), 1e-9
    )


def test_zero_adapters_add_nothing_and_half_precision_stays_half():
    pool = hostile_pool()
    plain = compose(pool, WEIGHTS, Linear(rank=2))
    assert same_updates(plain, compose([*pool, zero_adapter()], [*WEIGHTS, 5.0], Linear(rank=2)))
    half = [Adapter(a.name, {m: f.to(dtype=torch.bfloat16) for m, f in a.factors.items()}) for a in pool]
    merged = compose(half, WEIGHTS, Linear(rank=2))
    assert {f.A.dtype for f in merged.factors.values()} == {torch.bfloat16}


def test_an_embedding_stays_an_embedding():
    factors = {"wte": LoraFactors(torch.randn(2, 20), torch.randn(6, 2), kind="embedding")}
    assert compose([Adapter("a", factors)], [1.0], "linear").factors["wte"].kind == "embedding"


def test_a_rank_of_zero_is_refused():
    with pytest.raises(ValueError, match="rank must be an integer of at least 1 or None, got 0"):
        Linear(rank=0)
