"""Modules of equal shapes, stacked: what is heavy runs once per group instead of once per module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracompose.composition.bank import RankBank
from loracompose.composition.linalg import truncate, working_dtype


@dataclass(frozen=True, eq=False)
class ModuleGroup:
    """G modules of one width, adapted by the same adapters at the same ranks.

    Attributes:
        modules: the G module paths.
        members: positions in the bank of the adapters that have these modules; they index the weights.
        fingerprints: content identity of the members.
        A: one tensor (G, r_i, d_in) per member.
        B: one tensor (G, d_out, r_i) per member.
    """

    modules: tuple[str, ...]
    members: tuple[int, ...]
    fingerprints: tuple[str, ...]
    A: tuple[Tensor, ...]
    B: tuple[Tensor, ...]

    @property
    def d_in(self) -> int:
        """Input width, or the vocabulary size of embeddings."""
        return self.A[0].shape[-1]

    @property
    def d_out(self) -> int:
        """Output width."""
        return self.B[0].shape[-2]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Rank of each member."""
        return tuple(A.shape[-2] for A in self.A)

    @property
    def total_rank(self) -> int:
        """R, the ranks of all members together."""
        return sum(self.ranks)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that the factors of all members promote to; what is handed back has it."""
        dtype = self.A[0].dtype
        for tensor in (*self.A, *self.B):
            dtype = torch.promote_types(dtype, tensor.dtype)
        return dtype

    @property
    def working_dtype(self) -> torch.dtype:
        """Dtype to compute in: float32 or wider."""
        return working_dtype(*self.A, *self.B)

    def pooled(self) -> tuple[Tensor, Tensor]:
        """The ranks of all members side by side, A (G, R, d_in) and B (G, d_out, R), in the working dtype."""
        dtype = self.working_dtype
        A = torch.cat([A.to(dtype) for A in self.A], dim=-2)
        B = torch.cat([B.to(dtype) for B in self.B], dim=-1)
        return A, B

    def per_rank(self, weights: Tensor) -> Tensor:
        """Spread the adapters' weights (K,) over the pooled ranks, (R,), in the working dtype."""
        of_member = weights.to(self.A[0].device, self.working_dtype)[list(self.members)]
        ranks = torch.tensor(self.ranks, device=of_member.device)
        return torch.repeat_interleave(of_member, ranks)

    def split(self, size: int) -> Iterator[ModuleGroup]:
        """The same modules in groups of at most `size`; the tensors are views."""
        for start in range(0, len(self.modules), size):
            part = slice(start, start + size)
            yield replace(
                self,
                modules=self.modules[part],
                A=tuple(A[part] for A in self.A),
                B=tuple(B[part] for B in self.B),
            )

    def unstack(self, A: Tensor, B: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors A (G, r, d_in) and B (G, d_out, r) per module, in the dtype of the members."""
        return {m: (A[i].to(self.dtype), B[i].to(self.dtype)) for i, m in enumerate(self.modules)}


def weighted_sum(group: ModuleGroup, weights: Tensor, rank: int | None = None) -> tuple[Tensor, Tensor]:
    """Σ w_i delta_W_i of at most `rank` ranks: the pooled factors, weights (K,) in B, or their best approximation.

    Exact, and no decomposition, where the members have no more than `rank` ranks together or rank is None.
    """
    A, B = group.pooled()
    B = B * group.per_rank(weights)
    return (A, B) if rank is None or rank >= group.total_rank else truncate(A, B, rank)


def group_modules(banks: Mapping[str, RankBank]) -> list[ModuleGroup]:
    """All modules, stacked by what must agree: widths, members, their ranks, dtypes and devices."""
    alike: dict[tuple[object, ...], list[RankBank]] = {}
    for module in sorted(banks):
        bank = banks[module]
        key = tuple((i, p.kind, p.A.shape, p.B.shape, p.A.dtype, p.B.dtype, p.A.device) for i, p in bank.present)
        alike.setdefault(key, []).append(bank)
    return [stack(group) for group in alike.values()]


def stack(banks: list[RankBank]) -> ModuleGroup:
    """One group from banks whose parts agree in shape, dtype and device."""
    members = tuple(i for i, _ in banks[0].present)
    parts = [[part for _, part in bank.present] for bank in banks]  # G lists of one entry per member
    return ModuleGroup(
        modules=tuple(bank.module for bank in banks),
        members=members,
        fingerprints=tuple(banks[0].fingerprints[i] for i in members),
        A=tuple(torch.stack([p.A for p in of_member]) for of_member in zip(*parts, strict=True)),
        B=tuple(torch.stack([p.B for p in of_member]) for of_member in zip(*parts, strict=True)),
    )
