"""Which modules of a model read the same input, and the one product of A that they share."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from torch import Tensor

from loracompose.composition.layers import LAST, reads_encoder, running_order

Product = TypeVar("Product")


def share_input(kinds: Mapping[str, Hashable]) -> list[tuple[str, ...]]:
    """Groups of modules that may be given one and the same tensor, each in running order.

    Siblings of one kind are candidates (q, k and v; gate and up), but for the last projection of their part, which
    reads what the others made, and with the keys and values of cross-attention apart, which read the encoder.
    Whether they are really given the same tensor shows when they run.

    Args:
        kinds: module path -> what must be equal within a group, such as the width of the input.
    """
    groups: dict[Hashable, list[str]] = {}
    for path in sorted(kinds, key=running_order):
        parent, _, own = path.rpartition(".")
        alone = path if LAST.match(own) else ""
        groups.setdefault((parent, kinds[path], reads_encoder(path), alone), []).append(path)
    return [tuple(members) for members in groups.values()]


class OpenProduct:
    """What the first module of a group computed for the others, until the last of them has taken it.

    One at a time: modules that share an input run one after the other. It is given out for the very tensor it was
    computed from, unchanged since, and once to each member, so that a buffer that is filled anew is computed anew. In
    inference mode tensors do not count their changes: there a model must not write into an input between siblings.
    """

    def __init__(self) -> None:
        self.close()

    def close(self) -> None:
        """Forget it, with the tensors that it holds."""
        self._owner: object = None
        self._waiting: set[str] = set()
        self._x: Tensor | None = None
        self._version = 0
        self._product: Any = None

    def keep(self, owner: object, waiting: Iterable[str], x: Tensor, product: Any) -> None:
        """Hold a product of x for the members that still wait for it."""
        self.close()
        self._waiting = set(waiting)
        if self._waiting:
            self._owner, self._x, self._version, self._product = owner, x, _version(x), product

    def waits_for(self, owner: object, member: str) -> bool:
        """Whether something is held for this member of this group, of whatever tensor."""
        return self._owner is owner and member in self._waiting

    def take(self, member: str, x: Tensor) -> Any:
        """What is held, for one of those that wait for it; None if it is of another tensor."""
        if self._x is not x or self._version != _version(x):
            return None
        product = self._product
        self._waiting.discard(member)
        if not self._waiting:
            self.close()
        return product


class SharedInput(Generic[Product]):
    """Modules that are expected to read one tensor, and the product that they then share.

    A module that is given another tensor than its siblings ends it: from then on each computes its own.
    """

    def __init__(self, members: Iterable[str], slot: OpenProduct, compute: Callable[[Tensor], Product]) -> None:
        self._members, self._slot, self._compute = frozenset(members), slot, compute
        self._together = True

    def product(self, member: str, x: Tensor) -> Product | None:
        """What is computed from x for all members; None if they do not share."""
        if not self._together:
            return None
        if not self._slot.waits_for(self, member):
            product = self._compute(x)
            self._slot.keep(self, self._members - {member}, x, product)
            return product
        held: Product | None = self._slot.take(member, x)
        if held is None:
            self._together = False
            self._slot.close()
        return held


def _version(x: Tensor) -> int:
    """How often a tensor was changed in place; inference tensors do not count."""
    return 0 if x.is_inference() else x._version
