"""Why a search found what it found: each channel's share, what speaks for it in words, and the nearest examples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card
from loracompose.retrieval.embedding import instructed
from loracompose.retrieval.hybrid import CHANNELS
from loracompose.retrieval.lexicon import Lexicon, ngram_keys, ngram_texts
from loracompose.retrieval.snapshot import Snapshot
from loracompose.retrieval.weighting import log_softmax

_NEAREST, _WORDINGS = 2, 3


@dataclass(frozen=True)
class Nearby:
    """An example prompt of an adapter, and its cosine with the prompt in question."""

    prompt: str
    similarity: float


@dataclass(frozen=True)
class Candidate:
    """One adapter that was found.

    `score` is log p(adapter | prompt). `channels` are the shares of the score by channel, each above or below what the
    mean adapter gets from it. `decisive` is the channel that does most to put this adapter ahead of the next one; for
    any but the first, the one that does most to put it behind the first; empty where there is no other adapter.
    `nearest` are the example prompts most like the prompt, `wordings` the n-grams that speak for the adapter.
    """

    card: Card
    score: float
    channels: Mapping[str, float]
    decisive: str
    nearest: tuple[Nearby, ...]
    wordings: tuple[str, ...]

    @property
    def probability(self) -> float:
        """The probability of the adapter given the prompt, among all adapters."""
        return math.exp(self.score)


@dataclass(frozen=True)
class Explanation:
    """Why a prompt found its adapters, best first; `typicality` as in `Retrieval`."""

    prompt: str
    candidates: tuple[Candidate, ...]
    typicality: float


def explain(snapshot: Snapshot, features: NDArray[np.float32], prompt: str, k: int) -> Explanation:
    """The k best adapters of the hybrid scoring for one prompt, explained; `features` (1, width) are the prompt's."""
    parts = snapshot.hybrid.channels(features, [prompt])
    shares = np.concatenate([parts[name] for name in CHANNELS])  # (channels, N)
    fits = shares.sum(axis=0)
    scores = log_softmax(fits[None])[0]
    order = np.argsort(-scores, kind="stable").tolist()
    ahead = shares - shares.mean(axis=1, keepdims=True) if len(fits) else shares
    candidates = []
    for place, row in enumerate(order[:k]):
        rivals = order[1:2] if place == 0 else order[:1]
        candidates.append(
            Candidate(
                card=snapshot.cards[row],
                score=float(scores[row]),
                channels={name: float(value) for name, value in zip(CHANNELS, ahead[:, row], strict=True)},
                decisive=_decisive(shares[:, row], shares[:, rivals[0]]) if rivals else "",
                nearest=_nearest(snapshot, features, row),
                wordings=_wordings(snapshot.hybrid.lexicon, prompt, row),
            )
        )
    best = fits.max(keepdims=True) if len(fits) else np.array([-np.inf])
    return Explanation(prompt, tuple(candidates), float(snapshot.typicality("hybrid", best)[0]))


def _decisive(own: NDArray[np.float64], rival: NDArray[np.float64]) -> str:
    gaps = own - rival
    return CHANNELS[int(np.argmax(gaps if gaps.sum() >= 0 else -gaps))]


def _nearest(snapshot: Snapshot, features: NDArray[np.float32], row: int) -> tuple[Nearby, ...]:
    similarities = instructed(snapshot.examples[row]) @ instructed(features)[0]  # (examples,)
    texts = snapshot.cards[row].examples
    best = np.argsort(-similarities, kind="stable")[:_NEAREST]
    return tuple(Nearby(texts[i], float(similarities[i])) for i in best)


def _wordings(lexicon: Lexicon, prompt: str, row: int) -> tuple[str, ...]:
    """The n-grams with most evidence, longer ones first since people can read them, none a part of another."""
    texts = ngram_texts(prompt)
    gains = [(texts[key], gain) for key, gain in lexicon.contributions(ngram_keys(prompt), row)]
    chosen: list[str] = []
    for text, gain in sorted(gains, key=lambda item: -item[1] * (1 + item[0].count(" "))):
        if gain > 0 and text and not any(text in longer or longer in text for longer in chosen):
            chosen.append(text)
        if len(chosen) == _WORDINGS:
            break
    return tuple(chosen)
