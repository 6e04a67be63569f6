"""Arrow: each token goes to the adapters whose strongest input direction it points along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from loracompose.adapters.lora import Kind
from loracompose.composers.base import Scope
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.composition.grouping import group_modules
from loracompose.composition.linalg import factored_svd, working_dtype
from loracompose.composition.settings import check_count, is_finite


@dataclass(frozen=True)
class Arrow:
    """y = W x + Σ_i p_i(x) B_i A_i x with p = softmax over the top k of |⟨x, v_i⟩| / temperature.

    The prototype v_i is the top right singular vector of adapter i's update in the module: the input direction
    that the adapter amplifies most, of unit norm, its sign ignored. Routing is decided per token and per module,
    and it replaces the weights: a weight other than 0 makes an adapter a member of its row, its size does not
    enter. An adapter whose update of a module is missing or zero has no direction there and is no candidate. The
    "x" of an embedding is the one-hot vector of a token id, so ⟨x, v_i⟩ is an entry of v_i.

    Outputs are mixed, as PEFT does; the authors' code mixes A and B separately by default, which adds cross terms.
    Prototypes come from an exact SVD instead of PEFT's 15 steps of power iteration, and ranks and modules of the
    adapters may differ.

    Source: Towards Modular LLMs by Building and Reusing a Library of LoRAs, arXiv:2405.11157, section 4 "Arrow".

    Args:
        top_k: candidates kept per token; None keeps all.
        temperature: divides the logits; large is uniform over the candidates kept.

    Raises:
        ValueError: a field is out of its range.
    """

    top_k: int | None = 3
    temperature: float = 1.0

    name: ClassVar[str] = "arrow"
    source: ClassVar[str] = "Arrow, arXiv:2405.11157"
    scope: ClassVar[Scope] = "token"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_count("Arrow", "top_k", self.top_k, optional=True)
        if not (is_finite(self.temperature) and self.temperature > 0):
            raise ValueError(f"Arrow: temperature must be a finite number above 0, got {self.temperature!r}")

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, gated by its adapter's share of the token."""
        gates = {module: self._gate(banks[module], top) for module, top in top_directions(banks).items()}
        return {
            module: LowRankDelta(bank.A, bank.B, bank.per_rank(weights), gates[module], bank.kind)
            for module, bank in banks.items()
        }

    def _gate(self, bank: RankBank, prototypes: Tensor) -> ArrowGate:
        return ArrowGate(prototypes, bank.owner, prototypes.any(dim=1), self.top_k, self.temperature, bank.kind)


def top_directions(banks: Mapping[str, RankBank]) -> dict[str, Tensor]:
    """Top right singular vector of every adapter's update, (K, d_in) per module; zeros where there is no update."""
    directions = {m: bank.A.new_zeros(bank.n_adapters, bank.A.shape[1]) for m, bank in banks.items()}
    for group in group_modules(banks):
        for i, A, B in zip(group.members, group.A, group.B, strict=True):
            _, S, Vt = factored_svd(A, B)
            if not S.shape[-1]:
                continue
            top = Vt[:, 0] * (S[:, :1] > 0)  # (G, d_in)
            for module, direction in zip(group.modules, top, strict=True):
                directions[module][i] = direction
    return directions


@dataclass(frozen=True, eq=False)
class ArrowGate:
    """Shares of a token between adapters, spread over their ranks.

    Attributes:
        prototypes: (K, d_in), unit rows, zero rows where an adapter does not change the module.
        owner: adapter of each rank, (R,).
        changes: adapters that change the module, (K,).
        top_k: candidates kept, None for all.
        temperature: divides the logits.
        kind: "embedding" if x holds token ids.
    """

    prototypes: Tensor
    owner: Tensor
    changes: Tensor
    top_k: int | None
    temperature: float
    kind: Kind

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> ArrowGate:
        """The same gate on a device and in a dtype."""
        owner, changes = self.owner.to(device), self.changes.to(device)
        return replace(self, prototypes=self.prototypes.to(device, dtype), owner=owner, changes=changes)

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R): the share of each rank's adapter."""
        along = F.embedding(x, self.prototypes.mT) if self.kind == "embedding" else x @ self.prototypes.mT
        logits = along.to(working_dtype(along)).abs() / self.temperature  # (batch, seq, K)
        candidate = (self._members(w) & self.changes)[:, None, :]  # (batch, 1, K)
        logits = logits.masked_fill(~candidate, -torch.inf)
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            top = logits.topk(self.top_k, dim=-1)
            logits = torch.full_like(logits, -torch.inf).scatter(-1, top.indices, top.values)
        # a row without candidates is all -inf, whose softmax is nan
        shares = logits.softmax(dim=-1).masked_fill(logits == -torch.inf, 0.0)
        return shares.to(h)[..., self.owner]  # (batch, seq, R)

    def _members(self, w: Tensor) -> Tensor:
        """Adapters that belong to a row, (batch, K), from the weights of their ranks (batch, R)."""
        member = torch.zeros(w.shape[0], self.changes.shape[0], dtype=torch.bool, device=w.device)
        member[:, self.owner] = w != 0  # every rank of an adapter says the same
        return member
