"""The gathered form of a pass of many tokens on a CPU: all rows in one product, each with its own ranks filled up."""

from __future__ import annotations

import torch
from torch import Tensor

from loracompose.runtime.forms import GroupBank, Workspace
from loracompose.runtime.rows import BITS


class StackedForm:
    """One batched product for all rows, in which each has as many places as the widest has ranks.

    Few calls, which is what products of few ranks cost most on a CPU, above all with several threads or in 16 bits;
    what is filled up is multiplied for nothing. Where rows of one composition stand together they share its ranks.
    """

    def __init__(self, bank: GroupBank, workspace: Workspace) -> None:
        """Gather into a workspace: the form does not outlive the next one that takes it. Some rank must be used."""
        stack, bits = bank.use.stack, BITS[bank.A.itemsize]
        self._banks, self._ranks = len(stack.in_A), list(bank.use.widest)
        self._scales = None if stack.weights is None else stack.weights[:, None].to(bank.A)
        # What stands in free places must leave no trace, not even inf * 0.
        self._keep = None if stack.taken is None else stack.taken[:, None].to(bank.A.device, bits).neg_()
        places, stand = (stack.in_A, *stack.in_B), stack.as_they_stand
        sizes = [0 if s else to.numel() * of.shape[1] for of, to, s in zip(bank.banks, places, stand, strict=True)]
        spaces = workspace.take(sizes, bank.A)
        A, *self._B = (
            of.view(*to.shape, of.shape[1]) if s else _gathered(of, to, into)
            for of, to, into, s in zip(bank.banks, places, spaces, stand, strict=True)
        )
        self._A = A.mT  # (banks, d_in, places of all modules); B is (banks, places, d_out)

    def shrink(self, x: Tensor) -> tuple[Tensor, ...]:
        """The weighted A x with each row's own A, of every module, (banks, tokens of a bank, places) each."""
        h = torch.bmm(x.reshape(self._banks, -1, x.shape[-1]), self._A)
        if self._keep is not None:
            h.view(self._keep.dtype).bitwise_and_(self._keep)
        if self._scales is not None:
            h.mul_(self._scales)
        return h.split_with_sizes(self._ranks, dim=2)

    def add(self, member: int, h: tuple[Tensor, ...], output: Tensor, *, own: bool) -> Tensor:
        """Output + h B, of one module, with each row's own B."""
        part, B = h[member], self._B[member]
        if not B.numel():
            return output
        output = output if own else output.clone(memory_format=torch.contiguous_format)
        output.view(part.shape[0], part.shape[1], B.shape[2]).baddbmm_(part, B)
        return output


def _gathered(bank: Tensor, places: Tensor, space: Tensor) -> Tensor:
    """bank[places], (*places, width), in a space of that many numbers."""
    into = space.view(-1, bank.shape[1])
    torch.index_select(bank, 0, places.flatten().to(bank.device), out=into)
    return into.view(*places.shape, bank.shape[1])
