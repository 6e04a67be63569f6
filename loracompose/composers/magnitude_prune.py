"""Magnitude pruning: the weighted sum of the largest entries of each update."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loracompose.composers.base import Factors, RowWise, Scope, rewrite_rows
from loracompose.composition.bank import RankBank
from loracompose.composition.blocks import BLOCK_BYTES
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.entrywise import EntrywiseMerge, sum_updates
from loracompose.composition.sparsity import add_up


@dataclass(frozen=True)
class MagnitudePrune(RowWise):
    """delta_W = Σ_i w_i · trim(delta_W_i): TIES without its election, or DARE's deterministic rival.

    Of each adapter the largest `density` of the entries of delta_W = B A stay as they are, over all its modules
    together (exact threshold; entries equal to the last one kept stay too); nothing is rescaled. At density 1 it
    is the exact weighted sum, with no decomposition.

    Departs from the source: LoRA updates have to come back to ranks, so the sum is re-compressed to `rank` by a
    randomised range finder. Departs from PEFT's "magnitude_prune", which prunes A and B separately.

    Source: TIES-Merging, arXiv:2306.01708, section 4, step "trim", alone; the baseline "MP" of DARE,
    arXiv:2311.03099.

    Attributes:
        density: share of entries to keep, in (0, 1].
        rank: ranks per module of the result; None: the sum of the members' ranks.
        block_bytes: budget of the dense blocks that are in memory at once; no hyper-parameter of the method.

    Raises:
        ValueError: a field is out of its range.
    """

    name: ClassVar[str] = "magnitude_prune"
    source: ClassVar[str] = "TIES-Merging (trim alone), arXiv:2306.01708"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    density: float = 0.2
    rank: int | None = None
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        self._merge()

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One merged adapter per distinct row of weights."""
        return rewrite_rows(banks, weights, self.compose_row)

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The merged adapter of one row."""
        if self.density == 1:
            return sum_updates(banks, weights, self.rank)
        return self._merge()(banks, weights)

    def _merge(self) -> EntrywiseMerge:
        return EntrywiseMerge("MagnitudePrune", add_up, 0.0, self.density, 1.0, self.rank, 0, self.block_bytes)
