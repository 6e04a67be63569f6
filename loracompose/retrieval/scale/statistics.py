"""The scatter within adapters, summed over a pool that does not fit into memory; exact under coming and going."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Moments:
    """`scatter` (D, D), the sum of the outer products of deviations from the own adapter's mean; its freedom."""

    scatter: Floats
    freedom: int

    @classmethod
    def none(cls, width: int) -> Moments:
        """Of no adapter."""
        return cls(np.zeros((width, width)), 0)

    def plus(self, other: Moments) -> Moments:
        """Of both."""
        return Moments(self.scatter + other.scatter, self.freedom + other.freedom)

    def without(self, embeddings: NDArray[np.float32]) -> Moments:
        """Without one adapter, given by the embeddings of its examples."""
        change, _, _ = moments([embeddings])
        return Moments(self.scatter - change.scatter, self.freedom - change.freedom)


def moments(groups: Sequence[NDArray[np.float32]]) -> tuple[Moments, NDArray[np.int64], Floats]:
    """The moments of adapters given by the embeddings of their examples; number of examples and mean of each."""
    sizes = np.array([len(group) for group in groups], dtype=np.int64)
    rows = np.concatenate(groups)  # (examples, D)
    means = np.add.reduceat(rows, np.cumsum(sizes) - sizes, axis=0, dtype=np.float64) / sizes[:, None]  # (adapters, D)
    rows = rows - np.repeat(means.astype(np.float32), sizes, axis=0)  # single: half the time
    return Moments((rows.T @ rows).astype(np.float64), int(sizes.sum()) - len(sizes)), sizes, means


def deviations(embeddings: NDArray[np.float32]) -> Floats:
    """Deviations of an adapter's examples from their mean, (examples, D)."""
    return np.asarray(embeddings - embeddings.mean(axis=0, dtype=np.float64))
