"""Four channels in one posterior: what a prompt means, what stands at its edges, how it is worded, and its shape.

Two discriminants compare embeddings, of whole prompts and of their openings and closings, where templates put their
instruction; the lexicon compares wordings, and a third discriminant the shape of the subject (`shape.py`), which no
change of phrasing touches. Their scores are added with weights under which held-out examples choose
their own adapter with the best likelihood. No gate is needed: evidence of the lexicon that a prompt lacks is evidence
that is not added, see `lexicon.py`. An adapter of several kinds of prompt stands here once for each (`centres.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.discriminant import Discriminant
from loracompose.retrieval.embedding import edges, whole
from loracompose.retrieval.lexicon import Lexicon, ngram_keys
from loracompose.retrieval.shape import shapes
from loracompose.retrieval.weighting import log_softmax

Floats = NDArray[np.float64]

CHANNELS = ("meaning", "edges", "wording", "shape")
"""In the order of the weights; large pools (`scale/`) have the same."""

_PRIOR = 1e-3
"""Precision of the weights around 0: where every held-out example is right, likelihood alone has no maximum."""


@dataclass(frozen=True, eq=False)
class Hybrid:
    """The fitted sum of the channels; `weights` one a channel, in the order of `CHANNELS`.

    `discriminant` compares whole prompts, `edges` their openings and closings, `shape` the shapes of their subjects.
    """

    discriminant: Discriminant
    edges: Discriminant
    lexicon: Lexicon
    shape: Discriminant
    weights: tuple[float, ...]

    def fits(self, features: NDArray[np.float32], prompts: Sequence[str]) -> Floats:
        """How well prompts and their features, (batch, width), fit each of the K adapters, or kinds, (batch, K).

        Their softmax is p(adapter | prompt), or p(kind | prompt) where all kinds are equally likely beforehand.
        """
        return np.asarray(sum(self.channels(features, prompts).values()))

    def channels(self, features: NDArray[np.float32], prompts: Sequence[str]) -> Mapping[str, Floats]:
        """What each channel adds to the fit, each (batch, K)."""
        words = np.stack([self.lexicon.scores(ngram_keys(prompt)) for prompt in prompts])
        meaning, edge = self.discriminant.fits(whole(features)), self.edges.fits(edges(features))
        parts = (meaning, edge, words, self.shape.fits(shapes(prompts)))
        return {name: weight * part for name, weight, part in zip(CHANNELS, self.weights, parts, strict=True)}


@dataclass(frozen=True, eq=False)
class Queries:
    """Held-out examples as the channels score them.

    `channels`: one array a channel, (queries, K); `own`: the own column of each, (queries,); `weight`: of their mean
    likelihood among other queries.
    """

    channels: Sequence[Floats]
    own: NDArray[np.int64]
    weight: float = 1.0


def fit_weights(held_out: Sequence[Queries]) -> tuple[float, ...]:
    """Weights, none negative, under which the sum of the channels gives the own adapters the best likelihood.

    The mean negative log likelihood of a softmax of the weighted sum is convex in the weights; Newton's method with
    halved steps finds the minimum. Channels that would get a negative weight get none, the most negative first.

    Args:
        held_out: kinds of queries over the same channels, each with the weight of its mean likelihood.

    Returns:
        One weight a channel; all 1 where there is no query or no choice.
    """
    usable = [q for q in held_out if len(q.own) and q.channels[0].shape[1] > 1]
    count = len(held_out[0].channels)
    if not usable:
        return (1.0,) * count
    active = list(range(count))
    while active:
        weights = _newton([_Stacked(np.stack([q.channels[c] for c in active], -1), q.own, q.weight) for q in usable])
        if (weights >= 0).all():
            break
        del active[int(np.argmin(weights))]
    found = dict(zip(active, weights.tolist(), strict=True)) if active else {}
    return tuple(found.get(channel, 0.0) for channel in range(count))


@dataclass(frozen=True, eq=False)
class _Stacked:
    """`Queries` with `scores` (queries, K, C)."""

    scores: Floats
    own: NDArray[np.int64]
    weight: float

    def loss(self, weights: Floats) -> float:
        likelihood = log_softmax(self.scores @ weights)[np.arange(len(self.own)), self.own]
        return -self.weight * float(likelihood.mean())

    def slopes(self, weights: Floats) -> tuple[Floats, Floats]:
        """Gradient (C,) and curvature (C, C) of the loss."""
        p = np.exp(log_softmax(self.scores @ weights))  # (queries, K)
        mean = (p[:, None] @ self.scores)[:, 0]  # (queries, C)
        gradient = (mean - self.scores[np.arange(len(self.own)), self.own]).mean(axis=0)
        centred = self.scores - mean[:, None]
        wide = (-1, centred.shape[-1])
        curvature = (centred * p[..., None]).reshape(wide).T @ centred.reshape(wide) / len(self.own)
        return self.weight * gradient, self.weight * curvature


def _newton(kinds: Sequence[_Stacked]) -> Floats:
    weights = np.full(kinds[0].scores.shape[-1], 1e-2)
    loss = _loss(kinds, weights)
    for _ in range(50):
        slopes = [kind.slopes(weights) for kind in kinds]
        gradient = sum((slope for slope, _ in slopes), start=_PRIOR * weights)
        curvature = sum((curve for _, curve in slopes), start=_PRIOR * np.eye(len(weights)))
        step = np.linalg.solve(curvature, gradient)
        while (after := _loss(kinds, weights - step)) > loss and np.abs(step).max() > 1e-9:
            step = step / 2
        weights, gained, loss = weights - step, loss - after, after
        if gained < 1e-10:
            break
    return weights


def _loss(kinds: Sequence[_Stacked], weights: Floats) -> float:
    return float(_PRIOR / 2 * weights @ weights + sum(kind.loss(weights) for kind in kinds))
