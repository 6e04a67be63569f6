"""Composing with a memory: a set of adapters that was composed before is not composed again."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loracompose.composers.base import CanonicalComposer, Composer, RowComposer, side_by_side, unique_rows
from loracompose.composition.bank import RankBank, select_banks
from loracompose.composition.cache import Composed, CompositionCache
from loracompose.composition.canonical import banks_of, canonical_factors, parts_of
from loracompose.composition.delta import LowRankDelta


@dataclass(frozen=True, eq=False)
class Composition:
    """The deltas of a batch, and which of its rows were composed earlier.

    Attributes:
        deltas: module path -> delta, as `Composer.compose` gives them.
        recalled: for each row, whether what runs for it was taken from the cache.
    """

    deltas: Mapping[str, LowRankDelta]
    recalled: tuple[bool, ...]


def row_wise(composer: Composer) -> bool:
    """Whether what a composer makes of one row depends on that row alone, so that it can be kept."""
    return isinstance(composer, RowComposer) and composer.row_wise


def compose_batch(
    composer: Composer,
    banks: Mapping[str, RankBank],
    weights: Tensor,
    cache: CompositionCache,
    known: Sequence[bool],
) -> Composition:
    """What `composer.compose` gives, bit for bit; rows of known adapters through the cache.

    A composer that rewrites the ranks of a row keeps what it made of each set, one of singular directions those of each
    adapter. Composers that only weigh or gate ranks keep nothing: the ranks themselves are what they run, and the
    store of adapters keeps those. Stacking them copies each adapter of the batch once, as many bytes as a few decoding
    steps read.

    Args:
        composer: how to compose.
        banks: module path -> ranks of the K adapters, at least one module.
        weights: (batch, K).
        cache: of composed sets.
        known: for each of the K adapters, whether its fingerprint is that of its content; rows with others are
            composed anew.
    """
    if isinstance(composer, CanonicalComposer) and composer.canonical:
        return _compose_canonical(composer, banks, weights, cache, known)
    if not (isinstance(composer, RowComposer) and composer.row_wise):
        return Composition(composer.compose(banks, weights), (False,) * len(weights))
    distinct, row_of = unique_rows(weights)
    composed: list[Composed] = []
    recalled: list[bool] = []
    for row in distinct:
        members = row.nonzero().flatten().tolist()
        made, again = _recall(composer, banks, row[members], members, cache if all(known[i] for i in members) else None)
        composed.append(made)
        recalled.append(again)
    return Composition(side_by_side(banks, composed, row_of), tuple(recalled[i] for i in row_of.tolist()))


def _compose_canonical(
    composer: CanonicalComposer,
    banks: Mapping[str, RankBank],
    weights: Tensor,
    cache: CompositionCache,
    known: Sequence[bool],
) -> Composition:
    fingerprints = next(iter(banks.values())).fingerprints
    made: list[tuple[Composed, bool]] = []
    asked: dict[Hashable, tuple[Composed, bool]] = {}  # twins are asked for once: the second was not kept from earlier
    for i, (fingerprint, trusted) in enumerate(zip(fingerprints, known, strict=True)):
        parts = parts_of(banks, i)
        key = ("canonical", fingerprint, tuple((m, p.A.dtype, p.B.dtype, p.A.device) for m, p in parts.items()))
        compose = partial(canonical_factors, parts)
        if trusted and key not in asked:
            asked[key] = cache.recall(key, compose)
        made.append(asked[key] if trusted else (compose(), False))
    deltas = composer.compose_canonical(banks_of(banks, [factors for factors, _ in made]), weights)
    member = (weights != 0).cpu()  # (batch, K)
    anew = torch.tensor([not again for _, again in made])
    recalled = member.any(dim=1) & ~(member & anew).any(dim=1)
    return Composition(deltas, tuple(recalled.tolist()))


def _recall(
    composer: RowComposer,
    banks: Mapping[str, RankBank],
    weights: Tensor,
    members: Sequence[int],
    cache: CompositionCache | None,
) -> tuple[Composed, bool]:
    def compose() -> Composed:
        return composer.compose_row(select_banks(banks, members), weights)

    if not members:
        return {}, False
    if cache is None:
        return compose(), False
    return cache.recall(identity(composer, banks, weights, members), compose)


def identity(composer: Composer, banks: Mapping[str, RankBank], weights: Tensor, members: Sequence[int]) -> Hashable:
    """What decides the composition of one row: method with its settings, contents, weights, modules, dtype, device."""
    parts = {
        module: tuple((p.A.dtype, p.B.dtype, p.A.device) if (p := bank.parts[i]) is not None else None for i in members)
        for module, bank in banks.items()
    }
    modules = tuple((module, own) for module, own in parts.items() if any(own))
    fingerprints = next(iter(banks.values())).fingerprints
    contents = tuple(fingerprints[i] for i in members)
    return composer, contents, weights.dtype, tuple(weights.tolist()), modules
