"""One generation of a large pool: a version, what came since, what went, and the metric that is current."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.embedding import edges, whole
from loracompose.retrieval.scale.drift import Drift
from loracompose.retrieval.scale.ledger import Position, Profile
from loracompose.retrieval.scale.metric import Metric, Singles
from loracompose.retrieval.scale.statistics import deviations
from loracompose.retrieval.scale.structure import Breadth
from loracompose.retrieval.scale.version import Version
from loracompose.retrieval.scale.wordings import Short, Wordings, read_wording
from loracompose.retrieval.scoring import Scoring
from loracompose.retrieval.tables import Settings

Places = NDArray[np.int64]
"""Where adapters stand: a row of the version, or N plus a row of those that came since."""


_PARTS = (whole, edges)


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
        centred = [(part(means) - frame.centre).astype(np.float32) for part, frame in zip(_PARTS, frames, strict=True)]
        squares = [frame.squares(mine) for frame, mine in zip(frames, centred, strict=True)]
        return Arrivals(
            np.concatenate([self.ids, [profile.id for profile in profiles]]),
            np.concatenate([self.sizes, [len(profile.embeddings) for profile in profiles]]),
            _extended(self.means, centred),
            _extended(self.squares, squares),
            np.concatenate([self.reduced, frames[0].reduced(centred[0], squares[0])]),
            (*self.wordings, *(read_wording(profile.prompts) for profile in profiles)),
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


@dataclass(frozen=True, eq=False)
class View:
    """What a search sees of a large pool; never changed. `gone` (N,) marks rows of the version that went."""

    generation: int
    settings: Settings
    version: Version
    arrivals: Arrivals
    gone: NDArray[np.bool_]
    drifts: tuple[Drift, Drift]
    position: Position

    @classmethod
    def of(cls, version: Version, generation: int, settings: Settings) -> View:
        """A version, and nothing since."""
        frames = [half.frame for half in version.halves]
        first, second = (Drift.none(len(frame.centre), frame.freedom, 1.0 - frame.shrinkage) for frame in frames)
        gone = np.zeros(len(version.ids), dtype=np.bool_)
        return cls(generation, settings, version, Arrivals.none(version), gone, (first, second), version.position)

    def moved(
        self, generation: int, position: Position, settings: Settings, came: Sequence[Profile], went: Sequence[Profile]
    ) -> View:
        """After these came and went."""
        gone, arrivals = self.gone, self.arrivals
        known = set(arrivals.ids.tolist())
        left = [profile for profile in went if profile.id in known or profile.id <= self.version.position.adapter]
        first, second = (self._drift(number, came, left) for number in range(2))
        if left:
            ids = np.array([profile.id for profile in left], dtype=np.int64)
            gone = gone | np.isin(self.version.ids, ids)
            arrivals = arrivals.without(set(ids.tolist()))
        arrivals = arrivals.with_profiles(self.version, came)
        return View(generation, settings, self.version, arrivals, gone, (first, second), position)

    def _drift(self, number: int, came: Sequence[Profile], left: Sequence[Profile]) -> Drift:
        drift, frame, part = self.drifts[number], self.version.halves[number].frame, _PARTS[number]
        for sign, profiles in ((1, came), (-1, left)):
            for profile in profiles:
                white = frame.whitened(deviations(part(profile.embeddings)))
                drift = drift.moved(white, len(white) - 1, sign)
        return drift

    def __len__(self) -> int:
        return len(self.gone) - int(self.gone.sum()) + len(self.arrivals.ids)

    @cached_property
    def metrics(self) -> tuple[Metric, Metric]:
        """The metrics of the current statistics, of whole prompts and of their edges."""
        first, second = (
            Metric.of(half.frame, drift) for half, drift in zip(self.version.halves, self.drifts, strict=True)
        )
        return first, second

    def temperature(self, scoring: Scoring) -> float:
        """As `Snapshot.temperature`."""
        return self.version.fitted.mean_temperature if scoring == "mean" else 1.0

    def typicality(self, scoring: Scoring, fits: NDArray[np.float64]) -> NDArray[np.float64]:
        """As `Snapshot.typicality`; the examples held out are those of the version's sample."""
        known = self.version.calibration[scoring]
        return np.asarray((1 + np.searchsorted(known, fits, side="right")) / (1 + len(known)))

    @property
    def changed(self) -> int:
        """Adapters that came or went since the version."""
        return len(self.arrivals.ids) + int(self.gone.sum())

    def centred(self, features: Singles) -> tuple[Singles, Singles]:
        """Both halves of features of prompts, (n, width), less the centres of the version, each (n, D)."""
        first, second = (
            half.frame.centred(part(features)) for half, part in zip(self.version.halves, _PARTS, strict=True)
        )
        return first, second

    def near(self, query: Singles, breadth: Breadth) -> Places:
        """Places of candidates for one centred whole prompt (D,): the nearest by reduced vectors, nearest first."""
        reduced = self.version.halves[0].frame.queries(query[None])
        rows, distances = self.version.structure.near(reduced, breadth)
        inside = rows[0] >= 0
        rows, distances = rows[0][inside], distances[0][inside]
        staying = ~self.gone[rows]
        rows, distances = rows[staying], distances[staying]
        if not len(self.arrivals.ids):
            return np.asarray(rows)
        later = ((self.arrivals.reduced - reduced) ** 2).sum(axis=1)
        places = np.concatenate([rows, len(self.gone) + np.arange(len(later))])
        order = np.argsort(np.concatenate([distances, later]), kind="stable")
        return np.asarray(places[order[: breadth.candidates]])

    def fits(self, query: Singles, places: Places, number: int = 0) -> NDArray[np.float64]:
        """How well half a prompt, centred, (D,), fits the adapters in these places, exactly, (C,).

        Args:
            query: whole prompt, or with number 1 its edges.
            places: of the adapters.
            number: 0 or 1.
        """
        half, metric, arrivals = self.version.halves[number], self.metrics[number], self.arrivals
        if not len(arrivals.ids):
            return metric.fits(query, half.means.take(places), half.squares[places])
        early, late = self._parted(places)
        means = np.concatenate([half.means.take(early), arrivals.means[number][late]])
        squares = np.concatenate([half.squares[early], arrivals.squares[number][late]])
        return np.asarray(self._joined(places, metric.fits(query, means, squares)))

    def evidence(self, keys: Short, places: Places) -> NDArray[np.float64]:
        """Evidence of a prompt, given by its short keys, for the adapters in these places, (C,)."""
        early, late = self._parted(places)
        wordings = self.version.words.take(early)
        if len(late):
            wordings = Wordings.joined([wordings, *(self.arrivals.wordings[row] for row in late)])
        sizes = np.concatenate([self.version.sizes[early], self.arrivals.sizes[late]])
        return np.asarray(self._joined(places, self.version.frequencies.evidence(keys, wordings, sizes)))

    def ids(self, places: Places) -> NDArray[np.int64]:
        """Row ids of the adapters in these places, (C,)."""
        return self._gathered(places, self.version.ids, self.arrivals.ids)

    def places(self, ids: NDArray[np.int64]) -> Places:
        """Places of the adapters with these row ids, in their order; ids that are not there are left out."""
        found = []
        for offset, known in ((0, self.version.ids), (len(self.gone), self.arrivals.ids)):
            if len(known):
                place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
                here = place[known[place] == ids]
                found.append(offset + (here if offset else here[~self.gone[here]]))
        return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)

    def blocks(self) -> Iterator[tuple[Places, Singles, Singles]]:
        """All adapters by blocks: places, and of whole prompts the centred means and their squares."""
        half = self.version.halves[0]
        for start, means in half.means.blocks():
            rows = start + np.flatnonzero(~self.gone[start : start + len(means)])
            yield rows, means[rows - start], half.squares[rows]
        if len(self.arrivals.ids):
            later = len(self.gone) + np.arange(len(self.arrivals.ids))
            yield later, self.arrivals.means[0], self.arrivals.squares[0]

    def _gathered(self, places: Places, early: NDArray[np.int64], late: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands in these places, (C,), of numbers of the version and of what came since."""
        if not len(late):
            return np.asarray(early[places])
        first, second = self._parted(places)
        return np.asarray(self._joined(places, np.concatenate([early[first], late[second]])))

    def _parted(self, places: Places) -> tuple[Places, Places]:
        """Rows of the version, and rows of those that came since; each in the order of the places."""
        late = places >= len(self.gone)
        return places[~late], places[late] - len(self.gone)

    def _joined(self, places: Places, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the parts, one after the other, in the order of the places."""
        late = places >= len(self.gone)
        if not late.any():
            return values
        joined = np.empty_like(values)
        joined[np.concatenate([np.flatnonzero(~late), np.flatnonzero(late)])] = values
        return joined


def _extended(old: tuple[Singles, Singles], new: Sequence[Singles]) -> tuple[Singles, Singles]:
    first, second = (np.concatenate(pair) for pair in zip(old, new, strict=True))
    return first, second
