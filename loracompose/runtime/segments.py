"""The gathered form of a pass of many tokens on a CPU: composition by composition, each with its own ranks alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loracompose.runtime.forms import GroupBank, Workspace


@dataclass(frozen=True, eq=False)
class Products:
    """A x of every run of rows: its tokens, and (tokens, ranks of its composition)."""

    tokens: tuple[int, ...]
    h: tuple[Tensor, ...]


class SegmentedForm:
    """Adjacent rows of one composition are multiplied together, with as many ranks as it has.

    One product a run costs calls, which many tokens outweigh; nothing is filled up or lined up as in `GatheredForm`.
    Ranks that stand side by side in the bank are used where they are; the rest are copied.
    """

    def __init__(self, bank: GroupBank, workspace: Workspace) -> None:
        """Gather into a workspace: the form does not outlive the next one that takes it."""
        use = bank.use
        runs = [(composition, len(list(rows))) for composition, rows in groupby(use.row_of.tolist())]
        self._batch, self._rows = use.batch, tuple(rows for _, rows in runs)
        order = tuple(composition for composition, _ in runs)
        weights = [of_module.double().numpy() for of_module in use.weights]  # numpy has no bfloat16
        own = [[np.flatnonzero(row) for row in of_module] for of_module in weights]  # module, composition: ranks
        starts = [0, *accumulate(bank.ranks)]
        of_all = list(zip(*own, strict=True))  # composition, module: ranks
        in_A = [np.concatenate([r + at for r, at in zip(ranks, starts, strict=False)]) for ranks in of_all]
        picks = [Picks.of(of_bank) for of_bank in (in_A, *own)]
        spaces = workspace.take([p.copied * of.shape[1] for p, of in zip(picks, bank.banks, strict=True)], bank.A)
        A, *B = (p.take(of, space) for p, of, space in zip(picks, bank.banks, spaces, strict=True))
        self._A = tuple(A[c].mT for c in order)  # (d_in, ranks)
        self._B = tuple(tuple(member[c] for c in order) for member in B)  # (ranks of the module, d_out)
        ends = [list(accumulate(len(r) for r in ranks)) for ranks in of_all]
        self._parts = tuple(tuple(slice(ends[c][i] - len(r[c]), ends[c][i]) for c in order) for i, r in enumerate(own))
        each = [np.concatenate([w[c][r[c]] for w, r in zip(weights, own, strict=True)]) for c in range(use.distinct)]
        scales = [torch.from_numpy(w).to(bank.A) if (w != 1).any() else None for w in each]
        self._weights = tuple(scales[c] for c in order)

    def shrink(self, x: Tensor) -> Products:
        """The weighted A x of every run; x is (batch * times, seq, d_in)."""
        rows, seq = x.shape[:2]
        each = rows // self._batch * seq
        tokens = tuple(run * each for run in self._rows)
        parts = torch.split(x.reshape(rows * seq, -1), list(tokens))
        h = tuple(part @ A for part, A in zip(parts, self._A, strict=True))
        for product, weights in zip(h, self._weights, strict=True):
            if weights is not None:
                product.mul_(weights)
        return Products(tokens, h)

    def add(self, member: int, h: Products, output: Tensor, *, own: bool) -> Tensor:
        """Output + h B, of one module."""
        output = output if own else output.clone(memory_format=torch.contiguous_format)
        parts = torch.split(output.view(sum(h.tokens), -1), list(h.tokens))
        for part, product, ranks, B in zip(parts, h.h, self._parts[member], self._B[member], strict=True):
            if len(B):
                part.addmm_(product[:, ranks], B)
        return output


@dataclass(frozen=True, eq=False)
class Picks:
    """Ranks of every composition in one bank.

    Attributes:
        ranges: first rank and number of those that stand side by side; None for the rest.
        apart: the ranks of the rest, one composition after the other.
        sizes: of the rest.
    """

    ranges: tuple[tuple[int, int] | None, ...]
    apart: NDArray[np.int64]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, ranks: Sequence[NDArray[np.int64]]) -> Picks:
        """Tell them apart; ranks are in order."""
        ranges = tuple(_side_by_side(these) for these in ranks)
        rest = [these for these, found in zip(ranks, ranges, strict=True) if found is None]
        return cls(ranges, np.concatenate(rest or [np.zeros(0, np.int64)]), tuple(len(these) for these in rest))

    @property
    def copied(self) -> int:
        """How many ranks have to be copied."""
        return len(self.apart)

    def take(self, bank: Tensor, space: Tensor) -> list[Tensor]:
        """The ranks of every composition, (ranks, width): views of the bank, or of the space that they fill."""
        into = space.view(self.copied, bank.shape[1])
        torch.index_select(bank, 0, torch.from_numpy(self.apart), out=into)
        copies = iter(torch.split(into, list(self.sizes)))
        return [bank.narrow(0, *place) if place else next(copies) for place in self.ranges]


def _side_by_side(ranks: NDArray[np.int64]) -> tuple[int, int] | None:
    if not len(ranks):
        return 0, 0
    first, last = int(ranks[0]), int(ranks[-1])
    return (first, len(ranks)) if last - first == len(ranks) - 1 else None
