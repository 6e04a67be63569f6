"""What came since a version: few enough to be held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.ledger import Profile
from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.parts import WHOLE
from loracompose.retrieval.scale.version import Version
from loracompose.retrieval.scale.wordings import Wordings, read_wordings


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Adapters that came since a version, all in memory: one row each of everything that a version has of them."""

    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    means: tuple[Singles, ...]
    squares: tuple[Singles, ...]
    reduced: Singles
    wordings: tuple[Wordings, ...]

    @classmethod
    def none(cls, version: Version) -> Arrivals:
        """Of no adapter."""
        empty, frames = np.zeros(0, dtype=np.int64), [part.frame for part in version.parts]
        means = tuple(np.zeros((0, len(frame.centre)), dtype=np.float32) for frame in frames)
        reduced = np.zeros((0, frames[WHOLE].stored), dtype=np.float32)
        return cls(empty, empty, means, tuple(mine[:, 0] for mine in means), reduced, ())

    def with_profiles(self, version: Version, profiles: Sequence[Profile]) -> Arrivals:
        """With more adapters, at the end."""
        if not profiles:
            return self
        frames = [part.frame for part in version.parts]
        means = [
            np.stack([own.mean(axis=0, dtype=np.float64) for own in groups])
            for groups in zip(*(profile.parts for profile in profiles), strict=True)
        ]
        centred = [(mine - frame.centre).astype(np.float32) for mine, frame in zip(means, frames, strict=True)]
        squares = [frame.squares(mine) for frame, mine in zip(frames, centred, strict=True)]
        return Arrivals(
            np.concatenate([self.ids, [profile.id for profile in profiles]]),
            np.concatenate([self.sizes, [len(profile.embeddings) for profile in profiles]]),
            _extended(self.means, centred),
            _extended(self.squares, squares),
            np.concatenate([self.reduced, frames[WHOLE].reduced(centred[WHOLE], squares[WHOLE])]),
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
            tuple(mine[kept] for mine in self.means),
            tuple(mine[kept] for mine in self.squares),
            self.reduced[kept],
            tuple(self.wordings[row] for row in kept),
        )


def _extended(old: Sequence[Singles], new: Sequence[Singles]) -> tuple[Singles, ...]:
    return tuple(np.concatenate(pair) for pair in zip(old, new, strict=True))
