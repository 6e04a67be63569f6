"""Which ranks the rows of a batch use, counted once on the host: what forms are built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # bytes of a number -> integers of as many


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
        exact = _beside(weights)
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

    @cached_property
    def of_rows(self) -> tuple[int, ...]:
        """For every module the ranks that all rows of the batch use, those of equal rows counted again."""
        return tuple(int((w != 0).sum(dim=1)[self.row_of].sum()) for w in self.weights)

    @cached_property
    def picks(self) -> tuple[tuple[Tensor, Tensor], ...]:
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
        return tuple(found)

    @cached_property
    def gathering(self) -> Gathering:
        """What every composition takes of the banks, with its weights."""
        in_A, in_B, free = self._places(torch.arange(self.distinct))
        empty = [none.flatten().nonzero().flatten() for none in (torch.cat(free, dim=1), *free)]
        alike = (bool((own[~none] == 1).all()) for (_, own), none in zip(self.picks, free, strict=True))
        scales = tuple(None if ones else own for ones, (_, own) in zip(alike, self.picks, strict=True))
        return Gathering((torch.cat(in_A, dim=1), *in_B), tuple(empty), scales)

    def _places(self, order: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Of some compositions, for every module: ranks among those of the group, of the module, and which are free.

        The first rank of a module stands in free places, and that of all modules where it has none.
        """
        sizes = [len(used) for used in self.used]
        picks = [pick[order] for pick, _ in self.picks]
        free = [pick == size for pick, size in zip(picks, sizes, strict=True)]
        in_B = [torch.where(none, 0, pick) for pick, none in zip(picks, free, strict=True)]
        starts = [0, *accumulate(sizes)]
        in_A = [torch.where(none, 0, at + start) for at, none, start in zip(in_B, free, starts, strict=False)]
        return in_A, in_B, free

    @cached_property
    def switches(self) -> Switches:
        """What every row lets through of one bank for all."""
        return Switches(self)

    @cached_property
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

    @cached_property
    def stack(self) -> Stack:
        """Every row with as many places as the widest has ranks."""
        order = torch.arange(self.distinct) if self.lineup.source is None else self.row_of
        in_A, in_B, free = self._places(order)
        weights, none = torch.cat([own[order] for _, own in self.picks], dim=1), torch.cat(free, dim=1)
        return Stack(
            torch.cat(in_A, dim=1),
            tuple(at if len(used) else at[:, :0] for at, used in zip(in_B, self.used, strict=True)),
            weights if bool((weights[~none] != 1).any()) else None,
            ~none if bool(none.any()) else None,
        )


class Switches:
    """The weights of a bank that all rows share: of every row, its own ranks at their weights and the others at 0.

    Where there is one composition, its weights belong into B, and every rank passes at 1.
    """

    def __init__(self, use: RowUse) -> None:
        weights = torch.cat(use.weights, dim=1)[use.row_of]  # (batch, R)
        self._weights = torch.ones_like(weights) if use.distinct == 1 else weights
        off = self._weights == 0
        self._scales = bool((self._weights[~off] != 1).any())
        self._keep = (~off).long().neg_() if bool(off.any()) else None  # every bit of what is on, none of what is off
        self._spread: dict[tuple[object, ...], tuple[Tensor | None, Tensor | None]] = {}

    def spread(self, times: int, itemsize: int, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Weights, and the bits that stay of a number, (batch * times, R) each; None if they change nothing.

        Args:
            times: rows of each composition of the batch.
            itemsize: bytes of the numbers whose bits they are.
            like: a tensor on their device and in the dtype of the weights.
        """
        wanted = times, itemsize, like.dtype, like.device
        if wanted not in self._spread:
            with torch.inference_mode(False), torch.no_grad():  # passes outside of inference mode may follow
                weights = self._weights.to(like) if self._scales else None
                keep = None if self._keep is None else self._keep.to(like.device, BITS[itemsize])
                self._spread[wanted] = _repeated(weights, times), _repeated(keep, times)
        return self._spread[wanted]


class RowUses:
    """What the groups of a request use, counted once for all whose weights are equal: mostly those of all layers."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], RowUse] = {}
        self._very: dict[tuple[int, ...], tuple[tuple[Tensor, ...], RowUse]] = {}  # held: freed ids come back

    def count(self, weights: Sequence[Tensor]) -> RowUse:
        """What `RowUse.count` gives; nobody may write into the weights meanwhile."""
        very = tuple(id(w) for w in weights)
        if very not in self._very:
            self._very[very] = tuple(weights), self._equal(weights)
        return self._very[very][1]

    def _equal(self, weights: Sequence[Tensor]) -> RowUse:
        exact = _beside(weights)
        key = (*((w.dtype, w.shape[1]) for w in weights), exact.shape, exact.numpy().tobytes())
        if key not in self._known:
            self._known[key] = RowUse.count(weights)
        return self._known[key]


def _repeated(by_row: Tensor | None, times: int) -> Tensor | None:
    return None if by_row is None else by_row.repeat_interleave(times, dim=0)


def _in_order(places: Tensor) -> bool:
    return bool(torch.equal(places.flatten(), torch.arange(places.numel())))


def _beside(weights: Sequence[Tensor]) -> Tensor:
    """The weights of all modules side by side, exact, in a dtype that numpy has."""
    beside = torch.cat([w.detach() for w in weights], dim=1) + 0.0  # -0.0 is 0
    return beside if beside.dtype in (torch.float32, torch.float64) else beside.float()


@dataclass(frozen=True, eq=False)
class Gathering:
    """A bank for each composition, as wide as the widest.

    Attributes:
        places: for A, then for every module's B: (distinct, ranks), the ranks that it takes, the first where it has
            fewer than others.
        empty: for each of them where that is, in the flattened places: zeros belong there.
        scales: for every module (distinct, ranks), the weights; None if all are 1.
    """

    places: tuple[Tensor, ...]
    empty: tuple[Tensor, ...]
    scales: tuple[Tensor | None, ...]

    @cached_property
    def as_they_stand(self) -> tuple[bool, ...]:
        """For A, then for every module's B, whether the places are 0, 1, 2, ...: then there is nothing to gather."""
        return tuple(
            not len(empty) and _in_order(places) for places, empty in zip(self.places, self.empty, strict=True)
        )


@dataclass(frozen=True, eq=False)
class Stack:
    """Banks of one size, one for each composition where its rows stand together, else one for each row.

    Attributes:
        in_A: (banks, places of all modules), the rank of the group that stands in each.
        in_B: for every module (banks, places), the rank of the module; no place if it has no rank.
        weights: (banks, places of all modules); None if all are 1.
        taken: which places hold a rank of the bank's own; None if all do.
    """

    in_A: Tensor
    in_B: tuple[Tensor, ...]
    weights: Tensor | None
    taken: Tensor | None

    @cached_property
    def as_they_stand(self) -> tuple[bool, ...]:
        """As in `Gathering`; a free place, which repeats a rank, stands in no order."""
        return tuple(_in_order(places) for places in (self.in_A, *self.in_B))


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
