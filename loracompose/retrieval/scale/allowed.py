"""Which adapters of a large pool a search may find: filters, asked of few adapters first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.filtering import Where, allowed_rows
from loracompose.retrieval.scale.view import View

_CARDS = 512


class Allowed:
    """Which adapters pass the filter: asked of few at first, of all only where few do."""

    def __init__(self, view: View, catalog: Catalog, where: Where | None) -> None:
        self._view, self._catalog, self._where = view, catalog, where
        self._all: NDArray[np.int64] | None = None

    @property
    def everything(self) -> bool:
        """Whether there is no filter."""
        return self._where is None

    def among(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these row ids pass, as far as that can be said of them alone."""
        if self._where is None or not len(ids):
            return np.ones(len(ids), dtype=np.bool_)
        if self._all is not None:
            return np.isin(ids, self._all)
        entries = self._catalog.entries(ids.tolist())
        passing = self._passing([entry.card for entry in entries])
        known = [] if passing is None else [entry.id for entry, good in zip(entries, passing, strict=True) if good]
        return np.isin(ids, known)

    def all(self) -> NDArray[np.int64] | None:
        """Row ids of all that pass, ascending; None where there is no filter.

        Raises:
            LookupError: a key that no card has.
        """
        if self._where is None:
            return None
        if self._all is None:
            ids = np.concatenate([self._view.ids(places) for places, _, _ in self._view.blocks()])
            self._all = self._scanned(ids)
        return self._all

    def _scanned(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        found: list[int] = []
        known = not len(ids)
        for start in range(0, len(ids), _CARDS):
            entries = self._catalog.entries(ids[start : start + _CARDS].tolist())
            passing = self._passing([entry.card for entry in entries])
            known = known or passing is not None
            if passing is not None:
                found += [entry.id for entry, good in zip(entries, passing, strict=True) if good]
        if not known:
            raise LookupError(f"where has a key that no card has: {self._where!r}")
        return np.array(found, dtype=np.int64)

    def _passing(self, cards: Sequence[Card]) -> NDArray[np.bool_] | None:
        """Which cards pass; None where none of them has the key."""
        try:
            return allowed_rows(cards, self._where)
        except LookupError:
            return None
