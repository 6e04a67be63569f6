"""TIES: trim, elect a sign, average those that agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loracompose.composers.base import Factors, RowWise, Scope, rewrite_rows
from loracompose.composition.bank import RankBank
from loracompose.composition.blocks import BLOCK_BYTES
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.entrywise import EntrywiseMerge
from loracompose.composition.sparsity import elect_and_average


@dataclass(frozen=True)
class Ties(RowWise):
    """delta_W = λ · disjoint mean of the trimmed updates over the members that agree with the elected sign.

    Trim: of each adapter the largest `density` of the entries of delta_W = B A stay, over all its modules
    together (exact threshold; entries equal to the last one kept stay too). Elect: the sign of Σ w_i t_i per entry.
    Average: Σ|w|-weighted mean of the agreeing entries, times the Σ|w| of the row. Uniform weights 1/K are the
    paper; a negative weight turns its adapter round.

    Departs from the paper: weights; where the votes cancel to rounding the entry is 0 (upstream gives it the
    majority sign of the model, which nobody agrees with more than another); the result, no longer of low rank, is
    re-compressed to `rank` by a randomised range finder, so it is approximate. Departs from PEFT's "ties", which
    merges A and B separately and so gets cross terms B_i A_j that are no update of anybody.

    Source: TIES-Merging, arXiv:2306.01708, section 4 and algorithm 1.

    Attributes:
        density: share of entries to keep, in (0, 1]; the paper's recipe without validation data is 0.2.
        scale: λ, 1 in the same recipe.
        rank: ranks per module of the result; None: the sum of the members' ranks.
        block_bytes: budget of the dense blocks that are in memory at once; no hyper-parameter of the method.

    Raises:
        ValueError: a field is out of its range.
    """

    name: ClassVar[str] = "ties"
    source: ClassVar[str] = "TIES-Merging, arXiv:2306.01708"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    density: float = 0.2
    scale: float = 1.0
    rank: int | None = None
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        self._merge()

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One merged adapter per distinct row of weights."""
        return rewrite_rows(banks, weights, self.compose_row)

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The merged adapter of one row."""
        return self._merge()(banks, weights)

    def _merge(self) -> EntrywiseMerge:
        return EntrywiseMerge("Ties", elect_and_average, 0.0, self.density, self.scale, self.rank, 0, self.block_bytes)
