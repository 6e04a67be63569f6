"""Exact search in one snapshot: the best k allowed adapters for each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.scoring import Scoring
from loracompose.retrieval.snapshot import Snapshot
from loracompose.retrieval.weighting import log_softmax, softmax_weights

_FAISS: Any = faiss  # its stubs know the constructors of C++, not those of Python


def search_means(
    snapshot: Snapshot,
    queries: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.bool_],
    excluded: Sequence[set[int]],
) -> Retrieval:
    """The k adapters of nearest mean for each query, of those allowed and not excluded; fewer only if there are fewer.

    Args:
        snapshot: what to search.
        queries: unit vectors, (batch, dimension).
        k: at least 1.
        allowed: rows that pass the filter, (N,).
        excluded: for each query the rows it must not get.
    """
    rows, scores = _nearest(snapshot, queries, k, allowed, excluded)  # (batch, k')
    best = scores.max(axis=1, initial=-np.inf).astype(np.float64)
    return _retrieval(snapshot, rows, scores, snapshot.temperature("mean"), snapshot.typicality("mean", best))


def search_fits(
    snapshot: Snapshot,
    scoring: Scoring,
    fits: NDArray[np.float64],
    k: int,
    allowed: NDArray[np.bool_],
    excluded: Sequence[set[int]],
) -> Retrieval:
    """The k best adapters for each prompt by their fits, (batch, N); otherwise as `search_means`.

    Probabilities are those among all adapters: what may be found does not change the score of what is found.
    """
    open_rows = np.tile(allowed, (len(fits), 1))
    for row, banned in zip(open_rows, excluded, strict=True):
        row[list(banned)] = False
    masked = np.where(open_rows, log_softmax(fits), -np.inf).astype(np.float32)
    best = np.where(open_rows, fits, -np.inf).max(axis=1, initial=-np.inf)
    order = np.argsort(-masked, axis=1, kind="stable")[:, :k]  # stable: of equals the earlier row
    found = np.take_along_axis(masked, order, axis=1)  # (batch, k')
    return _retrieval(snapshot, order, found, snapshot.temperature(scoring), snapshot.typicality(scoring, best))


def _retrieval(
    snapshot: Snapshot,
    rows: NDArray[np.int64],
    scores: NDArray[np.float32],
    temperature: float,
    typicality: NDArray[np.float64],
) -> Retrieval:
    retrieved = np.isfinite(scores)
    columns = np.unique(rows[retrieved])  # (K,), ascending: index order
    table = np.full((len(rows), len(columns)), -np.inf, dtype=np.float32)
    prompts = np.nonzero(retrieved)[0]
    table[prompts, np.searchsorted(columns, rows[retrieved])] = scores[retrieved]
    found = torch.from_numpy(table)  # (batch, K)
    cards = tuple(snapshot.cards[row] for row in columns)
    return Retrieval(cards, found, softmax_weights(found, temperature), torch.from_numpy(typicality))


def _nearest(
    snapshot: Snapshot,
    queries: NDArray[np.float32],
    k: int,
    allowed: NDArray[np.bool_],
    excluded: Sequence[set[int]],
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Rows and scores, best first, of equals the earlier row; score -inf where there are not k of them."""
    longest = max(len(rows) for rows in excluded)
    # Whoever excludes m rows may lose m of the best: fetch that many more, and nothing allowed is missed.
    fetch = min(k + longest, int(allowed.sum()))
    if fetch == 0:
        empty = np.zeros((len(queries), 0))
        return empty.astype(np.int64), empty.astype(np.float32)
    selector = None if allowed.all() else _FAISS.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
    options = None if selector is None else _FAISS.SearchParameters(sel=selector)
    scores, rows = snapshot.vectors.search(queries, fetch, params=options)  # (batch, fetch)
    for scored, found, banned in zip(scores, rows, excluded, strict=True):
        if banned:
            scored[np.isin(found, list(banned))] = -np.inf
    order = np.lexsort((rows, -scores), axis=-1)[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(scores, order, axis=1)
