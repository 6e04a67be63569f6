"""One retrieval for all methods of a protocol: equal sets, weighed as each method likes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from loracompose.retrieval.filtering import Exclude
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.weighting import (
    CAUTIOUS_TEMPERATURE,
    cautious_weights,
    softmax_weights,
    top1_weights,
    uniform_weights,
)

SetWeighting = Literal["posterior", "uniform", "softmax", "top1", "lorauter", "cautious"]
SET_WEIGHTINGS: tuple[str, ...] = get_args(SetWeighting)
LORAUTER_TEMPERATURE = 0.2


@dataclass(frozen=True, eq=False)
class Found:
    """What was retrieved for the rows of a protocol.

    Attributes:
        best: the adapters found, at the largest k that a method asks for.
        cosines: (batch, K), of each prompt with the mean of the adapter's examples, for the columns of `best`.
        seconds: what the search took a prompt.
    """

    best: Retrieval
    cosines: Tensor
    seconds: float

    def first(self, k: int) -> Retrieval:
        """The k best of each row, which a search for k finds; weights shared out anew among them."""
        if len(self.best.cards) <= k:
            return self.best
        kept = self.best.scores.argsort(dim=-1, descending=True, stable=True)[:, :k]  # of equals the earlier
        mask = torch.zeros_like(self.best.scores, dtype=torch.bool).scatter(-1, kept, True)
        mask &= torch.isfinite(self.best.scores)
        weights = (self.best.weights * mask).double()
        total = weights.sum(dim=-1, keepdim=True)
        shared = torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), 0.0).float()
        return replace(self.best, scores=self.best.scores.masked_fill(~mask, -torch.inf), weights=shared)

    def weights(self, k: int, weighting: SetWeighting, temperature: float | None) -> Tensor:
        """The weights of the k best, (batch, K).

        "posterior", "uniform", "softmax" (of the index's scores, at a temperature), "top1" and "cautious" are those of
        `Retriever`. "lorauter" is LORAUTER's (arXiv:2601.21795): a softmax of cosines at temperature 0.2; the paper
        retrieves by the same cosines with representations of a validation set, here the set is the shared one and
        the representation the mean of the card's examples.
        """
        found = self.first(k)
        if weighting == "posterior":
            return found.weights
        if weighting == "uniform":
            return uniform_weights(found.scores)
        if weighting == "top1":
            return top1_weights(found.scores)
        if weighting == "softmax":
            return softmax_weights(found.scores, temperature or 1.0)
        if weighting == "cautious":
            t = temperature or CAUTIOUS_TEMPERATURE
            return cautious_weights(found.weights, found.scores, found.typicality, temperature=t)
        cosines = self.cosines.masked_fill(~torch.isfinite(found.scores), -torch.inf)
        return softmax_weights(cosines, temperature or LORAUTER_TEMPERATURE)

    def place(self, names: Sequence[str]) -> list[int | None]:
        """At which place, from 1, each row found the adapter named for it; None where it did not."""
        places: list[int | None] = []
        for i, name in enumerate(names):
            order = [match.card.name for match in self.best.for_prompt(i)]
            places.append(order.index(name) + 1 if name in order else None)
        return places

    def top(self) -> list[str | None]:
        """The adapter each row found first."""
        rows = (self.best.for_prompt(i) for i in range(len(self.best)))
        return [row[0].card.name if row else None for row in rows]


def check_weighting(weighting: str, temperature: float | None) -> None:
    """Raise ValueError for an unknown weighting, or a temperature that is missing, not used or not above 0."""
    if weighting not in SET_WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(SET_WEIGHTINGS)}, got {weighting!r}")
    if weighting == "softmax" and temperature is None:
        raise ValueError("weighting 'softmax' needs a temperature; without one it is 'posterior'")
    if temperature is not None and weighting not in ("softmax", "lorauter", "cautious"):
        raise ValueError(f"weighting {weighting!r} uses no temperature, got {temperature!r}")
    if temperature is not None and not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(f"temperature must be above 0 and finite, got {temperature!r}")


def cosines_of(index: AdapterIndex, prompts: Sequence[str], exclude: Exclude, found: Retrieval) -> Tensor:
    """Cosines of the prompts with the mean examples of the adapters found, (batch, K)."""
    every = index.search(prompts, len(index), exclude=exclude, scoring="mean")
    column = {name: j for j, name in enumerate(every.names)}
    return every.scores[:, [column[name] for name in found.names]]
