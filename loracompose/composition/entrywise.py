"""Compositions defined entry by entry of delta_W: drop, trim, combine, re-compress."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loracompose.composition.bank import RankBank
from loracompose.composition.blocks import Block, chunks, compress, member_updates, picked_entries, row_blocks
from loracompose.composition.grouping import ModuleGroup, group_modules, weighted_sum
from loracompose.composition.settings import check_count
from loracompose.composition.sparsity import check_sparsity, drop_out, mask_stream, trim
from loracompose.composition.thresholds import magnitude_thresholds

Combine = Callable[[Sequence[Tensor], Sequence[float], float], Tensor]
"""(updates of the members, their weights, Σ|w| of the row) -> composed entries."""


@dataclass(frozen=True)
class EntrywiseMerge:
    """Drop entries at random, keep the largest of the rest, combine the members, compress to ranks.

    Works on blocks of rows within `block_bytes`; the result depends on that budget only by rounding.

    Attributes:
        owner: the composer, for messages.
        combine: what is made of the members' entries.
        drop: probability of dropping an entry; the others are divided by 1 - drop.
        density: share of the entries of each adapter to keep, over all its modules together, after dropping.
        scale: factor of the result.
        rank: ranks per module of the result; None: the sum of the members' ranks.
        seed: of the masks and of the range finder.
        block_bytes: budget of the dense blocks.

    Raises:
        ValueError: a field is out of its range.
    """

    owner: str
    combine: Combine
    drop: float
    density: float
    scale: float
    rank: int | None
    seed: int
    block_bytes: int

    def __post_init__(self) -> None:
        check_sparsity(self.owner, self.drop, self.density, self.scale)
        check_count(self.owner, "rank", self.rank, optional=True)
        check_count(self.owner, "seed", self.seed, least=0)
        check_count(self.owner, "block_bytes", self.block_bytes)

    def __call__(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors per module for adapters of weights (K,), none 0."""
        parts = chunks(group_modules(banks), self.block_bytes)
        thresholds = self._thresholds(parts, len(weights))
        w = weights.tolist()
        composed: dict[str, tuple[Tensor, Tensor]] = {}
        for part in parts:
            rank = part.total_rank if self.rank is None else self.rank
            A, B = compress(part, self._composed_blocks(part, w, thresholds), rank, self.seed, self.block_bytes)
            composed |= part.unstack(A, self.scale * B)
        return composed

    def _composed_blocks(
        self, part: ModuleGroup, weights: Sequence[float], thresholds: Sequence[float]
    ) -> Callable[[], Iterator[Block]]:
        own = [weights[i] for i in part.members]
        mass = sum(abs(w) for w in weights)

        def blocks() -> Iterator[Block]:
            for rows, updates in self._member_blocks(part):
                trimmed = [trim(u, thresholds[i]) for i, u in zip(part.members, updates, strict=True)]
                yield rows, self.combine(trimmed, own, mass)

        return blocks

    def _member_blocks(self, part: ModuleGroup) -> Iterator[tuple[slice, list[Tensor]]]:
        streams = [[mask_stream(who, module, self.seed) for module in part.modules] for who in part.fingerprints]
        for rows in row_blocks(part, self.block_bytes):
            updates = member_updates(part, rows)
            yield rows, [drop_out(u, self.drop, own) for u, own in zip(updates, streams, strict=True)]

    def _thresholds(self, parts: Sequence[ModuleGroup], n_adapters: int) -> list[float]:
        sizes = [0] * n_adapters
        for part in parts:
            for i in part.members:
                sizes[i] += len(part.modules) * part.d_out * part.d_in

        def entries() -> Iterator[tuple[int, Tensor]]:
            for part in parts:
                for _, updates in self._member_blocks(part):
                    yield from zip(part.members, updates, strict=True)

        dtype = torch.float64 if any(part.working_dtype == torch.float64 for part in parts) else torch.float32

        def picked(strides: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
            for part in parts:
                for place, i in enumerate(part.members):
                    yield i, picked_entries(part, place, strides[i])

        # which entries are dropped is known only in the order in which all of them are drawn
        return magnitude_thresholds(entries, sizes, self.density, dtype, None if self.drop else picked)


def sum_updates(banks: Mapping[str, RankBank], weights: Tensor, rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Σ w_i delta_W_i per module, exact for rank None; what dropping and trimming nothing comes to."""
    composed: dict[str, tuple[Tensor, Tensor]] = {}
    for group in group_modules(banks):
        composed |= group.unstack(*weighted_sum(group, weights, rank))
    return composed
