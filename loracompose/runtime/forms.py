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
        self._parts = _parts(bank.ranks)
        weights = torch.cat(use.weights, dim=1)[use.row_of]  # (batch, R)
        if use.distinct == 1:  # every rank is used, by every row alike
            self._B = tuple(B * w[0, :, None].to(B) for B, w in zip(self._B, use.weights, strict=True))
            weights = torch.ones_like(weights)
        self._batch, self._off = use.batch, weights == 0
        self._weights = weights.to(dtype)
        self._scales = bool((weights[~self._off] != 1).any())
        self._spread: dict[int, tuple[Tensor | None, Tensor | None]] = {}
        self._place = place

    def shrink(self, x: Tensor) -> Tensor:
        """The weighted A x, (batch * times * seq, R)."""
        rows, seq = x.shape[:2]
        weights, off = self._for(rows // self._batch)
        h = torch.mm(x.reshape(rows * seq, -1), self._A.mT)  # (batch * times * seq, R)
        by_row = h.view(rows, seq, -1)
        # Not the weights alone: an adapter that overflows must not turn rows that do not use it into inf * 0 = nan.
        if off is not None:
            by_row = by_row.masked_fill_(off, 0.0)
        if weights is not None:
            by_row = by_row.mul_(weights)
        return by_row.view_as(h)

    def add(self, member: int, h: Tensor, output: Tensor, *, own: bool) -> Tensor:
        """Output + h B, of one module."""
        flat = output.reshape(len(h), -1)  # (batch * times * seq, d_out)
        part = h[:, self._parts[member]], self._B[member]
        return (flat.addmm_(*part) if own else torch.addmm(flat, *part)).view(output.shape)

    def _for(self, times: int) -> tuple[Tensor | None, Tensor | None]:
        """Weights and what is switched off, (batch * times, 1, R), None where they would change nothing."""
        if times not in self._spread:
            with torch.inference_mode(False), torch.no_grad():  # passes outside of inference mode may follow
                self._spread[times] = (
                    self._repeated(self._weights, times) if self._scales else None,
                    self._repeated(self._off, times) if bool(self._off.any()) else None,
                )
        return self._spread[times]

    def _repeated(self, by_row: Tensor, times: int) -> Tensor:
        return by_row.repeat_interleave(times, dim=0)[:, None].to(self._place)


class GatheredForm:
    """A bank for each distinct composition, of its own ranks alone, its weights folded into B.

    All are as wide as the widest; shorter ones are filled up with zeros. Rows of one composition are multiplied
    together, beams as well, so a bank is read once however many rows use it.
    """

    def __init__(self, bank: GroupBank) -> None:
        """Gather the ranks of every composition."""
        use, place = bank.use, bank.A.device
        self._rows = use.lineup().to(place)
        self._parts = _parts(use.widest)
        picks = use.picks()
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

    def shrink(self, x: Tensor) -> Tensor:
        """A x with each row's own A, (distinct, places * times * seq, R')."""
        return torch.bmm(self._rows.line_up(x), self._A)

    def add(self, member: int, h: Tensor, output: Tensor, *, own: bool) -> Tensor:
        """Output + h B, of one module, with each row's own B."""
        h, B = h[..., self._parts[member]], self._B[member]
        if self._rows.place is None:
            flat = output.reshape(*h.shape[:2], -1)
            return (flat.baddbmm_(h, B) if own else torch.baddbmm(flat, h, B)).view(output.shape)
        added = self._rows.go_back(torch.bmm(h, B)).reshape(output.shape)
        return output.add_(added) if own else output + added


def _parts(ranks: Sequence[int]) -> tuple[slice, ...]:
    """Where the ranks of every module lie among those of all."""
    ends = [sum(ranks[: i + 1]) for i in range(len(ranks))]
    return tuple(slice(end - r, end) for end, r in zip(ends, ranks, strict=True))


def _rows(bank: Tensor, used: Tensor) -> Tensor:
    """The rows of a bank that are used; the bank itself where all are."""
    return bank if len(used) == len(bank) else bank.index_select(0, used.to(bank.device))


def _take(bank: Tensor, pick: Tensor) -> Tensor:
    """bank[pick], (*pick, width); index_select copies rows several times faster."""
    return bank.index_select(0, pick.flatten()).view(*pick.shape, -1)
