from __future__ import annotations

import math
from itertools import permutations

import pytest
import torch

from loracompose.composers import compose
from loracompose.composers.knots import Knots
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


def dense_coordinates(adapters, weights, module):
    """U and each member's Σ V_iᵀ from the SVD of the dense updates side by side."""
    members = [i for i, a in enumerate(adapters) if module in a.factors]
    M = torch.cat([weights[i] * update(adapters[i], module) for i in members], dim=1)
    U, S, Vt = torch.linalg.svd(M, full_matrices=False)
    q = int((S > 1e-10 * S[0]).sum())
    parts = (S[:q, None] * Vt[:q]).split(SHAPES[module][0], dim=1)
    return U[:, :q], dict(zip(members, parts, strict=True))


def oracle(adapters, weights, density, scale=1.0):
    """KnOTS-TIES from dense SVDs, entry by entry."""
    bases = {m: dense_coordinates(adapters, weights, m) for m in SHAPES}
    thresholds = []
    for i in range(len(adapters)):
        own = [parts[i].flatten() for _, parts in bases.values() if i in parts]
        sizes = torch.cat(own).abs().sort(descending=True).values
        thresholds.append(sizes[math.ceil(density * len(sizes)) - 1] * (1 - 1e-9))
    mass, merged = sum(abs(w) for w in weights), {}
    for module, (U, parts) in bases.items():
        out = torch.zeros(U.shape[1], SHAPES[module][0], dtype=torch.float64)
        for row in range(out.shape[0]):
            for column in range(out.shape[1]):
                votes = [(p[row, column].item(), abs(weights[i])) for i, p in parts.items()]
                limits = [thresholds[i] for i in parts]
                votes = [(v, w) for (v, w), limit in zip(votes, limits, strict=True) if abs(v) >= limit]
                total = sum(v for v, _ in votes)
                agree = [(v, w) for v, w in votes if v * total > 0]
                if agree:
                    out[row, column] = scale * mass * sum(v for v, _ in agree) / sum(w for _, w in agree)
        merged[module] = U @ out
    return merged


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("weights", [WEIGHTS, [1 / 3] * 3])
def test_it_merges_the_coordinates_in_the_shared_basis(density, weights):
    pool = hostile_pool()
    want = oracle(pool, weights, density, scale=0.7)
    merged = compose(pool, weights, Knots(density, scale=0.7))
    assert all(close(update(merged, m), want[m]) for m in SHAPES)


def test_a_sum_in_the_shared_basis_is_the_exact_weighted_sum():
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Knots(merge="sum"))
    assert all(close(update(merged, m), weighted_sum(pool, WEIGHTS, m), 1e-12) for m in SHAPES)
    scaled = compose(pool, WEIGHTS, Knots(merge="sum", scale=3.0))
    assert all(close(update(scaled, m), 3 * update(merged, m)) for m in SHAPES)


def test_one_adapter_at_density_one_is_itself_and_several_are_not_their_sum():
    pool = hostile_pool()
    assert same_updates(compose(pool[1:2], [1.0], Knots(density=1.0)), pool[1])
    assert not same_updates(compose(pool[1:2], [1.0], Knots()), pool[1], 0.01)
    assert compose(pool, WEIGHTS, Knots(density=1.0)).recipe["relative_error"] > 0.01


def test_the_result_has_no_more_ranks_than_the_members_together_or_than_the_output_is_wide():
    merged = compose(hostile_pool(), WEIGHTS, "knots")
    assert {m: f.rank for m, f in merged.factors.items()} == {"q": 9, "k": 5, "v": 5, "o": 6}
    many = [random_adapter(str(i), 4, seed=i) for i in range(4)]
    assert compose(many, None, "knots").factors["q"].rank == 9


def test_ranks_that_repeat_a_direction_are_dropped():
    adapter = random_adapter("a", 3, seed=1)
    assert {f.rank for f in compose([adapter, adapter], None, "knots").factors.values()} == {3}


def test_a_tolerance_drops_the_small_singular_values():
    adapter = random_adapter("a", 4, seed=1)
    merged = compose([adapter], [1.0], Knots(merge="sum", tolerance=0.5))
    S = torch.linalg.svdvals(update(adapter, "q"))
    assert merged.factors["q"].rank == int((S > 0.5 * S[0]).sum()) < 4


def test_dare_thins_the_coordinates_before_ties():
    adapter, drop = random_adapter("a", 3, seed=1, modules=("q",)), 0.4
    merged = compose([adapter], [1.0], Knots(1.0, merge="dare_ties", drop=drop))
    U, parts = dense_coordinates([adapter], [1.0], "q")
    kept = torch.rand(3, 12, generator=mask_stream(adapter.fingerprint, "q", 0)) >= drop
    assert close(update(merged, "q"), U @ (parts[0] * kept / (1 - drop)))
    whole = compose([adapter], [1.0], Knots(1.0, merge="dare_ties", drop=0.0))
    assert same_updates(whole, adapter)
    assert not same_updates(merged, compose([adapter], [1.0], Knots(1.0, merge="dare_ties", drop=drop, seed=1)), 0.01)


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
def test_the_order_of_adapters_is_irrelevant(order):
    pool = hostile_pool()
    other = compose([pool[i] for i in order], [WEIGHTS[i] for i in order], "knots")
    assert same_updates(compose(pool, WEIGHTS, "knots"), other)


def test_the_factorisation_of_the_members_is_irrelevant():
    pool = hostile_pool()
    assert same_updates(
        compose(pool, WEIGHTS, Knots(0.5)), compose([regauged(a) for a in pool], WEIGHTS, Knots(0.5)), 1e-8
    )


def test_zero_adapters_come_to_nothing_and_beside_others_count_in_the_mass_only():
    assert all((update(compose([zero_adapter()], None, "knots"), m) == 0).all() for m in SHAPES)
    pool = hostile_pool()
    with_zero = compose([*pool, zero_adapter()], [*WEIGHTS, 1.6], Knots(scale=0.5))
    assert same_updates(with_zero, compose(pool, WEIGHTS, "knots"))


def test_an_adapter_given_twice_adds_no_ranks():
    pool = hostile_pool()
    twice = compose([*pool, pool[0]], [0.2, *WEIGHTS[1:], 0.3], Knots(density=1.0))
    once = compose(pool, WEIGHTS, Knots(density=1.0))
    assert twice.factors["q"].rank == once.factors["q"].rank


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"merge": "mean"}, "merge must be 'ties', 'dare_ties' or 'sum', got 'mean'"),
        ({"tolerance": 1.0}, r"tolerance must be in \[0, 1\) or None, got 1.0"),
        ({"density": 0.0}, r"density must be in \(0, 1\], got 0.0"),
        ({"drop": 1.0}, r"drop must be in \[0, 1\), got 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Knots(**setting)
