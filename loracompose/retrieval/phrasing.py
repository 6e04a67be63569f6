"""How channels score prompts that are phrased anew: whole phrasings of every adapter are held out together.

The examples of an adapter come from few templates. Holding one example out leaves others of its template behind, so
it tells how well a channel knows a template again, and nothing about templates to come. Here the examples of each
adapter are grouped by the wording they share, and group after group is held out of all adapters at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.lexicon import Keys, Lexicon

Floats = NDArray[np.float64]

GROUPS = 4
"""Phrasings of an adapter at most."""

LINKED = 256
"""Examples of an adapter that are compared with each other: that is quadratic in their number."""


@dataclass(frozen=True, eq=False)
class Fold:
    """What is kept and what is held out of each adapter, as positions of its examples."""

    kept: tuple[NDArray[np.int64], ...]
    held: tuple[NDArray[np.int64], ...]

    @property
    def own(self) -> NDArray[np.int64]:
        """The adapter of each held-out example, (queries,)."""
        return np.repeat(np.arange(len(self.held)), [len(part) for part in self.held])


@dataclass(frozen=True, eq=False)
class View:
    """A channel that compares vectors: those of the examples of each adapter, each (examples, width), and how.

    `fits`: given the vectors kept of each adapter and those of queries, (queries, K).
    """

    groups: Sequence[NDArray[np.float32]]
    fits: Callable[[Sequence[NDArray[np.float32]], NDArray[np.float32]], Floats]


def phrasing_folds(profiles: Sequence[Sequence[Keys]]) -> list[Fold]:
    """Folds that hold out one phrasing of every adapter each; an adapter with a single example is always kept.

    Args:
        profiles: the n-grams of each example of each adapter, as in `Lexicon.profiles`.
    """
    groups = [phrasings(profile) for profile in profiles]
    folds = []
    for number in range(GROUPS):
        held = tuple(np.flatnonzero(group == number) for group in groups)
        if any(len(part) for part in held):
            folds.append(Fold(tuple(np.flatnonzero(group != number) for group in groups), held))
    return folds


def phrasings(profile: Sequence[Keys]) -> NDArray[np.int64]:
    """The phrasing of each example of one adapter, (examples,) in 0..GROUPS-1; -1 for an only example.

    Average linkage on the overlap (Jaccard) of n-grams that at least two examples have: those of templates, not of
    subjects. Of many examples `LINKED` are linked, evenly spaced, and each other one goes with the nearest of them.
    """
    from scipy.cluster.hierarchy import average, cut_tree  # here, for it takes half a second and no search needs it

    count = len(profile)
    if count < 2:
        return np.full(count, -1)
    linked = np.linspace(0, count - 1, min(LINKED, count)).astype(np.int64)
    apart = _distances(profile, linked)
    tree = average(apart[linked][np.triu_indices(len(linked), 1)])
    labels = np.asarray(cut_tree(tree, min(GROUPS, count))[:, 0], dtype=np.int64)
    found: NDArray[np.int64] = labels[apart.argmin(axis=1)]
    found[linked] = labels  # where equal examples are nearest to each other
    return found


def held_out_scores(
    folds: Sequence[Fold],
    profiles: Sequence[Sequence[Keys]],
    views: Sequence[View],
) -> tuple[list[Floats], NDArray[np.int64]]:
    """The scores of held-out examples in each view and by the lexicon, each (queries, K); own columns.

    Args:
        folds: of `phrasing_folds`.
        profiles: as there.
        views: channels that compare vectors.
    """
    scores: list[list[Floats]] = [[] for _ in range(len(views) + 1)]
    for fold in folds:
        for view, found in zip(views, scores, strict=False):
            kept = [group[part] for group, part in zip(view.groups, fold.kept, strict=True)]
            queries = np.concatenate([group[part] for group, part in zip(view.groups, fold.held, strict=True)])
            found.append(view.fits(kept, queries))
        lexicon = Lexicon(tuple(tuple(p[i] for i in part) for p, part in zip(profiles, fold.kept, strict=True)))
        texts = [p[i] for p, part in zip(profiles, fold.held, strict=True) for i in part]
        scores[-1].append(np.stack([lexicon.scores(keys) for keys in texts]))
    own = np.concatenate([fold.own for fold in folds]) if folds else np.zeros(0, dtype=np.int64)
    empty = np.zeros((0, len(profiles)))
    return [np.concatenate(found) if found else empty for found in scores], own


def _distances(profile: Sequence[Keys], linked: NDArray[np.int64]) -> Floats:
    """Jaccard distances of all examples to the linked ones, (examples, linked); 1 where neither shares an n-gram."""
    from scipy.sparse import csr_array

    distinct, column, often = np.unique(np.concatenate(profile), return_inverse=True, return_counts=True)
    row = np.repeat(np.arange(len(profile)), [len(keys) for keys in profile])
    shared = often[column] > 1
    ones = np.ones(int(shared.sum()))
    has = csr_array((ones, (row[shared], column[shared])), shape=(len(profile), len(distinct)))
    both = (has @ has[linked].T).toarray()  # (examples, linked)
    sizes = np.bincount(row[shared], minlength=len(profile))
    either = sizes[:, None] + sizes[linked] - both
    return np.asarray(1.0 - both / np.maximum(either, 1.0))
