"""RankBank: the ranks of K adapters side by side for one module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, Kind, LoraFactors


@dataclass(frozen=True, eq=False)
class RankBank:
    """The ranks that K adapters have for one module; an adapter without that module owns none.

    Attributes:
        module: module path in the base model.
        parts: one entry per adapter, None where the adapter leaves the module alone.
        fingerprints: content identity of the K adapters; seeds what is random in a composition.
    """

    module: str
    parts: tuple[LoraFactors | None, ...]
    fingerprints: tuple[str, ...]

    @classmethod
    def gather(cls, adapters: Sequence[Adapter], module: str) -> RankBank:
        """The bank of one module.

        Raises:
            LookupError: no adapter has the module.
            ValueError: two adapters disagree about its kind or shape.
        """
        parts = tuple(adapter.factors.get(module) for adapter in adapters)
        shapes = {(p.kind, p.d_in, p.d_out): a.name for p, a in zip(parts, adapters, strict=True) if p is not None}
        if not shapes:
            raise LookupError(f"none of {[a.name for a in adapters]} adapts {module!r}")
        if len(shapes) > 1:
            found = ", ".join(f"{name!r} has {kind} {d_in} -> {d_out}" for (kind, d_in, d_out), name in shapes.items())
            raise ValueError(f"{module!r}: {found}; adapters of one composition must fit one base model")
        return cls(module, parts, tuple(a.fingerprint for a in adapters))

    @property
    def n_adapters(self) -> int:
        """K, members without this module included."""
        return len(self.parts)

    @property
    def present(self) -> tuple[tuple[int, LoraFactors], ...]:
        """(adapter, factors) for the adapters that have this module."""
        return tuple((i, part) for i, part in enumerate(self.parts) if part is not None)

    @property
    def kind(self) -> Kind:
        """What the module is: "linear" or "embedding"."""
        return self.present[0][1].kind

    @cached_property
    def A(self) -> Tensor:
        """All rows of A, (R, d_in)."""
        return torch.cat([part.A for _, part in self.present])

    @cached_property
    def B(self) -> Tensor:
        """All columns of B, (d_out, R); in memory rank after rank, as the operator reads them."""
        return torch.cat([part.B.mT for _, part in self.present]).mT

    @cached_property
    def owner(self) -> Tensor:
        """The adapter that each rank belongs to, (R,) int64 in 0..K-1."""
        return torch.arange(self.n_adapters).repeat_interleave(torch.tensor(self.ranks)).to(self.A.device)

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """How many ranks each of the K adapters has here; 0 where it leaves the module alone."""
        return tuple(0 if part is None else part.rank for part in self.parts)

    def per_rank(self, weights: Tensor) -> Tensor:
        """Spread adapter weights (batch, K) over the ranks, (batch, R)."""
        if weights.ndim != 2 or weights.shape[1] != self.n_adapters:
            raise ValueError(f"weights must be (batch, {self.n_adapters}), got {tuple(weights.shape)}")
        return weights.to(self.A)[:, self.owner]  # (batch, R)

    def select(self, members: Sequence[int]) -> RankBank | None:
        """The bank of some adapters only, renumbered; None if none of them has the module."""
        parts = tuple(self.parts[i] for i in members)
        if all(part is None for part in parts):
            return None
        return replace(self, parts=parts, fingerprints=tuple(self.fingerprints[i] for i in members))


def gather_banks(adapters: Sequence[Adapter]) -> dict[str, RankBank]:
    """The banks of every module that at least one adapter has, sorted by module path."""
    modules = sorted({module for adapter in adapters for module in adapter.factors})
    return {module: RankBank.gather(adapters, module) for module in modules}


def rank_weights(banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, Tensor]:
    """`RankBank.per_rank` of every module; one tensor for all modules in which the adapters have the same ranks.

    That they share it spares the operator to find out that what their rows use is equal.

    Args:
        banks: module path -> ranks of the K adapters.
        weights: (batch, K).
    """
    made: dict[tuple[object, ...], Tensor] = {}
    found = {}
    for module, bank in banks.items():
        key = bank.ranks, bank.A.dtype, bank.A.device
        if key not in made:
            made[key] = bank.per_rank(weights)
        found[module] = made[key]
    return found


def content_order(adapters: Sequence[Adapter]) -> list[int]:
    """Positions of the adapters sorted by content, so that no composition depends on the order given."""
    return sorted(range(len(adapters)), key=lambda i: adapters[i].fingerprint)


def select_banks(banks: Mapping[str, RankBank], members: Sequence[int]) -> dict[str, RankBank]:
    """The banks of some adapters only; modules that none of them has are left out."""
    chosen = {module: bank.select(members) for module, bank in banks.items()}
    return {module: bank for module, bank in chosen.items() if bank is not None}
