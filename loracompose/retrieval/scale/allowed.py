"""Which adapters of a large pool a search may find: filters, asked of few adapters first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.filtering import Where, passing_rows, unknown_keys
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
        found, _ = self._passing(ids)
        return np.isin(ids, found)

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
        unknown: set[str] | None = None
        for start in range(0, len(ids), _CARDS):
            passing, lacking = self._passing(ids[start : start + _CARDS])
            found += passing
            unknown = lacking if unknown is None else unknown & lacking
        if unknown:
            raise LookupError(f"where has {sorted(unknown)}, which no card has; got {self._where!r}")
        return np.array(found, dtype=np.int64)

    def _passing(self, ids: NDArray[np.int64]) -> tuple[list[int], set[str]]:
        """Which of these row ids pass, and the keys that none of their cards has."""
        entries = self._catalog.entries(ids.tolist())
        cards = [entry.card for entry in entries]
        passing = passing_rows(cards, self._where)
        found = [entry.id for entry, good in zip(entries, passing, strict=True) if good]
        return found, set(unknown_keys(cards, self._where))
