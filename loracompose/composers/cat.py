"""CAT (LoRA Soups): one learned weight for every adapter and module, the same for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import masked_softmax
from loracompose.composition.linalg import working_dtype
from loracompose.composition.router import Router
from loracompose.composition.settings import check_router, filled, is_finite

DEFAULTS: Mapping[str, Any] = {"spread": 1.0}


@dataclass(frozen=True)
class Cat(GradientTrained):
    """y = W x + Σ_i softmax(a)_i B_i A_i x with a (K,) learned for every module.

    The ranks of the adapters are concatenated, not summed factor by factor, so there are no cross terms; the weights
    depend on no token, and the composition of a set is a plain LoRA that `compose` exports.

    The softmax runs over the members of a row (a weight other than 0; its size does not enter) that have the module:
    the share of one that lacks it would be lost. The paper composes two adapters on the same modules, where this makes
    no difference. Training starts from a ~ N(0, `spread`²), as in the authors' code with spread 1; 0 starts from the
    mean.

    Source: LoRA Soups, arXiv:2410.13025. Settings of the router: `spread`.

    Args:
        router: what was learned.

    Raises:
        ValueError: another method's router.
    """

    router: Router

    name: ClassVar[str] = "cat"
    source: ClassVar[str] = "LoRA Soups, arXiv:2410.13025"
    scope: ClassVar[Scope] = "static"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("Cat", self.name, self.router)

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """Random logits.

        Raises:
            ValueError: an unknown setting, or a spread that is negative.
        """
        chosen = filled("Cat", settings, DEFAULTS)
        if not (is_finite(chosen["spread"]) and chosen["spread"] >= 0):
            raise ValueError(f"Cat: spread must be a finite number of at least 0, got {chosen['spread']!r}")
        generator = torch.Generator().manual_seed(seed)
        tensors = {
            module: chosen["spread"] * torch.randn(len(pool.names), generator=generator)
            for module in sorted(pool.banks)
        }
        return Router(cls.name, chosen, tensors, pool.base_model, pool.adapters)

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, at its adapter's weight in the module.

        Raises:
            LookupError: an adapter or a module that the router was not trained for.
            ValueError: the router has tensors of other shapes.
        """
        return {module: self._delta(module, bank, weights) for module, bank in banks.items()}

    def _delta(self, module: str, bank: RankBank, weights: Tensor) -> LowRankDelta:
        learned = self.router.tensor(module, (len(self.router.adapters or ()),))
        logits = learned[self.router.columns(bank.fingerprints)].to(bank.A.device)  # (K,)
        has = torch.tensor([part is not None for part in bank.parts], device=bank.A.device)  # (K,)
        member = (weights.to(bank.A.device) != 0) & has  # (batch, K)
        shares = masked_softmax(logits.to(working_dtype(logits, bank.A)).expand(member.shape), member)
        return LowRankDelta(bank.A, bank.B, bank.per_rank(shares), kind=bank.kind)
