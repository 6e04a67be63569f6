"""What was composed for a set of adapters, kept for the next request that asks for the same."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from loracompose.adapters.bounded import Bounded

Composed: TypeAlias = Mapping[str, tuple[Tensor, Tensor]]
"""Module path -> A (r, d_in), B (d_out, r): of one set of adapters at fixed weights, or of one adapter rewritten."""


@dataclass(frozen=True)
class CacheStats:
    """Counts since the cache was made, and what it holds now.

    Attributes:
        hits: sets that were not composed for the asking, those another thread was composing included.
        misses: sets composed.
        evictions: sets dropped for lack of room.
        entries: sets held.
        bytes: bytes they occupy.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    entries: int = 0
    bytes: int = 0


class CompositionCache:
    """Composed sets by what they were composed of, least recently used out first.

    Safe to use from several threads; simultaneous requests for one set compose it once, and a failure reaches everyone
    who waited and is not remembered. What is dropped goes on living in the requests that hold it. Nobody may write
    into what the cache hands out.

    Args:
        max_bytes: of factors kept at once; a larger set is handed out and not kept. 0 keeps nothing.

    Raises:
        ValueError: max_bytes < 0.
    """

    def __init__(self, max_bytes: int = 2**29) -> None:
        self._lock = threading.Lock()
        self._kept: Bounded[Hashable, Composed] = Bounded(max_bytes)
        self._pending: dict[Hashable, Future[Composed]] = {}
        self._hits = self._misses = 0

    @property
    def stats(self) -> CacheStats:
        """Counts up to now."""
        with self._lock:
            return CacheStats(self._hits, self._misses, self._kept.evictions, len(self._kept), self._kept.bytes)

    def recall(self, key: Hashable, compose: Callable[[], Composed]) -> tuple[Composed, bool]:
        """What is kept under a key, or what `compose` makes now; and whether it was not made for this call.

        Args:
            key: equal for what is composed alike, and for nothing else.
            compose: makes it; called outside the lock, and by one thread at a time for one key.
        """
        with self._lock:
            if (kept := self._kept.get(key)) is not None:
                self._hits += 1
                return kept, True
            pending = self._pending.get(key)
            if pending is None:
                mine: Future[Composed] = Future()
                self._pending[key] = mine
                self._misses += 1
            else:
                self._hits += 1
        return (pending.result(), True) if pending is not None else (self._make(key, compose, mine), False)

    def clear(self) -> None:
        """Drop everything that is kept; counts as no eviction."""
        with self._lock:
            self._kept.clear()

    def _make(self, key: Hashable, compose: Callable[[], Composed], mine: Future[Composed]) -> Composed:
        """Compose, keep, and tell everyone who waits, whatever comes of it."""
        try:
            composed = compose()
            size = held_bytes(composed)
        except BaseException as error:
            with self._lock:
                del self._pending[key]
            mine.set_exception(error)
            raise
        with self._lock:
            self._kept.put(key, composed, size)
            del self._pending[key]
        mine.set_result(composed)
        return composed


def held_bytes(composed: Composed) -> int:
    """Bytes of memory that factors keep alive: of a view, the whole tensor it looks into."""
    storages = [tensor.untyped_storage() for factors in composed.values() for tensor in factors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
