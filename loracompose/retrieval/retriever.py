"""A retriever: an index with a number of adapters and a way to weigh them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracompose.retrieval.filtering import Exclude, Where
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.weighting import (
    WEIGHTINGS,
    Weighting,
    softmax_weights,
    top1_weights,
    uniform_weights,
)


@dataclass(frozen=True)
class Retriever:
    """Retrieves the k best adapters of an index for each prompt and weighs them.

    `weighting` is "softmax" (of the scores at `temperature`, by default the one fitted on the index), "uniform"
    (LoraRetriever's mixture) or "top1". With `abstain`, a prompt whose best score is below it gets weights of zero,
    that is the base model; its scores stay.

    Raises:
        ValueError: k < 1, an unknown weighting, a temperature that is not above 0 or that the weighting does not
            use, or a threshold that is not finite.
    """

    index: AdapterIndex
    k: int = 3
    weighting: Weighting = "softmax"
    temperature: float | None = None
    abstain: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.k, int) or self.k < 1:
            raise ValueError(f"k must be an integer of at least 1, got {self.k!r}")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {list(WEIGHTINGS)}, got {self.weighting!r}")
        if self.temperature is not None and self.weighting != "softmax":
            raise ValueError(
                f"weighting {self.weighting!r} uses no temperature, got {self.temperature!r}; leave it out"
            )
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0 and finite, got {self.temperature!r}")
        if self.abstain is not None and not math.isfinite(self.abstain):
            raise ValueError(f"abstain must be a finite score or None, got {self.abstain!r}")

    def retrieve(self, prompts: Sequence[str], exclude: Exclude | None = None, where: Where | None = None) -> Retrieval:
        """Search and weigh; arguments and errors are those of `AdapterIndex.search`."""
        found = self.index.search(prompts, self.k, exclude=exclude, where=where)
        weights = self._weigh(found)
        if self.abstain is not None and found.cards:
            sure = found.scores.amax(dim=-1, keepdim=True) >= self.abstain  # (batch, 1)
            weights = torch.where(sure, weights, 0.0)
        return replace(found, weights=weights)

    def _weigh(self, found: Retrieval) -> Tensor:
        if self.weighting == "uniform":
            return uniform_weights(found.scores)
        if self.weighting == "top1":
            return top1_weights(found.scores)
        return found.weights if self.temperature is None else softmax_weights(found.scores, self.temperature)
