"""The equal forms of the static deltas of modules that read one input: a shared bank, or one for each composition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.rows import Gathering, RowUse


class BankForm(Protocol):
    """The deltas of a group of modules, prepared."""

    def shrink(self, x: Tensor) -> Any:
        """What B is multiplied with, for all modules of the group at once; x is (batch * times, seq, d_in)."""
        ...

    def add(self, member: int, h: Any, output: Tensor, *, own: bool) -> Tensor:
        """The output of one module, (batch * times, seq, d_out), with what its delta adds.

        Args:
            member: which module.
            h: what `shrink` gave.
            output: of the module alone.
            own: whether the output is contiguous and nobody else's, and so may be written to.
        """
        ...


@dataclass(frozen=True, eq=False)
class GroupBank:
    """The ranks that a batch uses of the modules of a group, contiguous.

    Attributes:
        use: which rows use what, on the CPU.
        A: (R, d_in), the ranks of all modules one after the other.
        B: for every module (R_i, d_out), rank by rank.
    """

    use: RowUse
    A: Tensor
    B: tuple[Tensor, ...]

    @classmethod
    def build(cls, deltas: Sequence[LowRankDelta], use: RowUse, *, copied: bool = False) -> GroupBank:
        """Put together the ranks of static deltas of linear modules that some row uses.

        Args:
            deltas: one a module.
            use: which rows use what.
            copied: whether nothing may be memory of the deltas, which gradients need if they are inference tensors.
        """
        A = [_rows(d.A, used) for d, used in zip(deltas, use.used, strict=True)]
        B = [_rows(d.B.mT, used) for d, used in zip(deltas, use.used, strict=True)]
        if copied:
            return cls(use, torch.cat(A), tuple(bank.clone(memory_format=torch.contiguous_format) for bank in B))
        return cls(use, A[0].contiguous() if len(A) == 1 else torch.cat(A), tuple(bank.contiguous() for bank in B))

    @property
    def banks(self) -> tuple[Tensor, ...]:
        """A, then every module's B."""
        return self.A, *self.B

    @cached_property
    def ranks(self) -> tuple[int, ...]:
        """How many ranks of every module are used."""
        return tuple(len(used) for used in self.use.used)

    @cached_property
    def numbers(self) -> int:
        """Numbers in A and B."""
        return sum(r * (self.A.shape[1] + B.shape[1]) for r, B in zip(self.ranks, self.B, strict=True))

    @cached_property
    def own_numbers(self) -> int:
        """The most numbers that one composition uses, filled up where another one's ranks are more."""
        return sum(r * (self.A.shape[1] + B.shape[1]) for r, B in zip(self.use.widest, self.B, strict=True))


class Workspace:
    """One piece of memory for forms that live one after the other, so that each does not ask the system for its own.

    Memory asked for anew comes page by page, which takes longer than gathering into it. Whatever was taken before
    is overwritten by what is taken next.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def take(self, sizes: Sequence[int], like: Tensor) -> list[Tensor]:
        """Flat tensors of these sizes, of the dtype and device of another one."""
        memory, total = self._memory, sum(sizes)
        if memory is None or len(memory) < total or memory.dtype != like.dtype or memory.device != like.device:
            memory = self._memory = like.new_empty(total)
        return list(torch.split(memory[:total], list(sizes)))


class SharedForm:
    """One bank for all rows: each multiplies all of it, and weights switch on what is its own."""

    def __init__(self, bank: GroupBank) -> None:
        use = bank.use
        self._A, self._B = bank.A, bank.B  # (R, d_in), and (R_i, d_out) each
        if use.distinct == 1:  # every rank is used, by every row alike
            self._B = tuple(B * w[0, :, None].to(B) for B, w in zip(self._B, use.weights, strict=True))
        self._ranks, self._batch, self._switches = list(bank.ranks), use.batch, use.switches

    def shrink(self, x: Tensor) -> tuple[Tensor, ...]:
        """The weighted A x of every module, (batch * times * seq, R_i) each."""
        rows, seq, width = x.shape
        h = torch.mm(x.reshape(rows * seq, width), self._A.mT)  # (batch * times * seq, R)
        # autocast may give h of another size than A
        weights, keep = self._switches.spread(rows // self._batch, h.itemsize, self._A)
        by_token = h
        if seq > 1:
            by_token = h.view(rows, seq, -1)
            weights, keep = (None if each is None else each[:, None] for each in (weights, keep))
        # Not the weights alone: an adapter that overflows must not turn rows that do not use it into inf * 0 = nan.
        if keep is not None and h.requires_grad:
            by_token.masked_fill_(keep == 0, 0.0)
        elif keep is not None:  # the same, several times as fast on a CPU, where `masked_fill_` goes number by number
            by_token.view(keep.dtype).bitwise_and_(keep)
        if weights is not None:
            by_token.mul_(weights)
        return h.split_with_sizes(self._ranks, dim=1)

    def add(self, member: int, h: tuple[Tensor, ...], output: Tensor, *, own: bool) -> Tensor:
        """Output + h B, of one module."""
        part, B = h[member], self._B[member]
        if own:
            output.view(part.shape[0], B.shape[1]).addmm_(part, B)
            return output
        return torch.addmm(output.reshape(part.shape[0], B.shape[1]), part, B).view(output.shape)


class GatheredForm:
    """A bank for each distinct composition, of its own ranks alone, its weights folded into B.

    All are as wide as the widest; shorter ones are filled up with zeros. Rows of one composition are multiplied
    together, beams as well, so a bank is read once however many rows use it.
    """

    def __init__(self, bank: GroupBank) -> None:
        """Gather the ranks of every composition."""
        use = bank.use
        self._rows = use.lineup.to(bank.A.device)
        self._ranks = list(use.widest)
        A, *B = (_gathered(of, use.gathering, i) for i, of in enumerate(bank.banks))
        self._A = A.mT  # (distinct, d_in, R' of all modules)
        # (distinct, R', d_out)
        self._B = tuple(
            b if w is None else b * w[..., None].to(b) for b, w in zip(B, use.gathering.scales, strict=True)
        )

    def shrink(self, x: Tensor) -> tuple[Tensor, ...]:
        """A x with each row's own A, of every module, (distinct, places * times * seq, R'_i) each."""
        return torch.bmm(self._rows.line_up(x), self._A).split_with_sizes(self._ranks, dim=2)

    def add(self, member: int, h: tuple[Tensor, ...], output: Tensor, *, own: bool) -> Tensor:
        """Output + h B, of one module, with each row's own B."""
        part, B = h[member], self._B[member]
        if self._rows.place is not None:
            added = self._rows.go_back(torch.bmm(part, B)).reshape(output.shape)
            return output.add_(added) if own else output + added
        shape = part.shape[0], part.shape[1], B.shape[2]
        if own:
            output.view(shape).baddbmm_(part, B)
            return output
        return torch.baddbmm(output.reshape(shape), part, B).view(output.shape)


def _rows(bank: Tensor, used: Tensor) -> Tensor:
    """The rows of a bank that are used; the bank itself where all are."""
    return bank if len(used) == len(bank) else bank.index_select(0, used.to(bank.device))


def _gathered(bank: Tensor, gathering: Gathering, which: int) -> Tensor:
    """One bank's ranks of every composition, (distinct, ranks, width); zeros where it has fewer than others."""
    places, empty = gathering.places[which], gathering.empty[which].to(bank.device)
    if gathering.as_they_stand[which]:
        return bank.view(*places.shape, bank.shape[1])
    if not len(bank):
        return bank.new_zeros(*places.shape, bank.shape[1])
    own = bank.index_select(0, places.flatten().to(bank.device))
    return own.index_fill_(0, empty, 0.0).view(*places.shape, bank.shape[1])
