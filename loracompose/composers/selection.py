"""Selection: the best adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import Scope
from loracompose.composers.mixture import Mixture
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta


@dataclass(frozen=True)
class Selection:
    """The adapter of the largest weight in each row, applied at full strength; no sum at all.

    Among equal weights the first adapter of the bank wins. The size of the winning weight is not used: a row
    of weights (0.4, 0.3, 0.3) applies its first adapter at 1, as in the paper.

    Source: LoraRetriever, arXiv:2402.09997, section 4 "Selection" (top-1).
    """

    name: ClassVar[str] = "selection"
    source: ClassVar[str] = "LoraRetriever, arXiv:2402.09997"
    scope: ClassVar[Scope] = "static"
    keeps_factors: ClassVar[bool] = True
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """A mixture whose rows are one-hot."""
        return Mixture().compose(banks, top_one(weights))


def top_one(weights: Tensor) -> Tensor:
    """1 at each row's largest weight other than 0, (batch, K); rows of zeros stay zero."""
    member = weights != 0
    best = weights.masked_fill(~member, -torch.inf).argmax(dim=1, keepdim=True)  # (batch, 1)
    return torch.zeros_like(weights).scatter(1, best, 1.0) * member
