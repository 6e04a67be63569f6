"""Gates whose doings a test can predict, and deltas of random factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from loracompose.adapters.lora import Kind
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext


def random_delta(
    d_in: int = 12, d_out: int = 9, *, ranks: int = 5, weights: Tensor, seed: int = 0, kind: Kind = "linear"
) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(ranks, d_in, generator=generator, dtype=torch.float64)
    return LowRankDelta(A, torch.randn(d_out, ranks, generator=generator, dtype=torch.float64), weights, kind=kind)


@dataclass(frozen=True, eq=False)
class Recorder:
    """Passes every rank at its weight and writes down what it was shown."""

    needs_layer_input: bool = False
    seen: list[GateContext] = field(default_factory=list)
    moved_to: list[torch.dtype] = field(default_factory=list)

    def to(self, device: torch.device, dtype: torch.dtype) -> Recorder:
        self.moved_to.append(dtype)
        return self

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        self.seen.append(context)
        return w[:, None, :].expand_as(h)


@dataclass(frozen=True, eq=False)
class DecidedAtPrefill:
    """Scales each row by the mean of its real prompt tokens, decided once and found again in the memory."""

    needs_layer_input: ClassVar[bool] = True

    def to(self, device: torch.device, dtype: torch.dtype) -> DecidedAtPrefill:
        return self

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        memory: Mapping[str, Tensor] = context.memory
        if context.module not in memory:
            assert context.layer_input is not None
            real = torch.ones(x.shape[:2]) if context.attention_mask is None else context.attention_mask
            real = real[:, :, None].to(x)
            context.memory[context.module] = (context.layer_input * real).sum(dim=(1, 2)) / real.sum(dim=(1, 2))
        return w[:, None, :] * (2 + memory[context.module])[:, None, None]
