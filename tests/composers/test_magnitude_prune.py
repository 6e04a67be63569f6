from __future__ import annotations

from itertools import permutations

import pytest
import torch

from loracompose.composers import compose
from loracompose.composers.magnitude_prune import MagnitudePrune
from tests.composers.pool import SHAPES, close, hostile_pool, regauged, same_updates, update, weighted_sum, zero_adapter

WEIGHTS = [0.5, 0.7, -0.4]
ALL = 10**6


def oracle(adapters, weights, keep):
    """The weighted sum of the `keep` largest entries of each adapter, found by sorting (module, row, column)."""
    total = {m: torch.zeros(o, i, dtype=torch.float64) for m, (i, o) in SHAPES.items()}
    for adapter, w in zip(adapters, weights, strict=True):
        places = [
            (abs(value), m, row, column, value)
            for m in adapter.factors
            for row, line in enumerate(update(adapter, m).tolist())
            for column, value in enumerate(line)
        ]
        for _, m, row, column, value in sorted(places, reverse=True)[: keep(len(places))]:
            total[m][row, column] += w * value
    return total


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
def test_it_sums_the_largest_entries_of_each_whole_adapter(block_bytes):
    pool = hostile_pool()
    want = oracle(pool, WEIGHTS, lambda n: -(-n // 4))
    merged = compose(pool, WEIGHTS, MagnitudePrune(0.25, rank=ALL, block_bytes=block_bytes))
    assert all(close(update(merged, m), want[m], 1e-12) for m in SHAPES)


def test_the_threshold_is_of_the_adapter_not_of_the_module():
    loud, quiet = hostile_pool()[0].factors["q"], hostile_pool()[0].factors["o"]
    adapter = hostile_pool()[0]
    factors = {"q": type(loud)(1000 * loud.A, loud.B), "o": quiet}
    merged = compose([type(adapter)("a", factors)], [1.0], MagnitudePrune(0.4, rank=ALL))
    assert (update(merged, "o") == 0).all()
    assert (update(merged, "q") != 0).double().mean() > 0.75


def test_at_density_one_it_is_the_exact_weighted_sum_and_below_it_is_not():
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, MagnitudePrune(density=1.0))
    assert all(close(update(merged, m), weighted_sum(pool, WEIGHTS, m), 1e-13) for m in SHAPES)
    assert compose(pool, WEIGHTS, MagnitudePrune(density=0.9)).recipe["relative_error"] > 1e-4


def test_a_rank_bounds_the_result_at_every_density():
    for density in (0.2, 1.0):
        merged = compose(hostile_pool(), WEIGHTS, MagnitudePrune(density, rank=2))
        assert {f.rank for f in merged.factors.values()} == {2}


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
def test_the_order_of_adapters_is_irrelevant(order):
    pool = hostile_pool()
    other = compose([pool[i] for i in order], [WEIGHTS[i] for i in order], "magnitude_prune")
    assert same_updates(compose(pool, WEIGHTS, "magnitude_prune"), other)


def test_the_factorisation_of_the_members_is_irrelevant():
    pool, setting = hostile_pool(), MagnitudePrune(rank=3)
    assert same_updates(compose(pool, WEIGHTS, setting), compose([regauged(a) for a in pool], WEIGHTS, setting), 1e-8)


def test_zero_adapters_and_doubled_adapters_change_nothing_else():
    pool, setting = hostile_pool(), MagnitudePrune(rank=ALL)
    plain = compose(pool, WEIGHTS, setting)
    assert same_updates(compose([*pool, zero_adapter()], [*WEIGHTS, 3.0], setting), plain)
    assert same_updates(compose([*pool, pool[0]], [0.2, *WEIGHTS[1:], 0.3], setting), plain)


def test_a_density_of_zero_is_refused():
    with pytest.raises(ValueError, match=r"density must be in \(0, 1\], got 0"):
        MagnitudePrune(density=0)
