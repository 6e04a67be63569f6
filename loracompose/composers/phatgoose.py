"""PHATGOOSE: every adapter brings a gate vector of its own; each token goes to the adapters whose vectors it fits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext, masked_softmax
from loracompose.composition.router import Router
from loracompose.composition.settings import check_choice, check_count, check_router, filled

Phase = Literal["routing", "training"]


@dataclass(frozen=True)
class Phatgoose(GradientTrained):
    """y = W x + Σ_i p_i B_i A_i x with p = softmax over the top k of ⟨LN(x), LN(v_i)⟩ / √d, LN without scale or shift.

    The gate vector v_i (d_in,) of adapter i in a module is trained after the adapter, for the adapter alone and on its
    own data: phase "training" runs y = W x + σ(⟨v_i, x⟩) B_i A_i x, v_i = 0 at first (100 steps in the paper), on rows
    whose one member is the adapter that the row's data belongs to. All vectors are trained in one run: a row's gradient
    reaches those of its member alone.

    Routing is per token and per module, and replaces the weights: a weight other than 0 makes an adapter a member of
    its row, its size does not enter. A member that leaves the module alone is no candidate there. An untrained vector
    has score 0. Embeddings are not gated: there the weights count,
    as in `mixture`.

    Source: Learning to Route Among Specialized Experts for Zero-Shot Generalization, arXiv:2402.05859, section 3.

    Args:
        router: the gate vectors of the adapters it was trained on.
        top_k: candidates kept per token; None keeps all.
        phase: "routing", or "training" for the gates that the vectors are trained through.

    Raises:
        ValueError: a field is out of its range, or another method's router.
    """

    router: Router
    top_k: int | None = 2
    phase: Phase = "routing"

    name: ClassVar[str] = "phatgoose"
    source: ClassVar[str] = "PHATGOOSE, arXiv:2402.05859"
    scope: ClassVar[Scope] = "token"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("Phatgoose", self.name, self.router)
        check_count("Phatgoose", "top_k", self.top_k, optional=True)
        check_choice("Phatgoose", "phase", self.phase, get_args(Phase))

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """Zero vectors; there are no settings."""
        filled("Phatgoose", settings, {})
        linear = {module: bank for module, bank in pool.banks.items() if bank.kind == "linear"}
        tensors = {f"{module}.gate": torch.zeros(len(pool.names), bank.A.shape[1]) for module, bank in linear.items()}
        return Router(cls.name, {}, tensors, pool.base_model, pool.adapters)

    @classmethod
    def training(cls, router: Router) -> Phatgoose:
        """What a trainer runs in place of the class."""
        return cls(router, phase="training")

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, gated by how well its adapter's vector fits the token.

        Raises:
            LookupError: an adapter or a module that the router was not trained for.
            ValueError: a row of several members in phase "training".
        """
        if self.phase == "training" and ((weights != 0).sum(dim=1) > 1).any():
            raise ValueError(
                "Phatgoose: a row has several members, but a gate vector is trained with its own adapter alone: give "
                'each row one, as members="own" of RouterRecipe does'
            )
        return {module: self._delta(bank, weights) for module, bank in banks.items()}

    def _delta(self, bank: RankBank, weights: Tensor) -> LowRankDelta:
        gate = self._gate(bank) if bank.kind == "linear" else None
        return LowRankDelta(bank.A, bank.B, bank.per_rank(weights), gate, bank.kind)

    def _gate(self, bank: RankBank) -> PhatgooseGate:
        count, columns = len(self.router.adapters or ()), self.router.columns(bank.fingerprints)
        vectors = self.router.tensor(f"{bank.module}.gate", (count, bank.A.shape[1]))[columns]  # (K, d_in)
        return PhatgooseGate(vectors, bank.owner, self.top_k, self.phase)


@dataclass(frozen=True, eq=False)
class PhatgooseGate:
    """Shares of a token between adapters, spread over their ranks.

    Attributes:
        vectors: v, (K, d_in).
        owner: adapter of each rank, (R,).
        top_k: candidates kept, None for all.
        phase: "routing" or "training".
    """

    vectors: Tensor
    owner: Tensor
    top_k: int | None
    phase: Phase

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> PhatgooseGate:
        """The same gate on a device, its vectors in float32 or better."""
        vectors = self.vectors.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
        return replace(self, vectors=vectors, owner=self.owner.to(device))

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R): the share of each rank's adapter."""
        candidate = torch.zeros(w.shape[0], len(self.vectors), dtype=torch.bool, device=w.device)
        candidate[:, self.owner] = w != 0  # every rank of an adapter says the same
        shares = self.shares(x.to(self.vectors.dtype), candidate[:, None, :])  # (batch, seq, K)
        return shares.to(h)[..., self.owner]

    def shares(self, x: Tensor, candidate: Tensor) -> Tensor:
        """Shares (batch, seq, K) of tokens (batch, seq, d_in) between the candidates, (batch, 1, K) bool."""
        width = x.shape[-1:]
        if self.phase == "training":
            return torch.sigmoid(x @ self.vectors.mT) * candidate
        scores = F.layer_norm(x, width) @ F.layer_norm(self.vectors, width).mT / width[0] ** 0.5  # (batch, seq, K)
        candidate = candidate.expand_as(scores)
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            best = scores.masked_fill(~candidate, -torch.inf).topk(self.top_k, dim=-1).indices
            candidate = candidate & torch.zeros_like(candidate).scatter(-1, best, True)
        return masked_softmax(scores, candidate)
