"""Linear: the weighted sum of the updates, re-compressed to a rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loracompose.composers.base import Factors, RowWise, Scope, rewrite_rows
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.grouping import group_modules, weighted_sum
from loracompose.composition.settings import check_count


@dataclass(frozen=True)
class Linear(RowWise):
    """delta_W = the best approximation of Σ_i w_i B_i A_i of at most `rank` ranks, by SVD of the factors.

    Exact up to its budget: where the members have no more than `rank` ranks together, their ranks are handed
    on side by side and nothing is lost. The error of the rest stands in the recipe of `compose`. It costs
    O(R² (d_in + d_out)) per module; the d_out x d_in sum is never formed.

    Source: task arithmetic, arXiv:2212.04089, section 2, on updates with one coefficient per adapter; the
    truncation is ours (Eckart-Young) and departs from PEFT's "svd" combination, which forms the dense sum.

    Attributes:
        rank: ranks to keep per module; None: the largest rank among the members that have the module.

    Raises:
        ValueError: rank is out of its range.
    """

    name: ClassVar[str] = "linear"
    source: ClassVar[str] = "Task arithmetic, arXiv:2212.04089"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    rank: int | None = None

    def __post_init__(self) -> None:
        check_count("Linear", "rank", self.rank, optional=True)

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One compressed adapter per distinct row of weights."""
        return rewrite_rows(banks, weights, self.compose_row)

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The compressed sum of one row."""
        composed: dict[str, Factors] = {}
        for group in group_modules(banks):
            rank = max(group.ranks) if self.rank is None else self.rank
            composed |= group.unstack(*weighted_sum(group, weights, rank))
        return composed
