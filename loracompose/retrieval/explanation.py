"""Why a search found what it found: each channel's share, what speaks for it in words, and the nearest examples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.cards import Card
from loracompose.retrieval.centres import Centres
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

    `score` is log p(adapter | prompt). `kind` is the name of the adapter's kind of prompt that adds most to it, empty
    where it has one kind. `channels` are the shares of the fit of that kind by channel, each above or below the mean of
    all adapters. `decisive` is the channel that does most to put this adapter ahead of the next one; for any but the
    first, the one that does most to put it behind the first; empty where there is no other adapter. `nearest` are the
    adapter's example prompts most like the prompt, `wordings` the n-grams that speak for the kind.
    """

    card: Card
    score: float
    channels: Mapping[str, float]
    decisive: str
    nearest: tuple[Nearby, ...]
    wordings: tuple[str, ...]
    kind: str = ""

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
    shares = np.concatenate([parts[name] for name in CHANNELS])  # (channels, C)
    fits = snapshot.centres.joined(shares.sum(axis=0, keepdims=True))
    best = fits.max(axis=1, initial=-np.inf)
    return explain_candidates(
        prompt,
        features,
        cards=snapshot.cards,
        examples=lambda row: snapshot.examples[row],
        centres=snapshot.centres,
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
    centres: Centres,
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
        centres: of the adapters.
        shares: what each channel, the first so many of `CHANNELS`, adds to the fits of the centres, (channels, C).
        lexicon: of the centres.
        typicality: of the prompt.
        k: at least 1.
    """
    fits = shares.sum(axis=0)
    best, joined = centres.best(fits), centres.joined(fits[None])[0]
    scores = log_softmax(joined[None])[0]
    order = np.argsort(-scores, kind="stable").tolist()
    shares = shares[:, best]  # (channels, N)
    ahead = shares - shares.mean(axis=1, keepdims=True) if len(best) else shares
    candidates = []
    for place, row in enumerate(order[:k]):
        rivals = order[1:2] if place == 0 else order[:1]
        candidates.append(
            Candidate(
                card=cards[row],
                score=float(scores[row]),
                channels={name: float(value) for name, value in zip(CHANNELS, ahead[:, row], strict=False)},
                decisive=_decisive(shares, joined, row, rivals[0]) if rivals else "",
                nearest=_nearest(examples(row), cards[row], features),
                wordings=_wordings(lexicon, prompt, int(best[row])),
                kind=centres.kinds[best[row]],
            )
        )
    return Explanation(prompt, tuple(candidates), typicality)


def _decisive(shares: NDArray[np.float64], fits: NDArray[np.float64], own: int, rival: int) -> str:
    gaps = shares[:, own] - shares[:, rival]  # of the best kinds, whose sum need not have the sign of the joined fits
    return CHANNELS[int(np.argmax(gaps if fits[own] >= fits[rival] else -gaps))]


def _nearest(examples: NDArray[np.float32], card: Card, features: NDArray[np.float32]) -> tuple[Nearby, ...]:
    similarities = instructed(examples) @ instructed(features)[0]  # (examples,)
    best = np.argsort(-similarities, kind="stable")[:_NEAREST]
    return tuple(Nearby(card.examples[i], float(similarities[i])) for i in best)


def _wordings(lexicon: Lexicon, prompt: str, centre: int) -> tuple[str, ...]:
    """The n-grams with most evidence, longer ones first since people can read them, none a part of another."""
    texts = ngram_texts(prompt)
    gains = [(texts[key], gain) for key, gain in lexicon.contributions(ngram_keys(prompt), centre)]
    chosen: list[str] = []
    for text, gain in sorted(gains, key=lambda item: -item[1] * (1 + item[0].count(" "))):
        if gain > 0 and text and not any(text in longer or longer in text for longer in chosen):
            chosen.append(text)
        if len(chosen) == _WORDINGS:
            break
    return tuple(chosen)
