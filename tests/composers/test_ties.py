from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from loracompose.composers import compose
from loracompose.composers.ties import Ties
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


def trimmed(adapter, density):
    """Every update of an adapter with the smallest entries of the whole adapter set to 0, by sorting them all."""
    everything = torch.cat([update(adapter, m).flatten() for m in adapter.factors]).abs().sort(descending=True).values
    threshold = everything[math.ceil(density * len(everything)) - 1]
    return {m: torch.where(update(adapter, m).abs() < threshold, 0.0, update(adapter, m)) for m in SHAPES}


def oracle(adapters, weights, density, scale=1.0):
    """TIES entry by entry, in Python numbers."""
    thin = [trimmed(a, density) for a in adapters]
    mass = sum(abs(w) for w in weights)
    merged = {}
    for module, (d_in, d_out) in SHAPES.items():
        out = torch.zeros(d_out, d_in, dtype=torch.float64)
        for row in range(d_out):
            for column in range(d_in):
                votes = [(w * t[module][row, column].item(), abs(w)) for w, t in zip(weights, thin, strict=True)]
                total = sum(vote for vote, _ in votes)
                agree = [(vote, w) for vote, w in votes if vote * total > 0]
                if agree:
                    out[row, column] = scale * mass * sum(v for v, _ in agree) / sum(w for _, w in agree)
        merged[module] = out
    return merged


@pytest.mark.parametrize("block_bytes", [1, 500, 1 << 20])
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
@pytest.mark.parametrize("weights", [WEIGHTS, [1 / 3] * 3])
def test_it_trims_elects_and_averages_in_update_space(density, weights, block_bytes):
    pool = hostile_pool()
    want = oracle(pool, weights, density, scale=1.5)
    merged = compose(pool, weights, Ties(density, scale=1.5, rank=ALL, block_bytes=block_bytes))
    assert all(close(update(merged, m), want[m], 1e-12) for m in SHAPES)


def test_uniform_weights_are_the_disjoint_mean_of_the_paper():
    pool = [random_adapter("a", 2, seed=1), random_adapter("b", 2, seed=2)]
    merged = compose(pool, None, Ties(density=1.0, rank=ALL))
    one, two = (update(a, "q") for a in pool)
    sign = (one + two).sign()
    count = (one.sign() == sign).double() + (two.sign() == sign).double()
    want = (one * (one.sign() == sign) + two * (two.sign() == sign)) / count
    assert close(update(merged, "q"), want, 1e-12)


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_the_result_is_compressed_close_to_the_best_of_its_rank(rank, block_bytes):
    pool = hostile_pool()
    want = oracle(pool, WEIGHTS, 0.2)
    merged = compose(pool, WEIGHTS, Ties(rank=rank, block_bytes=block_bytes))
    for module in SHAPES:
        tail = torch.linalg.svdvals(want[module])[rank:]
        assert merged.factors[module].rank == rank
        assert (update(merged, module) - want[module]).norm() <= tail.norm() * 1.001 + 1e-12


def test_the_default_rank_is_the_sum_of_the_ranks_of_the_members():
    merged = compose(hostile_pool(), WEIGHTS, "ties")
    assert {m: f.rank for m, f in merged.factors.items()} == {"q": 9, "k": 5, "v": 5, "o": 6}


def test_one_adapter_at_density_one_is_itself_and_at_a_lower_density_is_not():
    adapter = hostile_pool()[1]
    assert same_updates(compose([adapter], [1.0], Ties(density=1.0)), adapter)
    assert not same_updates(compose([adapter], [1.0], Ties()), adapter, 0.01)


def test_at_density_one_it_is_still_not_the_weighted_sum_of_several():
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Ties(density=1.0, rank=ALL))
    assert not close(update(merged, "q"), weighted_sum(pool, WEIGHTS, "q"), 0.01)


def test_an_adapter_and_its_negative_leave_nothing():
    adapter = random_adapter("a", 2, seed=1)
    assert all((update(compose([adapter, adapter], [1.0, -1.0], "ties"), m) == 0).all() for m in SHAPES)


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
def test_the_order_of_adapters_is_irrelevant(order):
    pool = hostile_pool()
    other = compose([pool[i] for i in order], [WEIGHTS[i] for i in order], "ties")
    assert same_updates(compose(pool, WEIGHTS, "ties"), other)


def test_the_factorisation_of_the_members_is_irrelevant():
    pool = hostile_pool()
    assert same_updates(
        compose(pool, WEIGHTS, Ties(rank=3)), compose([regauged(a) for a in pool], WEIGHTS, Ties(rank=3)), 1e-8
    )


def test_an_adapter_given_twice_is_the_adapter_at_twice_the_weight():
    pool = hostile_pool()
    twice = compose([*pool, pool[0]], [0.2, *WEIGHTS[1:], 0.3], Ties(rank=ALL))
    assert same_updates(twice, compose(pool, WEIGHTS, Ties(rank=ALL)))


def test_zero_adapters_vote_for_nothing_but_count_in_the_mass():
    pool = hostile_pool()
    with_zero = compose([*pool, zero_adapter()], [*WEIGHTS, 1.6], Ties(rank=ALL))
    doubled = oracle(pool, WEIGHTS, 0.2, scale=2.0)
    assert all(close(update(with_zero, m), doubled[m], 1e-12) for m in SHAPES)


def test_float32_and_bfloat16_members_are_merged_in_float32():
    pool = [a.to(dtype=torch.bfloat16) for a in hostile_pool()]
    exact = [a.to(dtype=torch.float64) for a in pool]
    merged = compose(pool, WEIGHTS, Ties(rank=ALL)).to(dtype=torch.float64)
    want = compose(exact, WEIGHTS, Ties(rank=ALL))
    assert all(close(update(merged, m), update(want, m), 0.005) for m in SHAPES)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"density": 1.5}, r"density must be in \(0, 1\], got 1.5"),
        ({"scale": math.inf}, "scale must be a finite number, got inf"),
        ({"rank": 0}, "rank must be an integer of at least 1 or None, got 0"),
        ({"block_bytes": 0}, "block_bytes must be an integer of at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Ties(**setting)
