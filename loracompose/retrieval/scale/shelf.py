"""The cards of what searches find, the last ones kept."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog


class MovedError(Exception):
    """An adapter went while it was being found."""


class CardShelf:
    """Cards by row id, the last ones that were asked for: a row id stands for one unchanging card.

    Args:
        catalog: where the others are read, all that a search lacks at once.
        size: how many are kept.
    """

    def __init__(self, catalog: Catalog, size: int = 4096) -> None:
        self.catalog = catalog
        self._size = size
        self._kept: OrderedDict[int, Card] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, ids: Sequence[int]) -> tuple[Card, ...]:
        """The cards of these adapters.

        Raises:
            MovedError: one has gone.
        """
        with self._lock:
            found = {id: self._kept[id] for id in ids if id in self._kept}
            for id in found:
                self._kept.move_to_end(id)
        lacking = [id for id in ids if id not in found]
        if lacking:
            found |= self._read(lacking)
        return tuple(found[id] for id in ids)

    def _read(self, ids: Sequence[int]) -> dict[int, Card]:
        read = {entry.id: entry.card for entry in self.catalog.entries(ids)}
        if len(read) < len(ids):
            raise MovedError("an adapter went while it was being found")
        with self._lock:
            self._kept |= read
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return read
