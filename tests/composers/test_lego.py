from __future__ import annotations

from itertools import permutations

import pytest
import torch

from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.composers import compose
from loracompose.composers.lego import Lego
from loracompose.composition.bank import gather_banks
from tests.composers.pool import (
    SHAPES,
    close,
    halves,
    hostile_pool,
    permuted,
    random_adapter,
    regauged,
    same_updates,
    update,
    weighted_sum,
    zero_adapter,
)

WEIGHTS = [0.5, 0.7, -0.4]
ROOMY = Lego(k=10**6, output_reweighting=False)
PLAIN = Lego(k=3, parameter_reweighting=False, output_reweighting=False)
KINDS = [0, 1, 2, 0, 1, 2, 2]  # the prototype of each rank of the pool of `clustered`
OWNERS = [0, 0, 1, 1, 1, 2, 2]


def clustered(module="q"):
    """Three adapters whose seven ranks are noisy copies, some turned round, of three far prototypes."""
    generator = torch.Generator().manual_seed(7)
    d_in, d_out = SHAPES[module]
    prototypes = 10 * torch.randn(3, d_in + d_out, generator=generator, dtype=torch.float64)
    prototypes[:, :2] = torch.tensor([40.0, -40.0])  # noise decides which is the largest entry, and so the own sign
    noise = torch.randn(7, d_in + d_out, generator=generator, dtype=torch.float64)
    turn = torch.tensor([1, -1, 1, -1, 1, 1, -1.0], dtype=torch.float64)[:, None]
    units = turn * (prototypes[KINDS] + noise)
    adapters = []
    for i in range(3):
        own = units[[j for j, owner in enumerate(OWNERS) if owner == i]]
        adapters.append(Adapter(f"a{i}", {module: LoraFactors(own[:, :d_in], own[:, d_in:].T.contiguous())}))
    return adapters, units * turn


def oracle(units, shares, d_in, *, parameter=False, factor=1.0, counts=None):
    """Σ_j count_j b̄_j ā_j over the three prototypes, written as loops."""
    total = torch.zeros(units.shape[1] - d_in, d_in, dtype=torch.float64)
    for j in range(3):
        members = [i for i, kind in enumerate(KINDS) if kind == j]
        mass = sum(shares[i] for i in members)
        centroid = sum(shares[i] * units[i] for i in members) / mass
        if parameter:
            centroid = centroid * sum(shares[i] * units[i].abs().max() for i in members) / mass / centroid.abs().max()
        total += (mass if counts is None else counts) * torch.outer(centroid[d_in:], centroid[:d_in])
    return factor * total


def test_a_cluster_adds_its_mass_times_the_product_of_its_weighted_means():
    adapters, units = clustered()
    weights = [0.5, 0.2, 0.9]
    want = oracle(units, [weights[i] for i in OWNERS], 12)
    assert close(update(compose(adapters, weights, PLAIN), "q"), want)


def test_parameter_reweighting_scales_centroids_to_the_mean_largest_entry_of_their_units():
    adapters, units = clustered()
    weights = [0.5, 0.2, 0.9]
    shares = [weights[i] for i in OWNERS]
    merged = update(compose(adapters, weights, Lego(k=3, output_reweighting=False)), "q")
    assert close(merged, oracle(units, shares, 12, parameter=True))
    assert not close(merged, oracle(units, shares, 12), 1e-3)


def test_output_reweighting_is_a_factor_of_the_root_of_mean_rank_over_k():
    adapters, _ = clustered()
    weights = [0.5, 0.2, 0.9]
    for k in (1, 2, 3, 5):
        plain = update(compose(adapters, weights, Lego(k=k, output_reweighting=False)), "q")
        scaled = update(compose(adapters, weights, Lego(k=k, output_reweighting=True)), "q")
        assert close(scaled, (7 / 3 / k) ** 0.5 * plain)


def test_output_reweighting_counts_the_clusters_made_not_those_asked_for():
    adapters, _ = clustered()
    seven, many = (Lego(k=k, output_reweighting=True) for k in (7, 100))
    assert same_updates(compose(adapters, None, seven), compose(adapters, None, many))


def test_output_reweighting_goes_with_clusters_that_count_once_unless_said_otherwise():
    adapters, _ = clustered()
    for kind, default in (("unit", True), ("mass", False)):
        said, other = (Lego(k=5, cluster_weight=kind, output_reweighting=use) for use in (default, not default))
        merged = compose(adapters, None, Lego(k=5, cluster_weight=kind))
        assert same_updates(merged, compose(adapters, None, said))
        assert not same_updates(merged, compose(adapters, None, other))


def test_a_member_of_vanishing_weight_and_another_rank_leaves_the_update_as_it_is():
    strong, weak = random_adapter("strong", 8, seed=1), random_adapter("weak", 2, seed=2)
    merged, alone = compose([strong, weak], [1.0, 1e-6], "lego"), compose([strong], [1.0], "lego")
    assert all(close(update(merged, m), update(alone, m), 1e-3) for m in SHAPES)


def test_unit_clusters_count_once_and_take_weights_relative_to_their_mean():
    adapters, units = clustered()
    setting = Lego(k=3, parameter_reweighting=False, output_reweighting=False, cluster_weight="unit")
    for size in (1 / 3, 1.0, 20.0):  # uniform weights of any size are the paper's case
        got = update(compose(adapters, [size] * 3, setting), "q")
        assert close(got, oracle(units, [1.0] * 7, 12, counts=1.0))
    scaled = units.clone()
    scaled[:, 12:] *= torch.tensor([[1.5, 0.9, 0.6][i] for i in OWNERS], dtype=torch.float64)[:, None]
    assert close(update(compose(adapters, [0.5, 0.3, 0.2], setting), "q"), oracle(scaled, [1.0] * 7, 12, counts=1.0))


def test_normalised_units_cluster_by_direction_and_average_as_they_are():
    adapters, units = clustered()
    stretch = torch.tensor([1, 30, 0.1, 4, 0.02, 9, 1.0], dtype=torch.float64)[:, None]
    stretched, start = [], 0
    for adapter in adapters:  # every rank is as far from its prototype in norm as from the others
        f = adapter.factors["q"]
        own = stretch[start : start + f.rank]
        stretched.append(Adapter(adapter.name, {"q": LoraFactors(own * f.A, f.B * own.T)}))
        start += f.rank
    setting = Lego(k=3, units="normalised", parameter_reweighting=False, output_reweighting=False)
    want = oracle(stretch * units, [1 / 3] * 7, 12)
    assert close(update(compose(stretched, None, setting), "q"), want)
    assert not close(update(compose(stretched, None, PLAIN), "q"), want, 0.1)


@pytest.mark.parametrize("weights", [WEIGHTS, [1 / 3] * 3, [-2.0, 0.1, 5.0]])
@pytest.mark.parametrize("units", ["raw", "normalised", "canonical"])
def test_with_a_cluster_for_every_unit_it_is_the_exact_weighted_sum(weights, units):
    pool = hostile_pool()
    merged = compose(pool, weights, Lego(k=9, units=units, output_reweighting=False))
    assert all(close(update(merged, m), weighted_sum(pool, weights, m)) for m in SHAPES)


def test_at_a_tight_k_it_is_not_the_weighted_sum():
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Lego(k=2, output_reweighting=False))
    assert merged.recipe["relative_error"] > 0.01


@pytest.mark.parametrize("units", ["raw", "normalised", "canonical"])
@pytest.mark.parametrize("k", [None, 2, 5])
def test_the_order_of_ranks_within_an_adapter_is_irrelevant(units, k):
    pool = hostile_pool()
    setting = Lego(k=k, units=units)
    assert same_updates(compose(pool, WEIGHTS, setting), compose([permuted(a) for a in pool], WEIGHTS, setting), 1e-8)


@pytest.mark.parametrize("order", list(permutations(range(3)))[1:])
def test_the_order_of_adapters_is_irrelevant(order):
    pool = hostile_pool()
    merged = compose(pool, WEIGHTS, Lego(k=3))
    other = compose([pool[i] for i in order], [WEIGHTS[i] for i in order], Lego(k=3))
    assert same_updates(merged, other)


@pytest.mark.parametrize("k", [3, 10**6])
def test_an_adapter_split_in_two_by_ranks_composes_as_the_whole(k):
    whole, other = random_adapter("whole", 4, seed=1), random_adapter("other", 3, seed=2)
    setting = Lego(k=k)
    split = compose([*halves(whole), other], [0.7, 0.7, 0.3], setting)
    assert same_updates(compose([whole, other], [0.7, 0.3], setting), split)
    alone = compose(halves(whole), [1.0, 1.0], ROOMY)
    assert same_updates(alone, whole)


def test_turning_ranks_round_changes_nothing():
    pool = hostile_pool()
    turned = [Adapter(a.name, {m: LoraFactors(-f.A, -f.B) for m, f in a.factors.items()}) for a in pool[:2]]
    assert same_updates(compose(pool, WEIGHTS, Lego(k=3)), compose([*turned, pool[2]], WEIGHTS, Lego(k=3)))


def test_turning_one_of_several_orthogonal_ranks_round_changes_nothing():
    # both signs are equally near to any mean of the others: only a sign of its own decides
    generator = torch.Generator().manual_seed(0)
    A = torch.linalg.qr(torch.randn(12, 4, generator=generator, dtype=torch.float64)).Q.T
    B = torch.linalg.qr(torch.randn(9, 4, generator=generator, dtype=torch.float64)).Q
    turn = torch.tensor([1, -1, 1, -1.0], dtype=torch.float64)
    plain = Adapter("plain", {"q": LoraFactors(A, B)})
    turned = Adapter("turned", {"q": LoraFactors(turn[:, None] * A, B * turn)})
    assert same_updates(compose([plain], [1.0], Lego(k=1)), compose([turned], [1.0], Lego(k=1)))


def test_one_adapter_is_itself_by_default_and_pruned_to_k_ranks_below_its_rank():
    adapter = random_adapter("four", 4, seed=3)
    assert same_updates(compose([adapter], [1.0], "lego"), adapter)
    pruned = compose([adapter], [1.0], Lego(k=2))
    assert {f.rank for f in pruned.factors.values()} == {2}
    assert pruned.recipe["relative_error"] > 0.1


def test_pruning_joins_ranks_that_are_alike():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 12, generator=generator).double(), torch.randn(9, 2, generator=generator).double()
    doubled = Adapter("doubled", {"q": LoraFactors(torch.cat([a, -a]), torch.cat([b, -b], dim=1))})
    pruned = compose([doubled], [1.0], Lego(k=2, output_reweighting=False))
    assert close(update(pruned, "q"), 2 * b @ a)


def test_an_adapter_given_twice_is_the_adapter_at_twice_the_weight():
    adapter, other = random_adapter("a", 3, seed=1), random_adapter("b", 3, seed=2)
    for setting in (ROOMY, Lego(k=3, output_reweighting=False)):
        twice = compose([adapter, adapter, other], [0.25, 0.25, 0.5], setting)
        assert same_updates(twice, compose([adapter, other], [0.5, 0.5], setting))


def test_zero_adapters_give_finite_results():
    pool = hostile_pool()
    assert same_updates(compose([*pool, zero_adapter()], [*WEIGHTS, 1.0], ROOMY), compose(pool, WEIGHTS, ROOMY))
    for setting in (Lego(), Lego(units="normalised"), Lego(units="canonical"), Lego(k=2)):
        assert all(torch.isfinite(update(compose([zero_adapter(), pool[0]], None, setting), m)).all() for m in SHAPES)
        assert all((update(compose([zero_adapter()], None, setting), m) == 0).all() for m in SHAPES)


def test_the_default_k_is_the_largest_rank_among_the_members_of_each_module():
    merged = compose(hostile_pool(), WEIGHTS, "lego")
    assert {m: f.rank for m, f in merged.factors.items()} == {"q": 4, "k": 3, "v": 3, "o": 4}


def test_canonical_units_do_not_depend_on_the_factorisation_and_raw_ones_do():
    pool = hostile_pool()
    gauged = [regauged(a) for a in pool]
    canonical, raw = Lego(k=3, units="canonical"), Lego(k=3)
    assert same_updates(compose(pool, WEIGHTS, canonical), compose(gauged, WEIGHTS, canonical), 1e-8)
    assert not same_updates(compose(pool, WEIGHTS, raw), compose(gauged, WEIGHTS, raw), 0.01)
    assert not Lego.gauge_invariant


def test_the_clusters_it_shows_are_those_it_averages_in_the_order_of_the_bank():
    adapters, _ = clustered()
    banks = gather_banks([zero_adapter(), *adapters])
    (found,) = PLAIN.clusters(banks, torch.tensor([0.0, 0.5, 0.7, 0.4], dtype=torch.float64)).values()
    assert found.owner.tolist() == [1 + owner for owner in OWNERS]  # the adapter of weight 0 is no member
    same = found.labels[:, None] == found.labels
    assert torch.equal(same, torch.tensor(KINDS)[:, None] == torch.tensor(KINDS))


def test_modules_in_one_batch_compose_as_they_would_alone():
    pool = [random_adapter("a", 2, seed=1), random_adapter("b", 3, seed=2)]  # q, k and o are stacked
    together = compose(pool, None, Lego(k=2))
    for module in SHAPES:
        alone = [Adapter(a.name, {module: a.factors[module]}) for a in pool]
        assert close(update(compose(alone, None, Lego(k=2)), module), update(together, module))


def test_a_seed_gives_the_same_composition_again_and_leaves_the_global_state_alone():
    pool = [random_adapter(str(i), 4, seed=i) for i in range(4)]
    state = torch.random.get_rng_state()
    once, again = compose(pool, None, Lego(k=3, n_init=1)), compose(pool, None, Lego(k=3, n_init=1))
    assert all(torch.equal(once.factors[m].A, again.factors[m].A) for m in SHAPES)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not same_updates(once, compose(pool, None, Lego(k=3, n_init=1, max_iter=1, seed=5)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"k": 0}, "k must be an integer of at least 1 or None, got 0"),
        ({"units": "row"}, "units must be 'raw', 'normalised' or 'canonical', got 'row'"),
        ({"cluster_weight": "mean"}, "cluster_weight must be 'mass' or 'unit', got 'mean'"),
        ({"n_init": 0}, "n_init must be an integer of at least 1, got 0"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Lego(**setting)
