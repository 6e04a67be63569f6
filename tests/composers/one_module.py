"""Adapters of one module "m", 12 -> 9, of any ranks, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, LoraFactors


def factors(rank: int, seed: int, d_in: int = 12, d_out: int = 9) -> LoraFactors:
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    return LoraFactors(A, torch.randn(d_out, rank, generator=generator, dtype=torch.float64))


def pool(*ranks: int) -> list[Adapter]:
    return [Adapter(f"a{i}", {"m": factors(rank, seed=i + 1)}) for i, rank in enumerate(ranks)]


def tokens(batch: int = 2, seq: int = 5, d_in: int = 12) -> Tensor:
    return torch.randn(batch, seq, d_in, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
