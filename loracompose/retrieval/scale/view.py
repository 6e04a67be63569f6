"""One generation of a large pool: a version, what came since, what went, and the metric that is current."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.drift import Drift
from loracompose.retrieval.scale.ledger import Position, Profile
from loracompose.retrieval.scale.metric import Frame, Metric, Singles
from loracompose.retrieval.scale.statistics import deviations
from loracompose.retrieval.scale.structure import Breadth
from loracompose.retrieval.scale.version import Version
from loracompose.retrieval.scale.wordings import Short, Wordings, read_wording
from loracompose.retrieval.scoring import Scoring
from loracompose.retrieval.tables import Settings

Places = NDArray[np.int64]
"""Where adapters stand: a row of the version, or N plus a row of those that came since."""


@dataclass(frozen=True, eq=False)
class Arrivals:
    """Adapters that came since a version, all in memory: one row each of everything that a version has of them."""

    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    means: Singles
    squares: Singles
    reduced: Singles
    wordings: tuple[Wordings, ...]

    @classmethod
    def none(cls, frame: Frame) -> Arrivals:
        """Of no adapter."""
        empty, width = np.zeros(0, dtype=np.int64), len(frame.centre)
        return cls(
            empty,
            empty,
            np.zeros((0, width), dtype=np.float32),
            np.zeros(0, dtype=np.float32),
            np.zeros((0, frame.stored), dtype=np.float32),
            (),
        )

    def with_profiles(self, frame: Frame, profiles: Sequence[Profile]) -> Arrivals:
        """With more adapters, at the end."""
        if not profiles:
            return self
        means = np.stack([profile.embeddings.mean(axis=0, dtype=np.float64) for profile in profiles]) - frame.centre
        centred = means.astype(np.float32)
        squares = frame.squares(centred)
        return Arrivals(
            np.concatenate([self.ids, [profile.id for profile in profiles]]),
            np.concatenate([self.sizes, [len(profile.embeddings) for profile in profiles]]),
            np.concatenate([self.means, centred]),
            np.concatenate([self.squares, squares]),
            np.concatenate([self.reduced, frame.reduced(centred, squares)]),
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
            self.means[kept],
            self.squares[kept],
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
    drift: Drift
    position: Position

    @classmethod
    def of(cls, version: Version, generation: int, settings: Settings) -> View:
        """A version, and nothing since."""
        frame = version.frame
        drift = Drift.none(len(frame.centre), frame.freedom, 1.0 - frame.shrinkage)
        gone = np.zeros(len(version.ids), dtype=np.bool_)
        return cls(generation, settings, version, Arrivals.none(frame), gone, drift, version.position)

    def moved(
        self, generation: int, position: Position, settings: Settings, came: Sequence[Profile], went: Sequence[Profile]
    ) -> View:
        """After these came and went."""
        frame, drift, gone, arrivals = self.version.frame, self.drift, self.gone, self.arrivals
        known = set(arrivals.ids.tolist())
        left = [profile for profile in went if profile.id in known or profile.id <= self.version.position.adapter]
        for sign, profiles in ((1, came), (-1, left)):
            for profile in profiles:
                white = frame.whitened(deviations(profile.embeddings))
                drift = drift.moved(white, len(profile.embeddings) - 1, sign)
        if left:
            ids = np.array([profile.id for profile in left], dtype=np.int64)
            gone = gone | np.isin(self.version.ids, ids)
            arrivals = arrivals.without(set(ids.tolist()))
        return View(generation, settings, self.version, arrivals.with_profiles(frame, came), gone, drift, position)

    def __len__(self) -> int:
        return len(self.gone) - int(self.gone.sum()) + len(self.arrivals.ids)

    @cached_property
    def metric(self) -> Metric:
        """The metric of the current statistics."""
        return Metric.of(self.version.frame, self.drift)

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

    def centred(self, features: Singles) -> Singles:
        """Features of prompts, (n, D), less the centre of the version."""
        return features - self.version.frame.centre

    def near(self, query: Singles, breadth: Breadth) -> Places:
        """Places of candidates for one centred prompt (D,): the nearest by reduced vectors, nearest first."""
        reduced = self.version.frame.queries(query[None])
        rows, distances = self.version.structure.near(reduced, breadth)
        inside = rows[0] >= 0
        rows, distances = rows[0][inside], distances[0][inside]
        staying = ~self.gone[rows]
        rows, distances = rows[staying], distances[staying]
        if not len(self.arrivals.ids):
            return rows
        later = ((self.arrivals.reduced - reduced) ** 2).sum(axis=1)
        places = np.concatenate([rows, len(self.gone) + np.arange(len(later))])
        order = np.argsort(np.concatenate([distances, later]), kind="stable")
        return np.asarray(places[order[: breadth.candidates]])

    def fits(self, query: Singles, places: Places) -> NDArray[np.float64]:
        """How well one centred prompt (D,) fits the adapters in these places, exactly, (C,)."""
        if not len(self.arrivals.ids):
            return self.metric.fits(query, self.version.means.take(places), self.version.squares[places])
        early, late = self._parted(places)
        means = np.concatenate([self.version.means.take(early), self.arrivals.means[late]])
        squares = np.concatenate([self.version.squares[early], self.arrivals.squares[late]])
        fits = self.metric.fits(query, means, squares)
        return np.asarray(self._joined(places, fits))

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
        """All adapters by blocks: places, centred means, squares."""
        for start, means in self.version.means.blocks():
            rows = start + np.flatnonzero(~self.gone[start : start + len(means)])
            yield rows, means[rows - start], self.version.squares[rows]
        if len(self.arrivals.ids):
            later = len(self.gone) + np.arange(len(self.arrivals.ids))
            yield later, self.arrivals.means, self.arrivals.squares

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
