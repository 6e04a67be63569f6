"""A retriever: an index with a number of adapters and a way to weigh them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from loracompose.retrieval.filtering import Exclude, Where
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.scoring import Scoring, check_scoring
from loracompose.retrieval.weighting import (
    CAUTIOUS_TEMPERATURE,
    WEIGHTINGS,
    Weighting,
    cautious_weights,
    softmax_weights,
    top1_weights,
    uniform_weights,
)


@dataclass(frozen=True)
class Retriever:
    """Retrieves the k best adapters of an index for each prompt and weighs them.

    `weighting` is "posterior" (p(adapter | prompt), shared out among the retrieved), "softmax" (of the scores at
    `temperature`, by default the one fitted on the index: then it is the posterior), "uniform" (LoraRetriever's
    mixture), "top1", or "cautious": the posterior for prompts that are typical, and for those that fit no better than
    a share `alpha` of the pool's own examples a flatter one, of the scores at `temperature`, 4 if None. `scoring` is
    that of the index if None.

    A prompt that is abstained from gets weights of zero, that is the base model; its scores stay. With `abstain` a
    number, those are the prompts whose best score is below it. With "conformal", those that fit no better than a
    share `alpha` of the pool's own examples do when held out: of prompts like the examples about that share is
    abstained from; prompts phrased in a way that no example is may be more often.

    Raises:
        ValueError: k < 1, an unknown weighting or scoring, a temperature that is not above 0 or that the weighting does
            not use, a threshold that is not finite, or an alpha that is not between 0 and 1.
    """

    index: AdapterIndex
    k: int = 3
    weighting: Weighting = "posterior"
    temperature: float | None = None
    abstain: float | Literal["conformal"] | None = None
    alpha: float = 0.05
    scoring: Scoring | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {self.k!r}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {list(WEIGHTINGS)}, got {self.weighting!r}")
        if self.temperature is not None and self.weighting not in ("softmax", "cautious"):
            raise ValueError(
                f"weighting {self.weighting!r} uses no temperature, got {self.temperature!r}; leave it out"
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature!r}")
        if self.scoring is not None:
            check_scoring(self.scoring)
        number = isinstance(self.abstain, float | int) and math.isfinite(self.abstain)
        if self.abstain not in (None, "conformal") and not number:
            raise ValueError(f'abstain must be a finite score, "conformal" or None, got {self.abstain!r}')
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {self.alpha!r}")

    def retrieve(self, prompts: Sequence[str], exclude: Exclude | None = None, where: Where | None = None) -> Retrieval:
        """Search and weigh; arguments and errors are those of `AdapterIndex.search`."""
        found = self.index.search(prompts, self.k, exclude=exclude, where=where, scoring=self.scoring)
        weights = self._weigh(found)
        if self.abstain is not None and found.cards:
            weights = torch.where(self._sure(found)[:, None], weights, 0.0)
        return replace(found, weights=weights)

    def _sure(self, found: Retrieval) -> Tensor:
        """Which prompts are not abstained from, (batch,)."""
        if isinstance(self.abstain, str):
            if found.typicality is None:
                raise ValueError("this search says nothing of typicality; abstain by a score instead")
            return found.typicality > self.alpha
        return found.scores.amax(dim=-1) >= (self.abstain or 0.0)

    def _weigh(self, found: Retrieval) -> Tensor:
        if self.weighting == "uniform":
            return uniform_weights(found.scores)
        if self.weighting == "top1":
            return top1_weights(found.scores)
        if self.weighting == "cautious":
            t = CAUTIOUS_TEMPERATURE if self.temperature is None else self.temperature
            return cautious_weights(found.weights, found.scores, found.typicality, temperature=t, alpha=self.alpha)
        return found.weights if self.temperature is None else softmax_weights(found.scores, self.temperature)
