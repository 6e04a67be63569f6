"""Mixture: the weighted sum of the adapters' outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loracompose.composers.base import Scope
from loracompose.composition.bank import RankBank, rank_weights
from loracompose.composition.delta import LowRankDelta


@dataclass(frozen=True)
class Mixture:
    """y = W x + Σ_i w_i B_i A_i x: exact, whatever the ranks and modules of the adapters.

    The paper weighs uniformly, w_i = 1/k, and forms every adapter's full output; here the weights come from
    retrieval (give uniform ones for the paper's) and act on the ranks, which is the same sum for less work.

    Source: LoraRetriever, arXiv:2402.09997, section 3.3 "Mixture of LoRAs".
    """

    name: ClassVar[str] = "mixture"
    source: ClassVar[str] = "LoraRetriever, arXiv:2402.09997"
    scope: ClassVar[Scope] = "static"
    keeps_factors: ClassVar[bool] = True
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, weighted as its adapter."""
        of_ranks = rank_weights(banks, weights)
        return {m: LowRankDelta(bank.A, bank.B, of_ranks[m], kind=bank.kind) for m, bank in banks.items()}
