"""Banks whose ranks are singular directions: what a rank-wise method may look at without depending on the gauge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from loracompose.adapters.lora import LoraFactors
from loracompose.composition.bank import RankBank
from loracompose.composition.grouping import group_modules
from loracompose.composition.linalg import canonical


def canonical_banks(banks: Mapping[str, RankBank]) -> dict[str, RankBank]:
    """The same updates with every adapter's ranks as its own singular directions, balanced: ‖a_i‖ = ‖b_i‖ = √s_i.

    Each adapter is rewritten alone, so its ranks stay its own and ΔW_i stays as it is. Modules of equal shapes are
    decomposed in one call.
    """
    parts: dict[str, dict[int, LoraFactors]] = {module: {} for module in banks}
    for group in group_modules(banks):
        for i, A, B in zip(group.members, group.A, group.B, strict=True):
            A, B = canonical(A, B)  # (G, r, d_in), (G, d_out, r)
            for module, own_A, own_B in zip(group.modules, A, B, strict=True):
                parts[module][i] = LoraFactors(own_A, own_B, banks[module].kind)
    return {
        module: replace(bank, parts=tuple(parts[module].get(i) for i in range(bank.n_adapters)))
        for module, bank in banks.items()
    }
