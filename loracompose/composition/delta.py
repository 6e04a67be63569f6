"""LowRankDelta: what is added to the output of one module."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from loracompose.adapters.lora import Kind
from loracompose.composition.gates import Gate, GateContext


@dataclass(frozen=True, eq=False)
class LowRankDelta:
    """y += B (g * (A x)), with g the weights of the ranks or, token by token, what the gate makes of them.

    Attributes:
        A: (R, d_in), shared by all rows, or (batch, R, d_in).
        B: (d_out, R) or (batch, d_out, R).
        weights: (batch, R); 0 switches a rank off for a row.
        gate: None for a static delta.
        kind: "embedding" if x holds token ids.

    Raises:
        ValueError: shapes do not belong together, or a gate is given with a batch axis.
    """

    A: Tensor
    B: Tensor
    weights: Tensor
    gate: Gate | None = None
    kind: Kind = "linear"

    def __post_init__(self) -> None:
        batch, ranks = self.weights.shape
        lead = () if self.A.ndim == 2 else (batch,)
        fits = self.A.shape[:-1] == (*lead, ranks) and self.B.shape[:-2] == lead and self.B.shape[-1] == ranks
        if not fits:
            raise ValueError(
                f"A {tuple(self.A.shape)}, B {tuple(self.B.shape)} and weights {tuple(self.weights.shape)} "
                "must be ([batch,] R, d_in), ([batch,] d_out, R) and (batch, R)"
            )
        if self.gate is not None and self.per_row:
            raise ValueError("a gated delta shares its ranks between the rows: A must be (R, d_in)")

    @property
    def per_row(self) -> bool:
        """Whether every row has ranks of its own."""
        return self.A.ndim == 3

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.weights.shape[0]

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRankDelta:
        """The same delta on a device and in a dtype."""
        A, B, w = (t.to(device=device, dtype=dtype) for t in (self.A, self.B, self.weights))
        gate = None if self.gate is None else self.gate.to(device, dtype)
        return replace(self, A=A, B=B, weights=w, gate=gate)

    def repeat(self, times: int) -> LowRankDelta:
        """Every row `times` times in a row, the order in which `generate` lays out beams and samples."""
        if times == 1:
            return self
        weights = self.weights.repeat_interleave(times, dim=0)
        if not self.per_row:
            return replace(self, weights=weights)
        A, B = self.A.repeat_interleave(times, dim=0), self.B.repeat_interleave(times, dim=0)
        return replace(self, A=A, B=B, weights=weights)

    def shrink(self, x: Tensor) -> Tensor:
        """A x for every rank: (batch, seq, d_in), or ids (batch, seq), to (batch, seq, R)."""
        if self.kind == "linear":
            return x @ self.A.mT
        if not self.per_row:
            return F.embedding(x, self.A.mT)
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        return self.A.mT[rows, x]  # (batch, seq, R)

    def __call__(self, x: Tensor, context: GateContext | None = None) -> Tensor:
        """What the module's output gains, (batch, seq, d_out)."""
        return self.expand(x, self.shrink(x), context)

    def expand(self, x: Tensor, h: Tensor, context: GateContext | None = None) -> Tensor:
        """What the module's output gains, (batch, seq, d_out), from x and h = x Aᵀ, (batch, seq, R)."""
        if self.gate is None:
            g = self.weights[:, None, :]  # (batch, 1, R)
        else:
            g = self.gate(x, h, self.weights, context or GateContext(module=""))
        # Not h * g alone: an adapter that overflows must not turn rows that do not use it, nor the gradients of their
        # gates, into inf * 0 = nan.
        passes = g != 0
        if self.gate is not None and torch.is_grad_enabled():
            # The derivative by a member's share is h, also where the share happens to be 0.
            passes = passes | ((self.weights[:, None, :] != 0) & h.isfinite())
        return (torch.where(passes, h, 0.0) * g) @ self.B.mT
