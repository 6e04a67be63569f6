"""Why a search found what it found: each channel's share, what speaks for it in words, and the nearest examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
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
    best = shares.sum(axis=0).max(keepdims=True) if shares.size else np.array([-np.inf])
    return explain_candidates(
        prompt,
        features,
        cards=snapshot.cards,
        examples=lambda row: snapshot.examples[row],
        shares=shares,
        lexicon=snapshot.hybrid.lexicon,
        typicality=float(snapshot.typicality("hybrid", best)[0]),
        k=k,
    )


def explain_candidates(
    prompt: str,
    features: NDArray[np.float32],
    *,
    cards: Sequence[Card],
    examples: Callable[[int], NDArray[np.float32]],
    shares: NDArray[np.float64],
    lexicon: Lexicon,
    typicality: float,
    k: int,
) -> Explanation:
    """The k best of N adapters, explained.

    Args:
        prompt: the prompt.
        features: of the prompt, (1, width).
        cards: of the adapters.
        examples: embeddings of the examples of one of them, (examples, width).
        shares: what each channel, the first so many of `CHANNELS`, adds to their fits, (channels, N).
        lexicon: of the adapters.
        typicality: of the prompt.
        k: at least 1.
    """
    fits = shares.sum(axis=0)
    scores = log_softmax(fits[None])[0]
    order = np.argsort(-scores, kind="stable").tolist()
    ahead = shares - shares.mean(axis=1, keepdims=True) if len(fits) else shares
    candidates = []
    for place, row in enumerate(order[:k]):
        rivals = order[1:2] if place == 0 else order[:1]
        candidates.append(
            Candidate(
                card=cards[row],
                score=float(scores[row]),
                channels={name: float(value) for name, value in zip(CHANNELS, ahead[:, row], strict=False)},
                decisive=_decisive(shares[:, row], shares[:, rivals[0]]) if rivals else "",
                nearest=_nearest(examples(row), cards[row], features),
                wordings=_wordings(lexicon, prompt, row),
            )
        )
    return Explanation(prompt, tuple(candidates), typicality)


def _decisive(own: NDArray[np.float64], rival: NDArray[np.float64]) -> str:
    gaps = own - rival
    return CHANNELS[int(np.argmax(gaps if gaps.sum() >= 0 else -gaps))]


def _nearest(examples: NDArray[np.float32], card: Card, features: NDArray[np.float32]) -> tuple[Nearby, ...]:
    similarities = instructed(examples) @ instructed(features)[0]  # (examples,)
    best = np.argsort(-similarities, kind="stable")[:_NEAREST]
    return tuple(Nearby(card.examples[i], float(similarities[i])) for i in best)


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
