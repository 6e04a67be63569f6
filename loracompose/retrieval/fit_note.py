"""What was fitted to a pool, kept while the pool is nearly the same.

Means, covariances and wordings follow every change exactly. What is chosen by holding out examples (how far to shrink,
how sharp, which channel to trust) hardly moves when one adapter of many comes or goes, and choosing it anew takes
seconds at a thousand adapters. So it is chosen anew once a twentieth of the pool has changed, as large pools do
(`scale/`); small pools, where it takes no time, choose at every change.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from loracompose.retrieval.fitting import Fitted

SMALL = 64
"""Adapters up to which everything is fitted anew after every change."""

CHANGED = 1 / 20
"""Share of the pool that may come or go before everything is fitted anew."""


@dataclass(frozen=True)
class FitNote:
    """What was fitted, to which pool: its number of adapters and highest row id, and the epoch of its embeddings.

    Row ids only grow and stand for unchanging adapters, so these two numbers tell how many came and went since.
    """

    fitted: Fitted
    count: int
    highest: int
    epoch: int

    @classmethod
    def of(cls, fitted: Fitted, ids: Sequence[int], epoch: int) -> FitNote:
        """Of what was fitted to the adapters with these row ids."""
        return cls(fitted, len(ids), max(ids, default=0), epoch)

    @classmethod
    def read(cls, text: str) -> FitNote:
        """From what `text` wrote.

        Raises:
            ValueError: it is not that.
        """
        try:
            content = json.loads(text)
            return cls(Fitted(**content.pop("fitted")), **content)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no note of a fit: {error}; repair() derives everything anew") from error

    def text(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    def serves(self, ids: Sequence[int], epoch: int) -> bool:
        """Whether the pool with these row ids is near enough to the one that was fitted."""
        came = int((np.asarray(ids, dtype=np.int64) > self.highest).sum())
        went = self.count - (len(ids) - came)
        if epoch != self.epoch:
            return False
        if came + went == 0:
            return True
        return len(ids) > SMALL and came + went <= CHANGED * self.count
