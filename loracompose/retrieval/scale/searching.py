"""Search in a view of a large pool: few candidates by reduced vectors, scored exactly with the current statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.embedding import instructed
from loracompose.retrieval.filtering import Where, allowed_rows
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.scale.making import best_of
from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.structure import Breadth
from loracompose.retrieval.scale.view import Places, View
from loracompose.retrieval.scale.wordings import short_keys
from loracompose.retrieval.scoring import Scoring
from loracompose.retrieval.weighting import log_softmax, softmax_weights

WORDED = 64
"""Candidates whose edges and wording are looked at, the best by meaning."""

_WIDEST = 4096
"""Candidates beyond which comparing with all is simpler."""

_CARDS = 512


class MovedError(Exception):
    """An adapter went while it was being found."""


class CardShelf:
    """Cards by row id, the last ones that were asked for: a row id stands for one unchanging card.

    Args:
        catalog: where the others are read.
        size: how many are kept.
    """

    def __init__(self, catalog: Catalog, size: int = 4096) -> None:
        self.catalog = catalog
        self._read = lru_cache(maxsize=size)(self._read_one)

    def take(self, ids: Sequence[int]) -> tuple[Card, ...]:
        """The cards of these adapters.

        Raises:
            MovedError: one has gone.
        """
        return tuple(self._read(id) for id in ids)

    def _read_one(self, id: int) -> Card:
        entries = self.catalog.entries([id])
        if not entries:
            raise MovedError("an adapter went while it was being found")
        return entries[0].card


class Found(NamedTuple):
    """What one prompt found: row ids, best first, their scores; and the best fit."""

    ids: NDArray[np.int64]
    scores: NDArray[np.float64]
    best: float


@dataclass(frozen=True)
class Request:
    """What is searched for: `excluded` are for each prompt the row ids that it must not get."""

    k: int
    scoring: Scoring
    where: Where | None
    excluded: Sequence[set[int]]


def search_view(view: View, cards: CardShelf, prompts: Sequence[str], features: Singles, request: Request) -> Retrieval:
    """The k best adapters for each prompt; as `search_fits`, but probabilities are those among the candidates.

    Scoring "mean" has no structure of its own: it compares with all adapters, block by block.

    Raises:
        MovedError: an adapter went meanwhile; search the next view.
        LookupError: a key in `where` that no card has.
    """
    allowed = _Allowed(view, cards.catalog, request.where)
    if request.scoring == "mean":
        found = _by_means(view, features, request, allowed)
    else:
        found = [
            _by_fits(view, prompt, query, request, banned, allowed)
            for prompt, *query, banned in zip(prompts, *view.centred(features), request.excluded, strict=True)
        ]
    return _retrieval(view, cards, found, request.scoring)


def channels(view: View, prompt: str, query: Sequence[Singles], places: Places) -> tuple[NDArray[np.float64], ...]:
    """What each channel adds to the fits of a prompt for the adapters in these places, each (C,).

    Args:
        view: where to search.
        prompt: the prompt.
        query: both halves of its features, centred, (D,).
        places: of the adapters.
    """
    parts = (*(view.fits(half, places, number) for number, half in enumerate(query)), _words(view, prompt, places))
    return tuple(weight * part for weight, part in zip(view.version.fitted.weights, parts, strict=True))


def _words(view: View, prompt: str, places: Places) -> NDArray[np.float64]:
    return view.evidence(short_keys(prompt), places)


class _Allowed:
    """Which adapters pass the filter: asked of few at first, of all only where few do."""

    def __init__(self, view: View, catalog: Catalog, where: Where | None) -> None:
        self._view, self._catalog, self._where = view, catalog, where
        self._all: NDArray[np.int64] | None = None

    @property
    def everything(self) -> bool:
        """Whether there is no filter."""
        return self._where is None

    def among(self, ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these row ids pass, as far as that can be said of them alone."""
        if self._where is None or not len(ids):
            return np.ones(len(ids), dtype=np.bool_)
        if self._all is not None:
            return np.isin(ids, self._all)
        entries = self._catalog.entries(ids.tolist())
        passing = self._passing([entry.card for entry in entries])
        known = [] if passing is None else [entry.id for entry, good in zip(entries, passing, strict=True) if good]
        return np.isin(ids, known)

    def all(self) -> NDArray[np.int64] | None:
        """Row ids of all that pass, ascending; None where there is no filter.

        Raises:
            LookupError: a key that no card has.
        """
        if self._where is None:
            return None
        if self._all is None:
            ids = np.concatenate([self._view.ids(places) for places, _, _ in self._view.blocks()])
            self._all = self._scanned(ids)
        return self._all

    def _scanned(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        found: list[int] = []
        known = not len(ids)
        for start in range(0, len(ids), _CARDS):
            entries = self._catalog.entries(ids[start : start + _CARDS].tolist())
            passing = self._passing([entry.card for entry in entries])
            known = known or passing is not None
            if passing is not None:
                found += [entry.id for entry, good in zip(entries, passing, strict=True) if good]
        if not known:
            raise LookupError(f"where has a key that no card has: {self._where!r}")
        return np.array(found, dtype=np.int64)

    def _passing(self, cards: Sequence[Card]) -> NDArray[np.bool_] | None:
        """Which cards pass; None where none of them has the key."""
        try:
            return allowed_rows(cards, self._where)
        except LookupError:
            return None


def _by_fits(
    view: View, prompt: str, query: Sequence[Singles], request: Request, banned: set[int], allowed: _Allowed
) -> Found:
    breadth = view.version.structure.breadth
    wanted = _wanted(request)
    if breadth.candidates < wanted + len(banned):
        breadth = Breadth(breadth.probes, wanted + len(banned), breadth.factor)
    enough = request.k if allowed.everything else wanted
    while True:
        places = view.near(query[0], breadth)
        ids = view.ids(places)
        open_ids = _open(ids, banned, allowed)
        if int(open_ids.sum()) >= enough:
            break
        if len(places) >= len(view):
            allowed.all()  # which says so where a key is unknown
            break
        breadth = breadth.doubled()
        if breadth.candidates > _WIDEST:
            every = allowed.all()
            # Beside the best of all: what may be found does not change the score of what is found.
            places = np.union1d(places, _exhaustive(view, query[0], every, banned, wanted))
            ids = view.ids(places)
            open_ids = _open(ids, banned, allowed)
            break
    places, fits = _scored(view, prompt, query, places, request, open_ids)
    ids = view.ids(places)
    scores = log_softmax(fits[None])[0]
    open_ids = _open(ids, banned, allowed)
    rows = np.flatnonzero(open_ids)
    order = rows[np.lexsort((ids[rows], -scores[rows]))][: request.k]  # of equals the earlier adapter
    best = float(fits[rows].max()) if len(rows) else -np.inf
    return Found(ids[order], scores[order], best)


def _wanted(request: Request) -> int:
    """How many that may be found are compared: of the hybrid those that wording may still put first."""
    return max(request.k, WORDED) if request.scoring == "hybrid" else request.k


def _open(ids: NDArray[np.int64], banned: set[int], allowed: _Allowed) -> NDArray[np.bool_]:
    """Which of these row ids may be found, as far as that can be said of them alone."""
    passing = allowed.among(ids)
    return passing & ~np.isin(ids, list(banned)) if banned else passing


def _scored(
    view: View, prompt: str, query: Sequence[Singles], places: Places, request: Request, open_ids: NDArray[np.bool_]
) -> tuple[Places, NDArray[np.float64]]:
    """Places of what is left, and its fits: for the hybrid those best by meaning, and as many as are asked for."""
    fits = view.fits(query[0], places)
    if request.scoring != "hybrid":
        return places, fits
    order = np.argsort(-fits, kind="stable")
    enough = np.cumsum(open_ids[order]) <= _wanted(request)
    kept = order[(np.arange(len(order)) < WORDED) | (open_ids[order] & enough)]
    places = places[kept]
    meaning, edge, wording = view.version.fitted.weights
    others = edge * view.fits(query[1], places, 1) + wording * _words(view, prompt, places)
    return places, meaning * fits[kept] + others


def _exhaustive(view: View, query: Singles, ids: NDArray[np.int64] | None, banned: set[int], k: int) -> Places:
    """Places of the candidates of one prompt by comparing with all that are allowed."""
    count = max(view.version.structure.breadth.candidates, k)

    def score(means: Singles, squares: Singles) -> NDArray[np.float64]:
        return view.metrics[0].fits(query, means, squares)[None]

    places, _ = _scan(view, score, 1, ids, [banned], count)
    return places[0]


def _by_means(view: View, features: Singles, request: Request, allowed: _Allowed) -> list[Found]:
    queries = instructed(features)

    def score(means: Singles, squares: Singles) -> NDArray[np.float64]:
        under = _under(means + view.version.halves[0].frame.centre)
        return np.asarray(queries @ (under / np.linalg.norm(under, axis=1, keepdims=True)).T, dtype=np.float64)

    places, scores = _scan(view, score, len(queries), allowed.all(), request.excluded, request.k)
    found = []
    for place, values in zip(places, scores, strict=True):
        ids = view.ids(place)
        order = np.lexsort((ids, -values))
        found.append(Found(ids[order], values[order], float(values.max(initial=-np.inf))))
    return found


def _under(whole: Singles) -> Singles:
    """The instructed half of what is kept of whole prompts."""
    return whole[:, whole.shape[1] // 2 :]


def _scan(
    view: View,
    score: Callable[[Singles, Singles], NDArray[np.float64]],
    prompts: int,
    ids: NDArray[np.int64] | None,
    excluded: Sequence[set[int]],
    count: int,
) -> tuple[list[Places], list[NDArray[np.float64]]]:
    """For each prompt the places of the highest scores among all that are allowed, and the scores."""
    best = np.zeros((prompts, 0))
    places = np.zeros((prompts, 0), dtype=np.int64)
    for here, means, squares in view.blocks():
        scores = score(means, squares)
        known = view.ids(here)
        if ids is not None:
            scores[:, ~np.isin(known, ids)] = -np.inf
        for row, banned in zip(scores, excluded, strict=True):
            if banned:
                row[np.isin(known, list(banned))] = -np.inf
        wide = np.broadcast_to(here, scores.shape)
        best, places = best_of(np.concatenate([best, scores], axis=1), np.concatenate([places, wide], axis=1), count)
    finite = np.isfinite(best)
    return [row[good] for row, good in zip(places, finite, strict=True)], [
        row[good] for row, good in zip(best, finite, strict=True)
    ]


def _retrieval(view: View, cards: CardShelf, found: Sequence[Found], scoring: Scoring) -> Retrieval:
    columns = np.unique(np.concatenate([one.ids for one in found]))  # ascending: index order
    table = np.full((len(found), len(columns)), -np.inf, dtype=np.float32)
    for row, one in zip(table, found, strict=True):
        row[np.searchsorted(columns, one.ids)] = one.scores
    scores = torch.from_numpy(table)
    best = np.array([one.best for one in found])
    return Retrieval(
        cards.take(columns.tolist()),
        scores,
        softmax_weights(scores, view.temperature(scoring)),
        torch.from_numpy(view.typicality(scoring, best)),
    )
