from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from loracompose.adapters.lora import Adapter
from loracompose.composers import compose
from loracompose.composers.dare import Dare, DareTies
from loracompose.composition.sparsity import mask_stream
from tests.composers.pool import (
    SHAPES,
    close,
    hostile_pool,
    random_adapter,
    regauged,
    same_updates,
    update,
    weighted_sum,
    zero_adapter,
)

WEIGHTS = [0.5, 0.7, -0.4]
ALL = 10**6


def dropped(adapter, module, drop, seed=0):
    delta = update(adapter, module)
    kept = torch.rand(delta.shape, generator=mask_stream(adapter.fingerprint, module, seed)) >= drop
    return torch.where(kept, delta / (1 - drop), 0.0)


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_it_sums_the_entries_that_each_mask_leaves(drop, block_bytes):
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Dare(drop, rank=ALL, block_bytes=block_bytes))
    for module in SHAPES:
        want = sum(w * dropped(a, module, drop) for a, w in zip(pool, WEIGHTS, strict=True))
        assert close(update(merged, module), want, 1e-12)


def test_with_nothing_dropped_it_is_the_exact_sum_of_the_ranks_as_they_are():
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Dare(drop=0.0))
    assert all(close(update(merged, m), weighted_sum(pool, WEIGHTS, m), 1e-13) for m in SHAPES)
    rows = {tuple(row) for a in pool for row in a.factors["q"].A.tolist()}
    assert {tuple(row) for row in merged.factors["q"].A.tolist()} == rows  # no decomposition has touched them


def test_the_weighted_sum_is_what_many_seeds_come_to():
    pool = [random_adapter("a", 2, seed=1, modules=("q",)), random_adapter("b", 3, seed=2, modules=("q",))]
    mean = sum(update(compose(pool, None, Dare(0.5, rank=ALL, seed=s)), "q") for s in range(100)) / 100
    exact = weighted_sum(pool, [0.5, 0.5], "q")
    assert close(mean, exact, 0.2)
    assert not close(update(compose(pool, None, Dare(0.5, rank=ALL)), "q"), exact, 0.5)


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
@pytest.mark.parametrize("setting", [Dare(), DareTies(density=0.5)])
def test_the_order_of_adapters_is_irrelevant(order, setting):
    pool = hostile_pool()
    other = compose([pool[i] for i in order], [WEIGHTS[i] for i in order], setting)
    assert same_updates(compose(pool, WEIGHTS, setting), other)


def test_the_mask_of_an_adapter_does_not_depend_on_its_company_or_its_name():
    pool = hostile_pool()
    alone = compose(pool[:1], [0.5], Dare(rank=ALL))
    rest = compose(pool[1:], WEIGHTS[1:], Dare(rank=ALL))
    renamed = Adapter("another name", pool[0].factors)
    together = compose([renamed, *pool[1:]], WEIGHTS, Dare(rank=ALL))
    assert all(close(update(together, m), update(alone, m) + update(rest, m)) for m in SHAPES)


def test_an_adapter_given_twice_is_dropped_alike_twice():
    adapter = random_adapter("a", 3, seed=1)
    assert same_updates(
        compose([adapter, adapter], [0.3, 0.4], Dare(rank=ALL)), compose([adapter], [0.7], Dare(rank=ALL))
    )


def test_a_seed_gives_the_same_masks_again_and_another_seed_others():
    pool = hostile_pool()
    assert same_updates(compose(pool, WEIGHTS, Dare(seed=3)), compose(pool, WEIGHTS, Dare(seed=3)), 0)
    assert not same_updates(compose(pool, WEIGHTS, Dare(seed=3)), compose(pool, WEIGHTS, Dare(seed=4)), 0.1)


def test_modules_and_adapters_are_masked_differently():
    adapter = random_adapter("a", 3, seed=1)
    twin = Adapter("twin", {"q": adapter.factors["q"], "o": adapter.factors["q"]})
    merged = compose([twin], [1.0], Dare(rank=ALL))
    assert not close(update(merged, "q"), update(merged, "o"), 0.1)


@pytest.mark.parametrize("composer", [Dare(), DareTies()])
def test_masks_follow_the_factors_so_the_factorisation_matters_as_declared(composer):
    pool = hostile_pool()
    assert not composer.gauge_invariant
    assert not same_updates(
        compose(pool, WEIGHTS, composer), compose([regauged(a) for a in pool], WEIGHTS, composer), 0.1
    )


def test_dare_ties_trims_and_elects_what_dropping_leaves():
    pool, density, drop = hostile_pool(), 0.3, 0.4
    thin = []
    for adapter in pool:
        kept = {m: dropped(adapter, m, drop) for m in adapter.factors}
        sizes = torch.cat([d.flatten() for d in kept.values()]).abs().sort(descending=True).values
        threshold = sizes[math.ceil(density * len(sizes)) - 1]
        thin.append({m: d * (d.abs() >= threshold) for m, d in kept.items()})
    merged = compose(pool, WEIGHTS, DareTies(drop, density, scale=2.0, rank=ALL))
    for module, (d_in, d_out) in SHAPES.items():
        members = [(w, t[module]) for w, t in zip(WEIGHTS, thin, strict=True) if module in t]
        votes = sum(w * t for w, t in members)
        agreeing = [(abs(w) * (w * t * votes > 0).double(), w * t) for w, t in members]
        share = sum(s for s, _ in agreeing)
        total = sum((s > 0) * t for s, t in agreeing)
        want = 2.0 * 1.6 * torch.where(share > 0, total / share, torch.zeros(d_out, d_in, dtype=torch.float64))
        assert close(update(merged, module), want, 1e-12)


def test_dare_ties_is_one_adapter_where_nothing_is_dropped():
    adapter = hostile_pool()[1]
    assert same_updates(compose([adapter], [1.0], DareTies(drop=0.0)), adapter)
    assert not same_updates(compose([adapter], [1.0], DareTies()), adapter, 0.1)


@pytest.mark.parametrize("composer", [Dare(), DareTies()])
def test_zero_adapters_come_to_nothing(composer):
    assert all((update(compose([zero_adapter()], None, composer), m) == 0).all() for m in SHAPES)


@pytest.mark.parametrize("composer", [Dare, DareTies])
@pytest.mark.parametrize("drop", [-0.1, 1.0])
def test_a_drop_rate_outside_0_to_1_is_refused(composer, drop):
    with pytest.raises(ValueError, match=r"drop must be in \[0, 1\), got"):
        composer(drop=drop)
