"""DARE: drop entries of the updates at random and rescale, before a sum or before TIES."""

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
from loracompose.composition.sparsity import add_up, elect_and_average


@dataclass(frozen=True)
class Dare(RowWise):
    """delta_W = Σ_i w_i · m_i ∘ delta_W_i / (1 - p), m_i ~ Bernoulli(1 - p): the weighted sum in expectation.

    The mask of an adapter in a module is seeded by the adapter's fingerprint, the module and `seed`: neither the
    order nor the company changes it, and an adapter taken twice is dropped alike twice. As the fingerprint
    belongs to the factors, so do the masks: the result depends on the factorisation unless drop is 0. With drop 0
    it is the exact weighted sum, with no decomposition.

    Departs from the paper: masks act on LoRA updates B A, whose sum has to come back to ranks and is re-compressed to
    `rank` by a randomised range finder; that filters much of the noise that dropping adds. PEFT's "dare_linear"
    drops entries of A and B separately, which adds cross terms.

    Source: DARE, arXiv:2311.03099, the step "drop and rescale".

    Attributes:
        drop: p in [0, 1). The paper drops 0.9 and more of fully fine-tuned models, whose updates are smaller.
        rank: ranks per module of the result; None: the sum of the members' ranks.
        seed: of the masks.
        block_bytes: budget of the dense blocks that are in memory at once; no hyper-parameter of the method.

    Raises:
        ValueError: a field is out of its range.
    """

    name: ClassVar[str] = "dare"
    source: ClassVar[str] = "DARE, arXiv:2311.03099"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    drop: float = 0.5
    rank: int | None = None
    seed: int = 0
    block_bytes: int = BLOCK_BYTES

    def __post_init__(self) -> None:
        self._merge()

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """One merged adapter per distinct row of weights."""
        return rewrite_rows(banks, weights, self.compose_row)

    def compose_row(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Factors]:
        """The merged adapter of one row."""
        if self.drop == 0:
            return sum_updates(banks, weights, self.rank)
        return self._merge()(banks, weights)

    def _merge(self) -> EntrywiseMerge:
        return EntrywiseMerge("Dare", add_up, self.drop, 1.0, 1.0, self.rank, self.seed, self.block_bytes)


@dataclass(frozen=True)
class DareTies(RowWise):
    """TIES on updates thinned by DARE: drop and rescale, trim to `density`, elect a sign, average those that agree.

    Masks as in `Dare`, so it depends on the factorisation; trimming, weights, election and compression as in `Ties`.

    Source: DARE, arXiv:2311.03099 (DARE as a plug-in before TIES), on updates of LoRA.

    Attributes:
        drop: probability of dropping an entry, in [0, 1).
        density: share of the entries that TIES keeps, dropped ones counted as the smallest; 1 (no trimming) is
            what later tools do, the paper trims again.
        scale: λ of TIES.
        rank: ranks per module of the result; None: the sum of the members' ranks.
        seed: of the masks.
        block_bytes: budget of the dense blocks that are in memory at once; no hyper-parameter of the method.

    Raises:
        ValueError: a field is out of its range.
    """

    name: ClassVar[str] = "dare_ties"
    source: ClassVar[str] = "DARE, arXiv:2311.03099, with TIES-Merging, arXiv:2306.01708"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = False
    exact: ClassVar[bool] = False

    drop: float = 0.5
    density: float = 1.0
    scale: float = 1.0
    rank: int | None = None
    seed: int = 0
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
        return EntrywiseMerge(
            "DareTies",
            elect_and_average,
            self.drop,
            self.density,
            self.scale,
            self.rank,
            self.seed,
            self.block_bytes,
        )
