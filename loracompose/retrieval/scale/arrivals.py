"""What came since a version: few enough to be held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.ledger import Profile
from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.version import HALVES, Version
from loracompose.retrieval.scale.wordings import Wordings, read_wordings


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Adapters that came since a version, all in memory: one row each of everything that a version has of them."""

    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    means: tuple[Singles, Singles]
    squares: tuple[Singles, Singles]
    reduced: Singles
    wordings: tuple[Wordings, ...]

    @classmethod
    def none(cls, version: Version) -> Arrivals:
        """Of no adapter."""
        empty, frame = np.zeros(0, dtype=np.int64), version.halves[0].frame
        none = np.zeros((0, len(frame.centre)), dtype=np.float32)
        reduced = np.zeros((0, frame.stored), dtype=np.float32)
        return cls(empty, empty, (none, none), (none[:, 0], none[:, 0]), reduced, ())

    def with_profiles(self, version: Version, profiles: Sequence[Profile]) -> Arrivals:
        """With more adapters, at the end."""
        if not profiles:
            return self
        means = np.stack([profile.embeddings.mean(axis=0, dtype=np.float64) for profile in profiles])
        frames = [half.frame for half in version.halves]
        centred = [(part(means) - frame.centre).astype(np.float32) for part, frame in zip(HALVES, frames, strict=True)]
        squares = [frame.squares(mine) for frame, mine in zip(frames, centred, strict=True)]
        return Arrivals(
            np.concatenate([self.ids, [profile.id for profile in profiles]]),
            np.concatenate([self.sizes, [len(profile.embeddings) for profile in profiles]]),
            _extended(self.means, centred),
            _extended(self.squares, squares),
            np.concatenate([self.reduced, frames[0].reduced(centred[0], squares[0])]),
            (*self.wordings, *(read_wordings([profile.prompts]) for profile in profiles)),
        )

    def without(self, ids: set[int]) -> Arrivals:
        """Without the adapters of these row ids."""
        kept = np.flatnonzero([id not in ids for id in self.ids.tolist()])
        if len(kept) == len(self.ids):
            return self
        return Arrivals(
            self.ids[kept],
            self.sizes[kept],
            (self.means[0][kept], self.means[1][kept]),
            (self.squares[0][kept], self.squares[1][kept]),
            self.reduced[kept],
            tuple(self.wordings[row] for row in kept),
        )


def _extended(old: tuple[Singles, Singles], new: Sequence[Singles]) -> tuple[Singles, Singles]:
    first, second = (np.concatenate(pair) for pair in zip(old, new, strict=True))
    return first, second
