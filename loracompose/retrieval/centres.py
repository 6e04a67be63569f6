"""The centres of a pool: one for each kind of prompt that a card names, one for each adapter whose card names none.

Prompts of unlike kinds have a mean that is like none of them. So what compares prompts with adapters compares them
with kinds, and p(adapter | prompt) is the sum over the adapter's kinds, whose priors are their shares of its examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card

Floats = NDArray[np.float64]


class Sliceable(Protocol):
    """Something in the order of an adapter's examples: their texts, features or n-grams."""

    def __getitem__(self: Group, places: slice, /) -> Group: ...


Group = TypeVar("Group", bound=Sliceable)


@dataclass(frozen=True, eq=False)
class Centres:
    """The C centres of K adapters, those of one adapter side by side.

    `owner` (C,) is the adapter of each, ascending; `share` (C,) its part of the adapter's examples, in (0, 1];
    `kinds` its name, empty where it is the only one; `places` where its examples stand among the adapter's.
    """

    owner: NDArray[np.int64]
    share: Floats
    kinds: tuple[str, ...]
    places: tuple[slice, ...]

    @classmethod
    def of(cls, cards: Sequence[Card]) -> Centres:
        """One centre for each kind of each card.

        Raises:
            ValueError: the kinds of a card are not one for each example, kind after kind.
        """
        parts = [card.parts() for card in cards]
        flat = [part for group in parts for part in group]
        sizes = np.array([places.stop - places.start for _, places in flat], dtype=np.float64)
        owner = _repeated([len(group) for group in parts])
        totals = np.bincount(owner, sizes, minlength=len(cards))
        kinds, places = tuple(kind for kind, _ in flat), tuple(places for _, places in flat)
        return cls(owner, sizes / np.maximum(totals, 1.0)[owner], kinds, places)

    @classmethod
    def one_each(cls, count: int) -> Centres:
        """One centre for each of so many adapters, whatever their cards say."""
        return cls(_repeated([1] * count), np.ones(count), ("",) * count, (slice(None),) * count)

    @property
    def single(self) -> bool:
        """Whether every adapter has one centre."""
        return len(self.owner) == len(self._starts)

    def split(self, groups: Sequence[Group]) -> list[Group]:
        """What there is of the examples of each adapter, K groups, as one group for each centre."""
        if self.single:
            return list(groups)
        return [groups[row][places] for row, places in zip(self.owner.tolist(), self.places, strict=True)]

    def joined(self, fits: Floats) -> Floats:
        """How well prompts fit adapters, (batch, K), from how well they fit centres, (batch, C).

        The fit of an adapter is the logarithm of the sum, over its centres, of share times exp(fit). Where every
        adapter has one centre these are the fits themselves.
        """
        if self.single:
            return fits
        return np.asarray(np.logaddexp.reduceat(fits + np.log(self.share), self._starts, axis=1))

    def best(self, fits: Floats) -> NDArray[np.int64]:
        """The centre of each adapter that adds most to its joined fit, the first of equals, (K,), from fits (C,)."""
        order = np.lexsort((-np.arange(len(fits)), fits + np.log(self.share), self.owner))
        return order[np.append(self._starts[1:], len(fits)) - 1] if len(fits) else order

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """The first centre of each adapter, (K,)."""
        return np.flatnonzero(np.diff(self.owner, prepend=-1))


def _repeated(counts: Sequence[int]) -> NDArray[np.int64]:
    """Each place as often as its count says."""
    return np.repeat(np.arange(len(counts), dtype=np.int64), np.array(counts, dtype=np.int64))
