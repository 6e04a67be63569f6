"""Search in a view of a large pool: few candidates by reduced vectors, scored exactly with the current statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from loracompose.retrieval.embedding import edges, instructed, whole
from loracompose.retrieval.filtering import Where
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.scale.allowed import Allowed
from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.parts import EDGE, SHAPE, WHOLE, parts_of
from loracompose.retrieval.scale.rows import Scaled
from loracompose.retrieval.scale.scanning import scan
from loracompose.retrieval.scale.shelf import CardShelf
from loracompose.retrieval.scale.view import Places, Query, View
from loracompose.retrieval.scale.wordings import Asked
from loracompose.retrieval.scoring import Scoring
from loracompose.retrieval.weighting import log_softmax, softmax_weights

Floats = NDArray[np.float64]

WORDED = 32
"""Candidates whose edges, wording and shape are looked at, the best by meaning."""

_WIDEST = 4096
"""Candidates beyond which comparing with all is simpler."""


class Found(NamedTuple):
    """What one prompt found: row ids, best first, their scores; and the best fit."""

    ids: NDArray[np.int64]
    scores: Floats
    best: float


@dataclass(frozen=True)
class Request:
    """What is searched for: `excluded` are for each prompt the row ids that it must not get."""

    k: int
    scoring: Scoring
    where: Where | None
    excluded: Sequence[set[int]]

    @property
    def wanted(self) -> int:
        """How many that may be found are compared: of the hybrid those that another channel may still put first."""
        return max(self.k, WORDED) if self.scoring == "hybrid" else self.k


def search_view(view: View, cards: CardShelf, prompts: Sequence[str], features: Singles, request: Request) -> Retrieval:
    """The k best adapters for each prompt; as `search_fits`, but probabilities are those among the candidates.

    Candidates of all prompts are found by one call of faiss; then each prompt's are fetched and compared at once.
    Scores of a prompt in another batch differ by rounding. Scoring "mean" has no structure of its own: it compares
    with all adapters, block by block.

    Raises:
        MovedError: an adapter went meanwhile; search the next view.
        LookupError: a key in `where` that no card has.
    """
    allowed = Allowed(view, cards.catalog, request.where)
    if request.scoring == "mean":
        return _retrieval(view, cards, _by_means(view, features, request, allowed), request.scoring)
    queries = view.queries(_parts(view, features, prompts, request.scoring))
    found = [
        _by_meaning(view, query, places, request, banned, allowed)
        for query, places, banned in zip(queries, view.near(queries), request.excluded, strict=True)
    ]
    if request.scoring == "hybrid":
        asked = view.version.frequencies.asked(prompts)
        found = [
            (places, np.sum(channels(view, query, one, places, fits), axis=0))
            for query, one, (places, fits) in zip(queries, asked, found, strict=True)
        ]
    ranked = [
        _ranked(view, places, fits, request.k, banned, allowed)
        for (places, fits), banned in zip(found, request.excluded, strict=True)
    ]
    return _retrieval(view, cards, ranked, request.scoring)


def _parts(view: View, features: Singles, prompts: Sequence[str], scoring: Scoring) -> Sequence[Singles]:
    """The parts of prompts that count, up to the last one that has a weight."""
    _, edge, _, shape = view.version.fitted.weights
    if scoring == "hybrid" and shape:
        return parts_of(features, prompts)
    return (whole(features), edges(features)) if scoring == "hybrid" and edge else (whole(features),)


def channels(view: View, query: Query, asked: Asked, places: Places, meaning: Floats) -> tuple[Floats, ...]:
    """What each channel adds to the fits of a prompt for the adapters in these places, each (C,), as `CHANNELS`.

    Args:
        view: what is searched.
        query: the prompt; what has no weight may be missing at its end.
        asked: the prompt.
        places: of the adapters.
        meaning: its fits by whole prompts.
    """
    scores: tuple[Callable[[], Floats], ...] = (
        lambda: meaning,
        lambda: view.fits(query, places, EDGE),
        lambda: view.evidence(asked, places),
        lambda: view.fits(query, places, SHAPE),
    )
    return tuple(
        weight * score() if weight else np.zeros(len(places))
        for weight, score in zip(view.version.fitted.weights, scores, strict=True)
    )


def _by_meaning(
    view: View, query: Query, places: Places, request: Request, banned: set[int], allowed: Allowed
) -> tuple[Places, Floats]:
    """Candidates and their fits by whole prompts; for the hybrid only those that the other channels look at."""
    if banned or not allowed.everything or len(places) < request.k:
        places = _widened(view, query, places, request, banned, allowed)
    fits = view.fits(query, places)
    if request.scoring != "hybrid":
        return places, fits
    kept = _best(fits, request.wanted, _open(view.ids(places), banned, allowed))
    return places[kept], fits[kept]


def _ranked(view: View, places: Places, fits: Floats, k: int, banned: set[int], allowed: Allowed) -> Found:
    ids = view.ids(places)
    scores = log_softmax(fits[None])[0]
    rows = np.flatnonzero(_open(ids, banned, allowed))
    order = rows[np.lexsort((ids[rows], -scores[rows]))][:k]  # of equals the earlier adapter
    best = float(fits[rows].max()) if len(rows) else -np.inf
    return Found(ids[order], scores[order], best)


def _best(fits: Floats, wanted: int, open_rows: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Of candidates the best by meaning, and as many as are wanted of those that may be found."""
    order = np.argsort(-fits, kind="stable")
    kept = order[:wanted]
    if open_rows[kept].all():
        return kept
    enough = np.cumsum(open_rows[order]) <= wanted
    return order[(np.arange(len(order)) < WORDED) | (open_rows[order] & enough)]


def _widened(view: View, query: Query, places: Places, request: Request, banned: set[int], allowed: Allowed) -> Places:
    """Candidates among which there are enough that may be found, the first ones of a prompt or more."""
    breadth = view.version.structure.breadth
    enough = request.k if allowed.everything else request.wanted
    least = request.wanted + len(banned)
    if breadth.candidates < least:
        breadth = breadth.at_least(least)
        places = view.near([query], breadth)[0]
    while int(_open(view.ids(places), banned, allowed).sum()) < enough:
        if len(places) >= len(view):
            allowed.all()  # which says so where a key is unknown
            return places
        breadth = breadth.doubled()
        if breadth.candidates > _WIDEST:
            every = _exhaustive(view, query, allowed.all(), banned, request.wanted)
            # Beside the best of all: what may be found does not change the score of what is found.
            return np.union1d(places, every)
        places = view.near([query], breadth)[0]
    return places


def _open(ids: NDArray[np.int64], banned: set[int], allowed: Allowed) -> NDArray[np.bool_]:
    """Which of these row ids may be found, as far as that can be said of them alone."""
    passing = allowed.among(ids)
    return passing & ~np.isin(ids, list(banned)) if banned else passing


def _exhaustive(view: View, query: Query, ids: NDArray[np.int64] | None, banned: set[int], k: int) -> Places:
    """Places of the candidates of one prompt by comparing with all that are allowed."""
    count = max(view.version.structure.breadth.candidates, k)

    def score(means: Singles, squares: Singles) -> Floats:
        return view.metrics[WHOLE].fits(query.parts[WHOLE], Scaled.of(means), squares)[None]

    places, _ = scan(view, score, 1, ids, [banned], count)
    return places[0]


def _by_means(view: View, features: Singles, request: Request, allowed: Allowed) -> list[Found]:
    queries = instructed(features)

    def score(means: Singles, squares: Singles) -> Floats:
        under = _under(means + view.version.parts[WHOLE].frame.centre)
        return np.asarray(queries @ (under / np.linalg.norm(under, axis=1, keepdims=True)).T, dtype=np.float64)

    places, scores = scan(view, score, len(queries), allowed.all(), request.excluded, request.k)
    found = []
    for place, values in zip(places, scores, strict=True):
        ids = view.ids(place)
        order = np.lexsort((ids, -values))
        found.append(Found(ids[order], values[order], float(values.max(initial=-np.inf))))
    return found


def _under(whole: Singles) -> Singles:
    """The instructed half of what is kept of whole prompts."""
    return whole[:, whole.shape[1] // 2 :]


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
