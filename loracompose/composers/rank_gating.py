"""Rank gating: every token keeps the m ranks that contribute most to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import Scope
from loracompose.composition.bank import RankBank, rank_weights
from loracompose.composition.canonical import canonical_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.composition.settings import check_count


@dataclass(frozen=True)
class RankGating:
    """y = W x + Σ_{i in top m} w_i (a_i·x) b_i, the m ranks of the largest |w_i| |a_i·x| ‖b_i‖ for each token.

    SMoRA's operator, in which every rank of the pool is an expert, without its training: there a learned router
    scores the ranks and rescales those kept to a mean of 1; here a rank is scored by the length of what it would
    add, and kept at its adapter's weight. That length includes the weight, so a barely retrieved adapter cannot
    displace a well retrieved one. Ranks are canonical (singular directions of each adapter's update): the choice
    does not depend on how an adapter is factorised. m is shared by all adapters of the row; a rank that adds
    nothing takes a place only where places are left. Exact weighted sum when m is at least the ranks of the row.

    Source: SMoRA, arXiv:2501.15103, without the gate that it trains.

    Args:
        m: ranks kept per token and module.

    Raises:
        ValueError: m is out of its range.
    """

    m: int = 8

    name: ClassVar[str] = "rank_gating"
    source: ClassVar[str] = "SMoRA, arXiv:2501.15103, training-free"
    scope: ClassVar[Scope] = "token"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    canonical: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("RankGating", "m", self.m)

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Canonical ranks, gated by what each adds to the token."""
        return self.compose_canonical(canonical_banks(banks), weights)

    def compose_canonical(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """As `compose`, of ranks that are canonical already."""
        of_ranks = rank_weights(banks, weights)
        return {
            module: LowRankDelta(bank.A, bank.B, of_ranks[module], TopRanks(bank.B.norm(dim=0), self.m), bank.kind)
            for module, bank in banks.items()
        }


@dataclass(frozen=True, eq=False)
class TopRanks:
    """Keeps the ranks that add most to a token.

    Attributes:
        lengths: ‖b_i‖, (R,).
        m: ranks kept.
    """

    lengths: Tensor
    m: int

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> TopRanks:
        """The same gate on a device and in a dtype."""
        return replace(self, lengths=self.lengths.to(device, dtype))

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R): the weight of each rank kept, 0 for the others."""
        w = w[:, None, :].expand_as(h)
        if self.m >= h.shape[-1]:
            return w
        added = torch.where(w != 0, h.abs() * self.lengths * w.abs(), 0.0)  # (batch, seq, R)
        top = added.topk(self.m, dim=-1).indices  # (batch, seq, m)
        return torch.zeros_like(h).scatter(-1, top, w.gather(-1, top))
