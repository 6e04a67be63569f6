"""Banks whose ranks are singular directions: what a rank-wise method may look at without depending on the gauge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loracompose.adapters.lora import LoraFactors
from loracompose.composition.bank import RankBank
from loracompose.composition.cache import Composed
from loracompose.composition.linalg import canonical


def canonical_banks(banks: Mapping[str, RankBank]) -> dict[str, RankBank]:
    """The same updates with every adapter's ranks as its own singular directions, balanced: ‖a_i‖ = ‖b_i‖ = √s_i.

    Each adapter is rewritten alone, so its ranks stay its own and ΔW_i stays as it is.
    """
    adapters = range(next(iter(banks.values())).n_adapters if banks else 0)
    return banks_of(banks, [canonical_factors(parts_of(banks, i)) for i in adapters])


def parts_of(banks: Mapping[str, RankBank], i: int) -> dict[str, LoraFactors]:
    """The factors of one adapter by module."""
    return {module: part for module, bank in banks.items() if (part := bank.parts[i]) is not None}


def canonical_factors(parts: Mapping[str, LoraFactors]) -> Composed:
    """One adapter's factors with singular directions as ranks; modules of equal shapes are decomposed in one call."""
    alike: dict[tuple[object, ...], list[str]] = {}
    for module, part in parts.items():
        key = part.A.shape, part.B.shape, part.A.dtype, part.B.dtype, part.A.device
        alike.setdefault(key, []).append(module)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for modules in alike.values():
        A, B = canonical(*(torch.stack([getattr(parts[m], side) for m in modules]) for side in "AB"))
        B = B.mT.contiguous().mT  # rank after rank, as a bank holds it
        found |= {m: (own_A, own_B) for m, own_A, own_B in zip(modules, A, B, strict=True)}
    return found


def banks_of(banks: Mapping[str, RankBank], factors: Sequence[Composed]) -> dict[str, RankBank]:
    """The banks with other factors of their adapters, one mapping for each adapter."""
    return {
        module: replace(
            bank,
            parts=tuple(LoraFactors(*own[module], bank.kind) if module in own else None for own in factors),
        )
        for module, bank in banks.items()
    }
