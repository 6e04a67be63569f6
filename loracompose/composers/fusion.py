"""Fusion: A and B averaged separately."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import Factors, RowWise, Scope, rewrite_rows
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.linalg import working_dtype


@dataclass(frozen=True)
class Fusion(RowWise):
    """delta_W = (Σ_i w_i B_i)(Σ_i w_i A_i): averages of parameters, not of updates.

    The product has cross terms w_i w_j B_i A_j, so it is not the sum of the updates unless there is one adapter,
    and it depends on how each adapter happens to be factorised. It costs one adapter's rank. The paper averages
    adapters of one rank with w_i = 1/k; here shorter ranks are padded with zeros, a member without the module
    counts as zero, and the LoRA scaling lies in B.

    Source: LoraRetriever, arXiv:2402.09997, section 3.3 "Fusion of LoRAs".
    """

    name: ClassVar[str] = "fusion"
    source: ClassVar[str] = "LoraRetriever, arXiv:2402.09997"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One averaged adapter per distinct row of weights."""
        return rewrite_rows(banks, weights, self.compose_row)

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The averaged adapter of one row."""
        return fuse(banks, weights)


def fuse(banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
    """(Σ w_i A_i, Σ w_i B_i) of every module, of the largest rank among the members.

    Summed in float32 or better, and rounded once: to the dtype that the members' promote to, in whatever order they
    stand.
    """
    fused = {}
    for module, bank in banks.items():
        first = bank.present[0][1]
        tensors = [tensor for _, part in bank.present for tensor in (part.A, part.B)]
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors))
        rank, working = max(part.rank for _, part in bank.present), working_dtype(*tensors)
        A = first.A.new_zeros(rank, first.d_in, dtype=working)
        B = first.B.new_zeros(first.d_out, rank, dtype=working)
        for i, part in bank.present:
            w = weights[i].to(A)
            A[: part.rank] += w * part.A.to(A)
            B[:, : part.rank] += w * part.B.to(B)
        fused[module] = (A.to(dtype), B.to(dtype))
    return fused
