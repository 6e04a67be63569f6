"""The equal forms of the static deltas of modules that read one input: a shared bank, or one for each composition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.rows import RowUse

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> integers of as many


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

    def closed(self) -> tuple[Tensor, ...]:
        """The same, copied, each with a rank of zeros at its end for whoever has fewer ranks than others."""
        return tuple(torch.cat([bank, bank.new_zeros(1, bank.shape[1])]) for bank in self.banks)

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
        use, place, dtype = bank.use, bank.A.device, bank.A.dtype
        self._A, self._B = bank.A, bank.B  # (R, d_in), and (R_i, d_out) each
        self._ranks = list(bank.ranks)
        weights = torch.cat(use.weights, dim=1)[use.row_of]  # (batch, R)
        if use.distinct == 1:  # every rank is used, by every row alike
            self._B = tuple(B * w[0, :, None].to(B) for B, w in zip(self._B, use.weights, strict=True))
            weights = torch.ones_like(weights)
        self._batch, off = use.batch, weights == 0
        self._weights = weights.to(dtype)
        self._scales = bool((weights[~off] != 1).any())
        self._keep = (~off).long().neg_() if bool(off.any()) else None  # every bit of what is on, none of what is off
        self._spread: dict[tuple[int, int], tuple[Tensor | None, Tensor | None]] = {}
        self._place = place

    def shrink(self, x: Tensor) -> tuple[Tensor, ...]:
        """The weighted A x of every module, (batch * times * seq, R_i) each."""
        rows, seq, width = x.shape
        h = torch.mm(x.reshape(rows * seq, width), self._A.mT)  # (batch * times * seq, R)
        weights, keep = self._for(rows // self._batch, h.itemsize)  # autocast may give h of another size than A
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

    def _for(self, times: int, itemsize: int) -> tuple[Tensor | None, Tensor | None]:
        """Weights, and the bits that stay of numbers of so many bytes, (batch * times, R); None if nothing changes."""
        wanted = times, itemsize
        if wanted not in self._spread:
            with torch.inference_mode(False), torch.no_grad():  # passes outside of inference mode may follow
                keep = None if self._keep is None else self._keep.to(BITS[itemsize])
                self._spread[wanted] = (
                    self._repeated(self._weights, times) if self._scales else None,
                    None if keep is None else self._repeated(keep, times),
                )
        return self._spread[wanted]

    def _repeated(self, by_row: Tensor, times: int) -> Tensor:
        return by_row.repeat_interleave(times, dim=0).to(self._place)


class GatheredForm:
    """A bank for each distinct composition, of its own ranks alone, its weights folded into B.

    All are as wide as the widest; shorter ones are filled up with zeros. Rows of one composition are multiplied
    together, beams as well, so a bank is read once however many rows use it.
    """

    def __init__(self, bank: GroupBank) -> None:
        """Gather the ranks of every composition."""
        use, place = bank.use, bank.A.device
        self._rows = use.lineup.to(place)
        self._ranks = list(use.widest)
        picks = use.picks
        end, start, in_A = sum(bank.ranks), 0, []
        for (pick, _), ranks in zip(picks, bank.ranks, strict=True):
            # the place after a module's last rank is its rank of zeros in B, and that of the whole group in A
            in_A.append(torch.where(pick == ranks, end, pick + start))
            start += ranks
        banks = bank.closed()
        places = [torch.cat(in_A, dim=1), *(pick for pick, _ in picks)]
        A, *B = (_take(of, to.to(place)) for of, to in zip(banks, places, strict=True))
        self._A = A.mT  # (distinct, d_in, R' of all modules)
        self._B = tuple(b.mul_(w[..., None].to(b)) for b, (_, w) in zip(B, picks, strict=True))  # (distinct, R', d_out)

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


def _take(bank: Tensor, pick: Tensor) -> Tensor:
    """bank[pick], (*pick, width); index_select copies rows several times faster."""
    return bank.index_select(0, pick.flatten()).view(*pick.shape, -1)
