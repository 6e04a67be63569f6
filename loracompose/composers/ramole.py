"""RAMoLE: a router that serves any adapter weighs the retrieved ones, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composers.router_lora import (
    Elsewhere,
    RouterPair,
    check_elsewhere,
    draw_pairs,
    find_pair,
)
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext, masked_softmax
from loracompose.composition.linalg import working_dtype
from loracompose.composition.router import Router
from loracompose.composition.settings import check_count, check_router, filled

DEFAULTS: Mapping[str, Any] = {"rank": 8}


@dataclass(frozen=True)
class Ramole(GradientTrained):
    """y = W x + Σ_i α_i v_i with v_i = ΔW_i x and α = softmax over the row's adapters of ⟨A_r x, B_rᵀ v_i⟩ / √r.

    The RouterLoRA (A_r, B_r) of a module is shared by all adapters: it looks at what an adapter would add, not at
    which adapter it is, so one router serves adapters that are uploaded later (`router.adapters` is None). Routing is
    per token and per module, and replaces the weights: a weight other than 0 makes an adapter a member of its row, its
    size does not enter. The shares of a row's members that have the module sum to 1. B_rᵀ v_i is computed as
    (B_rᵀ B_i)(A_i x), with the r x r products made once per composition.

    What the paper leaves open, or we do otherwise:
      * Softmax runs over the row's own adapters (the paper gathers them; the authors' code lets it run over those of
        the whole batch).
      * v_i in the scores includes the adapter's scaling alpha/r. The authors' code leaves it out, in a pool where it is
        2 for every adapter and B_r absorbs it; where scalings differ, only the scaled v_i is what the adapter adds.
      * A_r is drawn Kaiming-uniform, B_r is zero: an untrained router is the uniform mixture.
      * The paper routes every adapted module. One that the router was not trained on is refused by name or, with
        `elsewhere="untrained"`, gets the uniform mixture. Embeddings always do.

    Source: Retrieval-Augmented Mixture of LoRA Experts for Uploadable Machine Learning, arXiv:2406.16989, eqs. 6-15.

    Args:
        router: what it learned; setting "rank": r.
        elsewhere: "refuse" or "untrained": what becomes of a module that the router was not trained on.

    Raises:
        ValueError: a field is out of its range, or the router is another method's.
    """

    router: Router
    elsewhere: Elsewhere = "refuse"

    name: ClassVar[str] = "ramole"
    source: ClassVar[str] = "RAMoLE, arXiv:2406.16989"
    scope: ClassVar[Scope] = "token"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("Ramole", self.name, self.router)
        check_elsewhere("Ramole", self.elsewhere)

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """A router whose shares are uniform; settings: "rank", 8 by default."""
        chosen = filled("Ramole", settings, DEFAULTS)
        check_count("ramole", "rank", chosen["rank"])
        tensors = draw_pairs(pool.banks, chosen["rank"], seed)
        return Router(cls.name, chosen, tensors, pool.base_model)

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, gated by its adapter's share of the token."""
        return {module: self._delta(bank, weights) for module, bank in banks.items()}

    def _delta(self, bank: RankBank, weights: Tensor) -> LowRankDelta:
        w = bank.per_rank(weights)  # (batch, R)
        pair = find_pair(self.router, bank, bool(w.any()), self.elsewhere)
        if pair is None:
            return LowRankDelta(bank.A, bank.B, uniform_shares(bank, weights), kind=bank.kind)
        return LowRankDelta(bank.A, bank.B, w, _gate(pair, bank), bank.kind)


def uniform_shares(bank: RankBank, weights: Tensor) -> Tensor:
    """1/n for each rank of the n adapters of a row that have the module, (batch, R); 0 for the others."""
    present = [i for i, _ in bank.present]
    count = (weights[:, present] != 0).sum(dim=1, keepdim=True)  # (batch, 1)
    return bank.per_rank((weights != 0) / count.clamp_min(1))


def _gate(pair: RouterPair, bank: RankBank) -> RamoleGate:
    return RamoleGate(pair.A, pair.key(bank.B), bank.owner, bank.n_adapters)


@dataclass(frozen=True, eq=False)
class RamoleGate:
    """Shares of a token between adapters, spread over their ranks.

    Attributes:
        query: A_r, (r, d_in).
        key: B_rᵀ B / √r, the products B_rᵀ B_i side by side, (r, R).
        owner: adapter of each rank, (R,).
        n_adapters: K.
    """

    query: Tensor
    key: Tensor
    owner: Tensor
    n_adapters: int

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> RamoleGate:
        """The same gate on a device and in a dtype."""
        query, key = (t.to(device=device, dtype=dtype) for t in (self.query, self.key))
        return replace(self, query=query, key=key, owner=self.owner.to(device))

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R): the share of each rank's adapter."""
        member = w != 0  # (batch, R)
        along = x @ self.query.mT @ self.key  # (batch, seq, R): what one unit of each rank scores
        dtype = working_dtype(h)
        # an adapter that overflows must not reach rows that do not use it, nor their gradients
        terms = along.to(dtype) * torch.where(member[:, None, :], h.to(dtype), 0.0)
        scores = terms.new_zeros(*terms.shape[:-1], self.n_adapters).index_add(-1, self.owner, terms)
        candidate = torch.zeros(w.shape[0], self.n_adapters, dtype=torch.bool, device=w.device)
        candidate[:, self.owner] = member  # every rank of an adapter says the same
        shares = masked_softmax(scores, candidate[:, None, :])  # (batch, seq, K)
        return shares.to(h)[..., self.owner]
