"""One generation of a large pool: a version, what came since, what went, and the metric that is current."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.arrivals import Arrivals
from loracompose.retrieval.scale.drift import Drift
from loracompose.retrieval.scale.ledger import Position, Profile
from loracompose.retrieval.scale.metric import Metric, Singles, Turned
from loracompose.retrieval.scale.parts import WHOLE
from loracompose.retrieval.scale.rows import Scaled
from loracompose.retrieval.scale.statistics import deviations
from loracompose.retrieval.scale.structure import Breadth
from loracompose.retrieval.scale.version import Version
from loracompose.retrieval.scale.wordings import Asked, Wordings, evidence
from loracompose.retrieval.scoring import Scoring
from loracompose.retrieval.tables import Settings

Places = NDArray[np.int64]
"""Where adapters stand: a row of the version, or N plus a row of those that came since."""


_TOGETHER = 1024  # changes that are added to the statistics at once: each time costs as much as a covariance


@dataclass(frozen=True, eq=False)
class Query:
    """One prompt as a view compares it: its centred parts, ready, and reduced as faiss is asked for it, (stored,)."""

    parts: tuple[Turned, ...]
    reduced: Singles


@dataclass(frozen=True, eq=False)
class View:
    """What a search sees of a large pool; never changed. `gone` (N,) marks rows of the version that went."""

    generation: int
    settings: Settings
    version: Version
    arrivals: Arrivals
    gone: NDArray[np.bool_]
    drifts: tuple[Drift, ...]
    position: Position

    @classmethod
    def of(cls, version: Version, generation: int, settings: Settings) -> View:
        """A version, and nothing since."""
        frames = [part.frame for part in version.parts]
        drifts = tuple(Drift.none(len(frame.centre), frame.freedom, 1.0 - frame.shrinkage) for frame in frames)
        gone = np.zeros(len(version.ids), dtype=np.bool_)
        return cls(generation, settings, version, Arrivals.none(version), gone, drifts, version.position)

    def moved(
        self, generation: int, position: Position, settings: Settings, came: Sequence[Profile], went: Sequence[Profile]
    ) -> View:
        """After these came and went."""
        gone, arrivals = self.gone, self.arrivals
        known = set(arrivals.ids.tolist())
        left = [profile for profile in went if profile.id in known or profile.id <= self.version.position.adapter]
        drifts = tuple(self._drift(number, came, left) for number in range(len(self.drifts)))
        if left:
            ids = np.array([profile.id for profile in left], dtype=np.int64)
            gone = gone.copy()
            gone[self._rows(np.unique(ids))] = True
            arrivals = arrivals.without(set(ids.tolist()))
        arrivals = arrivals.with_profiles(self.version, came)
        return View(generation, settings, self.version, arrivals, gone, drifts, position)

    def _drift(self, number: int, came: Sequence[Profile], left: Sequence[Profile]) -> Drift:
        drift, frame = self.drifts[number], self.version.parts[number].frame
        for sign, profiles in ((1, came), (-1, left)):
            for start in range(0, len(profiles), _TOGETHER):
                groups = [profile.parts[number] for profile in profiles[start : start + _TOGETHER]]
                rows = np.concatenate([deviations(group) for group in groups])
                drift = drift.moved(frame.whitened(rows), len(rows) - len(groups), sign)
        return drift

    def __len__(self) -> int:
        return len(self.gone) - self._departed + len(self.arrivals.ids)

    @cached_property
    def _departed(self) -> int:
        return int(self.gone.sum())

    @cached_property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics of the current statistics, one a part."""
        return tuple(Metric.of(part.frame, drift) for part, drift in zip(self.version.parts, self.drifts, strict=True))

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
        return len(self.arrivals.ids) + self._departed

    def queries(self, parts: Sequence[Singles]) -> list[Query]:
        """Prompts as this view compares them, given by their parts, each (n, D); of no more parts than are compared."""
        centred = [known.frame.centred(part) for known, part in zip(self.version.parts, parts, strict=False)]
        turned = [metric.turned(part) for metric, part in zip(self.metrics, centred, strict=False)]
        reduced = self.version.parts[WHOLE].frame.queries(centred[WHOLE])  # (n, stored)
        return [Query(tuple(own), row) for *own, row in zip(*turned, reduced, strict=True)]

    def near(self, queries: Sequence[Query], breadth: Breadth | None = None) -> list[Places]:
        """For each prompt the places of candidates: the nearest by reduced vectors, nearest first."""
        wanted = self.version.structure.breadth if breadth is None else breadth
        asked = np.stack([query.reduced for query in queries])
        rows, distances = self.version.structure.near(asked, wanted)  # (n, candidates) each
        kept = rows >= 0
        if self._departed:
            kept &= ~self.gone[rows]
        if kept.all() and not len(self.arrivals.ids):
            return list(rows)
        return [
            self._with_arrivals(query, near[known], gaps[known], wanted.candidates)
            for query, near, gaps, known in zip(queries, rows, distances, kept, strict=True)
        ]

    def _with_arrivals(self, query: Query, rows: Places, distances: Singles, count: int) -> Places:
        if not len(self.arrivals.ids):
            return rows
        reduced = query.reduced
        later = self.arrivals.squares[WHOLE] - 2.0 * (self.arrivals.reduced @ reduced) + reduced @ reduced
        places = np.concatenate([rows, len(self.gone) + np.arange(len(later))])
        order = np.argsort(np.concatenate([distances, later]), kind="stable")
        return np.asarray(places[order[:count]])

    def fits(self, query: Query, places: Places, number: int = WHOLE) -> NDArray[np.float64]:
        """How well a part of a prompt fits the adapters in these places, exactly, (C,).

        Args:
            query: the prompt.
            places: of the adapters.
            number: of the part.
        """
        part, metric, arrivals = self.version.parts[number], self.metrics[number], self.arrivals
        early, late = self._parted(places)
        if late is None:
            return metric.fits(query.parts[number], part.means.take(places), part.squares[places])
        means = part.means.take(early).and_then(Scaled.of(arrivals.means[number][late]))
        squares = np.concatenate([part.squares[early], arrivals.squares[number][late]])
        return np.asarray(self._joined(places, metric.fits(query.parts[number], means, squares)))

    def evidence(self, asked: Asked, places: Places) -> NDArray[np.float64]:
        """Evidence of a prompt for the adapters in these places, (C,)."""
        early, late = self._parted(places)
        wordings = self.version.words.take(early)
        if late is None:
            return evidence(asked, wordings, self.version.sizes[early])
        wordings = Wordings.joined([wordings, *(self.arrivals.wordings[row] for row in late)])
        sizes = np.concatenate([self.version.sizes[early], self.arrivals.sizes[late]])
        return np.asarray(self._joined(places, evidence(asked, wordings, sizes)))

    def ids(self, places: Places) -> NDArray[np.int64]:
        """Row ids of the adapters in these places, (C,)."""
        return self._gathered(places, self.version.ids, self.arrivals.ids)

    def places(self, ids: NDArray[np.int64]) -> Places:
        """Places of the adapters with these row ids, in their order; ids that are not there are left out."""
        early, late = self._rows(ids), _found(self.arrivals.ids, ids)
        return np.concatenate([early[~self.gone[early]], len(self.gone) + late])

    def _rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Rows of the version with these ids."""
        return _found(self.version.ids, ids)

    def blocks(self) -> Iterator[tuple[Places, Singles, Singles]]:
        """All adapters by blocks: places, and of whole prompts the centred means and their squares."""
        part = self.version.parts[WHOLE]
        for start, means in part.means.blocks():
            rows = start + np.flatnonzero(~self.gone[start : start + len(means)])
            yield rows, means[rows - start], part.squares[rows]
        if len(self.arrivals.ids):
            later = len(self.gone) + np.arange(len(self.arrivals.ids))
            yield later, self.arrivals.means[WHOLE], self.arrivals.squares[WHOLE]

    def _gathered(self, places: Places, early: NDArray[np.int64], late: NDArray[np.int64]) -> NDArray[np.int64]:
        """What stands in these places, (C,), of numbers of the version and of what came since."""
        first, second = self._parted(places)
        if second is None:
            return np.asarray(early[first])
        return np.asarray(self._joined(places, np.concatenate([early[first], late[second]])))

    def _parted(self, places: Places) -> tuple[Places, Places | None]:
        """Rows of the version, and rows of those that came since, None for none; each in the order of the places."""
        if not len(self.arrivals.ids):
            return places, None
        late = places >= len(self.gone)
        return (places[~late], places[late] - len(self.gone)) if late.any() else (places, None)

    def _joined(self, places: Places, values: NDArray[Any]) -> NDArray[Any]:
        """Values of the parts, one after the other, in the order of the places."""
        late = places >= len(self.gone)
        joined = np.empty_like(values)
        joined[np.concatenate([np.flatnonzero(~late), np.flatnonzero(late)])] = values
        return joined


def _found(known: NDArray[np.int64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where these ids stand among known ones, which ascend; those that do not are left out."""
    if not len(known):
        return np.zeros(0, dtype=np.int64)
    place = np.minimum(np.searchsorted(known, ids), len(known) - 1)
    return np.asarray(place[known[place] == ids])
