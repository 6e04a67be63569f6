"""Values kept up to a number of bytes, least recently used out first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")


class Bounded(Generic[Key, Value]):
    """Values by key. Not safe to use from several threads at once: whoever shares it locks.

    What is dropped goes on living where it is used.

    Attributes:
        bytes: that the values occupy.
        evictions: values dropped for lack of room.

    Args:
        max_bytes: the most that is kept.
        name: of this bound for its caller, in messages.

    Raises:
        ValueError: max_bytes < 0.
    """

    def __init__(self, max_bytes: int, name: str = "max_bytes") -> None:
        if max_bytes < 0:
            raise ValueError(f"{name} must be at least 0, got {max_bytes}; 0 keeps nothing")
        self.bytes = self.evictions = 0
        self._max_bytes = max_bytes
        self._values: OrderedDict[Key, tuple[Value, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def takes(self, size: int) -> bool:
        """Whether a value of `size` bytes has room at all."""
        return size <= self._max_bytes

    def get(self, key: Key) -> Value | None:
        """The value of a key, which counts as a use; None if none is kept."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Key, value: Value, size: int) -> None:
        """Keep a value of `size` bytes under a key that has none, unless it has no room at all."""
        if not self.takes(size):
            return
        self._values[key] = value, size
        self.bytes += size
        while self.bytes > self._max_bytes:
            _, (_, dropped) = self._values.popitem(last=False)
            self.bytes -= dropped
            self.evictions += 1

    def clear(self) -> None:
        """Drop everything; counts as no eviction."""
        self._values.clear()
        self.bytes = 0
