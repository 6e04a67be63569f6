"""What a search returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loracompose.retrieval.cards import Card


class Match(NamedTuple):
    """One adapter found for one prompt."""

    card: Card
    score: float
    weight: float


@dataclass(frozen=True, eq=False)
class Retrieval:
    """The adapters found for a batch of prompts.

    `cards` are the K distinct adapters found for the batch, in index order. `scores` (batch, K) float32 are
    logarithms of p(adapter | prompt), or cosines for scoring "mean"; -inf where an adapter was not retrieved.
    `weights` (batch, K) float32: rows sum to 1, or to 0 where nothing was retrieved or the retriever abstained.
    `typicality` (batch,) float64 says how usual the prompt is among the examples of what it may get: a conformal
    p-value, small where nothing fits; None if nobody knows.
    """

    cards: tuple[Card, ...]
    scores: Tensor
    weights: Tensor
    typicality: Tensor | None = None

    def __post_init__(self) -> None:
        shape = (len(self.scores), len(self.cards))
        if tuple(self.scores.shape) != shape or tuple(self.weights.shape) != shape:
            raise ValueError(
                f"scores and weights must be (batch, {len(self.cards)}), got {tuple(self.scores.shape)} and "
                f"{tuple(self.weights.shape)}"
            )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the K adapters, one a column."""
        return tuple(card.name for card in self.cards)

    def for_prompt(self, i: int) -> list[Match]:
        """What was retrieved for prompt i, best first; of equals the earlier in the index first."""
        found = torch.nonzero(torch.isfinite(self.scores[i])).flatten().tolist()
        matches = [Match(self.cards[j], float(self.scores[i, j]), float(self.weights[i, j])) for j in found]
        return sorted(matches, key=lambda match: -match.score)
