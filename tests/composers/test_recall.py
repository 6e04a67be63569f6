"""Recalled compositions: bit for bit those that are composed anew, and known by all that decides them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from loracompose.composers import COMPOSERS
from loracompose.composers.base import Pool, RowWise
from loracompose.composers.lego import Lego
from loracompose.composers.lorahub import LoraHub
from loracompose.composers.mixture import Mixture
from loracompose.composers.rank_gating import RankGating
from loracompose.composers.recall import compose_batch, identity, row_wise
from loracompose.composers.smora import Smora
from loracompose.composition.bank import RankBank, content_order, gather_banks
from loracompose.composition.cache import CompositionCache
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from tests.laws import hostile_adapters

ROW_WISE = ("dare", "dare_ties", "fusion", "knots", "lego", "linear", "lorahub", "magnitude_prune", "ties")
KNOWN = (True,) * 4


def banks(dtype: torch.dtype = torch.float32) -> dict[str, RankBank]:
    adapters = [adapter.to(dtype=dtype) for adapter in hostile_adapters()[:4]]
    return gather_banks([adapters[i] for i in content_order(adapters)])


# two equal rows, a row that repeats in both batches, a row of nobody, and one adapter alone
FIRST = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0] * 4, [0.3, 0.0, -0.2, 0.4]])
SECOND = torch.tensor([[0.0, 1.0, 0.0, 0.0], [0.3, 0.0, -0.2, 0.4], [0.5, 0.5, 0.0, 0.0]])


def test_these_composers_rewrite_row_by_row_and_no_others():
    instances = {name: kind() for name, kind in COMPOSERS.items() if not hasattr(kind, "initial")}
    assert tuple(sorted(name for name, composer in instances.items() if row_wise(composer))) == ROW_WISE
    assert not any(issubclass(kind, RowWise) for kind in COMPOSERS.values() if hasattr(kind, "initial"))
    assert not row_wise(LoraHub(exact_sum=True))


def assert_equal(got: Mapping[str, LowRankDelta], want: Mapping[str, LowRankDelta]) -> None:
    """The same deltas, bit for bit."""
    assert list(got) == list(want)
    for module, delta in want.items():
        for side in ("A", "B", "weights"):
            assert torch.equal(getattr(got[module], side), getattr(delta, side))


@pytest.mark.parametrize("composer", ROW_WISE)
def test_what_comes_from_the_cache_equals_what_is_composed_anew_bit_for_bit(composer):
    made, cache = COMPOSERS[composer](), CompositionCache()
    together = banks()
    for weights in (FIRST, SECOND, FIRST):
        got, want = compose_batch(made, together, weights, cache, KNOWN).deltas, made.compose(together, weights)
        assert_equal(got, want)
    assert (cache.stats.misses, cache.stats.hits) == (3, 4)


def test_each_row_says_whether_it_was_composed_earlier():
    cache = CompositionCache()
    assert compose_batch(Lego(), banks(), FIRST, cache, KNOWN).recalled == (False, False, False, False)
    assert compose_batch(Lego(), banks(), SECOND, cache, KNOWN).recalled == (False, True, True)
    assert compose_batch(Mixture(), banks(), SECOND, cache, KNOWN).recalled == (False, False, False)


def test_company_does_not_decide_what_a_row_is_known_by():
    cache = CompositionCache()
    some = {module: bank.select([1, 3]) for module, bank in banks().items()}
    weights = torch.tensor([[0.5, 0.5]])
    compose_batch(Lego(), {m: b for m, b in some.items() if b is not None}, weights, cache, (True, True))
    among_others = torch.tensor([[0.0, 0.5, 0.0, 0.5]])
    assert compose_batch(Lego(), banks(), among_others, cache, KNOWN).recalled == (True,)


def test_rows_of_adapters_whose_content_is_only_claimed_are_composed_anew():
    cache = CompositionCache()
    for _ in range(2):
        made = compose_batch(Lego(), banks(), SECOND, cache, (True, True, False, True))
        assert made.recalled[1] is False
    assert cache.stats.misses == 2


def smora() -> Smora:
    pool = Pool("base", 32, tuple("abcd"), banks())
    return Smora(Smora.initial(pool, 0, {}))


@pytest.mark.parametrize("make", [RankGating, smora])
def test_singular_directions_are_kept_adapter_by_adapter_whatever_their_set_and_gate(make):
    cache, x = CompositionCache(), torch.randn(4, 3, 32, generator=torch.Generator().manual_seed(0))
    composer, together = make(), banks()
    for weights, misses in ((FIRST, 4), (SECOND, 4)):
        got, want = compose_batch(composer, together, weights, cache, KNOWN).deltas, composer.compose(together, weights)
        assert_equal(got, want)
        for module, delta in want.items():
            if delta.kind == "linear" and delta.A.shape[1] == 32:
                given = x[: len(weights)]
                assert torch.equal(got[module](given, GateContext(module)), delta(given, GateContext(module)))
        assert cache.stats.misses == misses
    others = {m: b for m, bank in together.items() if (b := bank.select([2, 0])) is not None}
    made = compose_batch(RankGating(m=2), others, torch.tensor([[0.5, 0.0], [0.0, 0.0]]), cache, (True, True))
    assert made.recalled == (True, False)
    assert cache.stats.misses == 4


def test_singular_directions_of_content_that_is_only_claimed_are_not_kept():
    cache = CompositionCache()
    compose_batch(RankGating(), banks(), FIRST, cache, (True, False, True, True))
    made = compose_batch(RankGating(), banks(), SECOND, cache, (True, False, True, True))
    assert made.recalled == (False, True, False)
    assert cache.stats.entries == 3


def test_the_twin_of_an_adapter_of_this_batch_was_not_kept_from_an_earlier_one():
    cache, alike = CompositionCache(), banks()
    twins = {m: replace(b, parts=(b.parts[0],) * 4, fingerprints=(b.fingerprints[0],) * 4) for m, b in alike.items()}
    twins = {m: b for m, b in twins.items() if b.parts[0] is not None}
    assert compose_batch(RankGating(), twins, torch.eye(4), cache, KNOWN).recalled == (False,) * 4
    assert compose_batch(RankGating(), twins, torch.eye(4), cache, KNOWN).recalled == (True,) * 4


def test_singular_directions_are_known_by_dtype_and_modules_too():
    cache = CompositionCache()
    compose_batch(RankGating(), banks(), FIRST, cache, KNOWN)
    fewer = dict(list(banks().items())[:1])
    for other in (banks(torch.float64), fewer):
        made = compose_batch(RankGating(), other, FIRST, cache, KNOWN)
        assert set(made.deltas) == set(other)
        assert not any(made.recalled[i] for i in (0, 1, 3))


def test_everything_that_decides_a_composition_decides_its_key():
    w, members = torch.tensor([0.5, 0.5]), [0, 1]
    key = identity(Lego(), banks(), w, members)
    assert identity(Lego(), banks(), w.clone(), members) == key
    fewer = dict(list(banks().items())[:-1])
    strange = {m: replace(b, fingerprints=("x", *b.fingerprints[1:])) for m, b in banks().items()}
    others: list[Any] = [
        identity(Lego(k=3), banks(), w, members),
        identity(replace(Lego(), seed=1), banks(), w, members),
        identity(OtherLego(), banks(), w, members),
        identity(Lego(), banks(), torch.tensor([0.5, 0.25]), members),
        identity(Lego(), banks(), w, [0, 2]),
        identity(Lego(), banks(torch.float64), w, members),
        identity(Lego(), fewer, w, members),
        identity(Lego(), strange, w, members),
    ]
    assert key not in others
    assert len(set(others)) == len(others)


@dataclass(frozen=True)
class OtherLego(Lego):
    """The fields of Lego in another class."""
