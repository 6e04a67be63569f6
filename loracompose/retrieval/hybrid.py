"""Two channels in one posterior: the discriminant, which knows meanings, and the lexicon, which knows wordings.

Their scores are added with weights under which held-out examples choose their own adapter with the best likelihood.
No gate is needed: evidence of the lexicon that a prompt lacks is evidence that is not added, see `lexicon.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.discriminant import Discriminant
from loracompose.retrieval.lexicon import Lexicon, ngram_keys
from loracompose.retrieval.weighting import likeliest_temperature, log_softmax

Floats = NDArray[np.float64]

CHANNELS = ("meaning", "wording")

_PRIOR = 1e-3
"""Precision of the weights around 0: where every held-out example is right, likelihood alone has no maximum."""


@dataclass(frozen=True, eq=False)
class Hybrid:
    """The fitted sum of both channels; `weights` one a channel, in the order of `CHANNELS`."""

    discriminant: Discriminant
    lexicon: Lexicon
    weights: tuple[float, float]

    def fits(self, features: NDArray[np.float32], prompts: Sequence[str]) -> Floats:
        """How well prompts and their features, (batch, D), fit each adapter, (batch, K).

        Their softmax over the adapters is p(adapter | prompt).
        """
        return np.asarray(sum(self.channels(features, prompts).values()))

    def channels(self, features: NDArray[np.float32], prompts: Sequence[str]) -> Mapping[str, Floats]:
        """What each channel adds to the fit, each (batch, K)."""
        meaning, wording = self.weights
        words = [self.lexicon.scores(ngram_keys(prompt)) for prompt in prompts]
        parts = (meaning * self.discriminant.fits(features), wording * np.stack(words))
        return dict(zip(CHANNELS, parts, strict=True))


def fit_weights(channels: Sequence[Floats], own: NDArray[np.int64]) -> tuple[float, ...]:
    """Weights, none negative, under which the sum of the channels gives the own adapters the best likelihood.

    The mean negative log likelihood of a softmax of the weighted sum is convex in the weights; Newton's method with
    halved steps finds the minimum. A channel that would get a negative weight gets none.

    Args:
        channels: scores of held-out queries, each (queries, K).
        own: the own column of each query, (queries,).

    Returns:
        One weight a channel; all 1 where there is no query or no choice.
    """
    if not len(own) or channels[0].shape[1] < 2:
        return (1.0,) * len(channels)
    stacked = np.stack(channels, axis=-1)  # (queries, K, C)
    weights = _newton(stacked, own)
    if (weights >= 0).all():
        return tuple(weights.tolist())
    best = int(np.argmax([likeliest_temperature(scores, own)[1] for scores in channels]))
    alone = float(_newton(stacked[:, :, [best]], own)[0])
    return tuple(max(alone, 0.0) if channel == best else 0.0 for channel in range(len(channels)))


def _newton(stacked: Floats, own: NDArray[np.int64]) -> Floats:
    weights = np.full(stacked.shape[-1], 1e-2)
    loss = _loss(stacked, own, weights)
    for _ in range(50):
        p = np.exp(log_softmax(stacked @ weights))  # (queries, K)
        mean = np.einsum("qk,qkc->qc", p, stacked)
        gradient = (mean - stacked[np.arange(len(own)), own]).mean(axis=0) + _PRIOR * weights
        centred = stacked - mean[:, None]
        curvature = np.einsum("qk,qkc,qkd->cd", p, centred, centred) / len(own) + _PRIOR * np.eye(len(weights))
        step = np.linalg.solve(curvature, gradient)
        while (after := _loss(stacked, own, weights - step)) > loss and np.abs(step).max() > 1e-9:
            step = step / 2
        weights, gained, loss = weights - step, loss - after, after
        if gained < 1e-10:
            break
    return weights


def _loss(stacked: Floats, own: NDArray[np.int64], weights: Floats) -> float:
    likelihood = log_softmax(stacked @ weights)[np.arange(len(own)), own]
    return float(_PRIOR / 2 * weights @ weights - likelihood.mean())
