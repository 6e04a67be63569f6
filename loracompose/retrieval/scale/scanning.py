"""Comparing with all adapters of a view, block by block: where few candidates are not enough, and what they miss."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.scale.metric import Singles
from loracompose.retrieval.scale.view import Places, View

Floats = NDArray[np.float64]


def scan(
    view: View,
    score: Callable[[Singles, Singles], Floats],
    prompts: int,
    ids: NDArray[np.int64] | None,
    excluded: Sequence[set[int]],
    count: int,
) -> tuple[list[Places], list[Floats]]:
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


def best_of(scores: Floats, places: NDArray[np.int64], count: int) -> tuple[Floats, NDArray[np.int64]]:
    """The highest scores of each row with their places, both (n, count), in no order."""
    if scores.shape[1] <= count:
        return scores, places
    kept = np.argpartition(-scores, count - 1, axis=1)[:, :count]
    return np.take_along_axis(scores, kept, axis=1), np.take_along_axis(places, kept, axis=1)
