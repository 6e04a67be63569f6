"""The two gates of SMoRA: over the ranks of the adapter it was trained with, and over those of a row's adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loracompose.composition.gates import GateContext
from loracompose.composition.linalg import working_dtype

LOAD = "smora.load "  # + module: scratch key of the tokens that each block of ranks was given


@dataclass(frozen=True, eq=False)
class BlockGate:
    """The paper's gate: a sigmoid router over blocks of ranks of one adapter.

    Attributes:
        router: W_g, (blocks, d_in).
        bias: c, balances the load, (blocks,); in float32 or better whatever the model computes in.
        block_of: block of each rank, (R,).
        active: blocks that act per token.
        normalised: whether the gates of a token are scaled to a fixed sum.
        bias_in_gate: whether c enters the value of a gate, or the choice alone.
        strength: r / k, what turns the stored scaling alpha/r into the paper's alpha/k.
        ranks_of: ranks of each block, (blocks, b); None where the bank holds ranks of others too.
    """

    router: Tensor
    bias: Tensor
    block_of: Tensor
    active: int
    normalised: bool
    bias_in_gate: bool
    strength: float
    ranks_of: Tensor | None = None

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> BlockGate:
        """The same gate on a device and in a dtype."""
        bias = self.bias.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
        router = self.router.to(device=device, dtype=dtype)
        ranks_of = None if self.ranks_of is None else self.ranks_of.to(device)
        return replace(self, router=router, bias=bias, block_of=self.block_of.to(device), ranks_of=ranks_of)

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The blocks that act and their gates, both (batch, seq, active)."""
        score = (x @ self.router.mT).to(working_dtype(x, self.bias)).sigmoid()  # (batch, seq, blocks)
        chosen = (score + self.bias).topk(self.active, dim=-1).indices  # (batch, seq, active)
        value = score.gather(-1, chosen)
        if self.bias_in_gate:  # a bias may outweigh the sigmoid: a gate never turns its rank around
            value = (value + self.bias[chosen]).clamp_min(0.0)
        if self.normalised:
            total = value.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
            value = value * (self.active / total)
        return chosen, value * self.strength

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R), the row's weight included; 0 for ranks that do not act."""
        chosen, value = self._noted(x, w, context)
        gates = value.new_zeros(*value.shape[:-1], len(self.bias)).scatter(-1, chosen, value)
        return gates.to(h)[..., self.block_of] * w[:, None, :]

    @property
    def n_active(self) -> int | None:
        """k, where the bank holds this adapter alone."""
        return None if self.ranks_of is None else self.active * self.ranks_of.shape[1]

    def few(self, x: Tensor, w: Tensor, context: GateContext) -> tuple[Tensor, Tensor]:
        """The ranks that act on a token and their multipliers, both (batch, seq, k)."""
        if self.ranks_of is None:
            raise ValueError("the bank holds ranks of several adapters: call the gate instead")
        chosen, value = self._noted(x, w, context)
        ranks = self.ranks_of[chosen].flatten(-2)  # (batch, seq, k)
        own = w[torch.arange(len(w), device=w.device)[:, None, None], ranks]
        return ranks, value.to(w).repeat_interleave(self.ranks_of.shape[1], dim=-1) * own

    def _noted(self, x: Tensor, w: Tensor, context: GateContext) -> tuple[Tensor, Tensor]:
        chosen, value = self.choose(x)
        if torch.is_grad_enabled():
            context.scratch[LOAD + context.module] = self._load(chosen, w, context)
        return chosen, value

    def _load(self, chosen: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """How many real tokens of the rows that use the adapter each block was given, (blocks,)."""
        counted = (w != 0).any(dim=1)[:, None]  # (batch, 1)
        valid = context.valid(chosen.shape[1])
        counted = counted.expand(chosen.shape[:2]) if valid is None else counted & valid
        return torch.bincount(chosen[counted].flatten(), minlength=len(self.bias))


@dataclass(frozen=True, eq=False)
class PoolGate:
    """The composition form: a router over the singular directions of all adapters of a row.

    Attributes:
        query: A_q, (q, d_in).
        key: B_qᵀ b_i / (‖b_i‖ √q) of every rank, (q, R); None for scores of 0, those of an untrained router.
        in_lengths: ‖a_i‖, (R,).
        out_lengths: ‖b_i‖, (R,).
        active: ranks that act per token.
    """

    query: Tensor | None
    key: Tensor | None
    in_lengths: Tensor
    out_lengths: Tensor
    active: int

    needs_layer_input: ClassVar[bool] = False

    def to(self, device: torch.device, dtype: torch.dtype) -> PoolGate:
        """The same gate on a device and in a dtype."""
        precise = torch.promote_types(dtype, torch.float32)
        in_lengths, out_lengths = (t.to(device=device, dtype=precise) for t in (self.in_lengths, self.out_lengths))
        if self.query is None or self.key is None:
            return replace(self, in_lengths=in_lengths, out_lengths=out_lengths)
        query, key = (t.to(device=device, dtype=dtype) for t in (self.query, self.key))
        return PoolGate(query, key, in_lengths, out_lengths, self.active)

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R): the weight of each rank kept times its learned factor, 0 for the others."""
        dtype = working_dtype(h)
        w = w.to(dtype)[:, None, :].expand(h.shape)
        h_in = torch.where(w != 0, h.to(dtype), 0.0)  # an adapter that overflows reaches no row that does not use it
        factor = self._score(x, h_in).sigmoid()  # (batch, seq, R)
        adds = h_in.abs() * self.out_lengths * w.abs()  # length of what each rank would add
        kept = self._keep(adds * factor)
        learned = factor / _weighted_mean(factor, torch.where(kept, adds, 0.0))
        return torch.where(kept, w * learned, 0.0).to(h)

    def _score(self, x: Tensor, h: Tensor) -> Tensor:
        if self.query is None or self.key is None:
            return torch.zeros_like(h)
        along = (x @ self.query.mT @ self.key).to(h)  # (batch, seq, R)
        return along * h / self.in_lengths.clamp_min(_tiny(self.in_lengths))

    def _keep(self, score: Tensor) -> Tensor:
        if self.active >= score.shape[-1]:
            return torch.ones_like(score, dtype=torch.bool)
        top = score.topk(self.active, dim=-1).indices
        return torch.zeros_like(score, dtype=torch.bool).scatter(-1, top, True)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """Mean of the last axis, kept, by weights of at least 0 of any size; 1 where all weights are 0."""
    weights = weights / weights.amax(dim=-1, keepdim=True).clamp_min(_tiny(weights))
    total = weights.sum(dim=-1, keepdim=True)
    mean = (weights * values).sum(dim=-1, keepdim=True) / total.clamp_min(_tiny(total))
    return torch.where(total > 0, mean.clamp_min(_tiny(mean)), 1.0)


def _tiny(tensor: Tensor) -> float:
    return float(torch.finfo(tensor.dtype).tiny)
