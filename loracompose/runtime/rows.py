"""Which ranks the rows of a batch use, counted once on the host: what forms are built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class RowUse:
    """What the rows of a batch use of the ranks of a group of modules; all tensors are on the CPU.

    Attributes:
        row_of: (batch,), the distinct composition of each row, numbered in the order of their first rows.
        used: for every module the ranks that some row uses, (used,).
        weights: for every module the weights of these ranks, (distinct, used).
    """

    row_of: Tensor
    used: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]

    @classmethod
    def count(cls, weights: Sequence[Tensor]) -> RowUse:
        """What is used, by the weights of every module, (batch, R) each, on the CPU."""
        beside = torch.cat([w.detach() for w in weights], dim=1) + 0.0  # -0.0 is 0
        exact = beside if beside.dtype in (torch.float32, torch.float64) else beside.float()
        seen: dict[bytes, int] = {}
        row_of = [seen.setdefault(row.tobytes(), len(seen)) for row in exact.numpy()]
        first = torch.tensor([row_of.index(i) for i in range(len(seen))])
        used = tuple((w != 0).any(dim=0).nonzero().flatten() for w in weights)
        kept = tuple(w.detach()[first][:, u] for w, u in zip(weights, used, strict=True))
        return cls(torch.tensor(row_of), used, kept)

    @property
    def batch(self) -> int:
        """Number of rows."""
        return len(self.row_of)

    @property
    def distinct(self) -> int:
        """How many compositions differ."""
        return len(self.weights[0])

    @cached_property
    def widest(self) -> tuple[int, ...]:
        """For every module the most ranks that one composition uses, at least 1."""
        return tuple(max(1, int((w != 0).sum(dim=1).max())) if w.numel() else 1 for w in self.weights)

    def picks(self) -> list[tuple[Tensor, Tensor]]:
        """For every module each composition's own ranks and their weights, (distinct, widest) both.

        Ranks are places in `used`; shorter compositions are filled up with the place after the last, of weight 0.
        """
        found = []
        for w, widest in zip(self.weights, self.widest, strict=True):
            row, rank = w.nonzero(as_tuple=True)  # row by row
            counts = torch.bincount(row, minlength=len(w))
            nth = torch.arange(len(row)) - (counts.cumsum(0) - counts)[row]  # place of a rank within its row
            pick, own = torch.full((len(w), widest), w.shape[1]), w.new_zeros(len(w), widest)
            pick[row, nth], own[row, nth] = rank, w[row, rank]
            found.append((pick, own))
        return found

    def lineup(self) -> Lineup:
        """Where the rows go so that those of one composition stand together."""
        counts = torch.bincount(self.row_of, minlength=self.distinct)
        most = int(counts.max())
        if torch.equal(self.row_of, torch.arange(self.distinct).repeat_interleave(most)):
            return Lineup(self.distinct, most)
        sorted_rows = torch.argsort(self.row_of, stable=True)
        starts = counts.cumsum(0) - counts
        nth = torch.arange(self.batch) - starts[self.row_of[sorted_rows]]  # place of a row within its composition
        place = torch.empty_like(sorted_rows)
        place[sorted_rows] = self.row_of[sorted_rows] * most + nth
        source = torch.zeros(self.distinct * most, dtype=torch.int64)  # free places hold row 0, which nobody reads
        source[place] = torch.arange(self.batch)
        return Lineup(self.distinct, most, source, place)


@dataclass(frozen=True, eq=False)
class Lineup:
    """Rows ordered by composition, each of them with as many places as the most frequent one has rows.

    Attributes:
        distinct: number of compositions.
        places: for each of them.
        source: (distinct * places,) the row that stands there; None if rows are in order already.
        place: (batch,) where each row stands; None likewise.
    """

    distinct: int
    places: int
    source: Tensor | None = None
    place: Tensor | None = None

    def to(self, device: torch.device) -> Lineup:
        """The same with its indices on a device."""
        if self.source is None or self.place is None:
            return self
        return Lineup(self.distinct, self.places, self.source.to(device), self.place.to(device))

    def line_up(self, x: Tensor) -> Tensor:
        """(batch * times, seq, width) to (distinct, places * times * seq, width); rows of one prompt are adjacent."""
        if self.source is not None and self.place is not None:
            x = x.reshape(len(self.place), -1, x.shape[-1]).index_select(0, self.source)
        return x.reshape(self.distinct, -1, x.shape[-1])

    def go_back(self, y: Tensor) -> Tensor:
        """(distinct, places * times * seq, width) to (batch, times * seq, width)."""
        if self.place is None:
            return y
        return y.reshape(self.distinct * self.places, -1, y.shape[-1]).index_select(0, self.place)
