"""The magnitude from which on an entry belongs to the largest of its adapter, exactly, without holding the entries."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

Sweep: TypeAlias = Callable[[], Iterable[tuple[int, Tensor]]]
Pick: TypeAlias = Callable[[Sequence[int]], Iterable[tuple[int, Tensor]]]

SAMPLE = 1 << 19  # entries per adapter that are looked at first
SURE = 6.0  # standard deviations of a sample's quantile
MOST = 1 << 23  # entries per adapter that may lie in a bracket

_RADIX = 16
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def magnitude_thresholds(
    sweep: Sweep, sizes: Sequence[int], density: float, dtype: torch.dtype, pick: Pick | None = None
) -> list[float]:
    """The magnitude from which on an entry belongs to the largest `density` of its adapter, exactly.

    Every n-th entry is taken first; their quantiles bracket the threshold. One pass over all entries counts those above
    the bracket and keeps those inside, one in a hundred or so, of which the right one is selected. Counting shows
    whether it was there: if not, as with many equal entries, a radix select follows, which needs no luck.

    Args:
        sweep: makes (adapter, entries) pairs anew, bit-equal each time; several may come per adapter.
        sizes: number of entries that `sweep` makes for each adapter.
        density: share to keep, in (0, 1].
        dtype: float32 or float64, the widest among the entries.
        pick: makes (adapter, entries) pairs with about every n-th entry, n given for each adapter; rounding may differ
            from that of `sweep`. None: they are taken from a pass of their own.

    Returns:
        One threshold per adapter: keeping |entry| >= threshold keeps ceil(density * size) entries, or more where
        several are equal to the last one kept. 0 at density 1 and for an adapter without entries.
    """
    if density == 1:
        return [0.0 for _ in sizes]
    places = [math.ceil(density * size) for size in sizes]  # of the last entry kept, counted from the largest
    brackets = _sampled_brackets(pick or _from(sweep), sizes, places, dtype)
    for adapter, entries in sweep():
        brackets[adapter].take(entries.to(dtype).abs())
    found = [
        bracket.select(place) if size else 0.0 for bracket, place, size in zip(brackets, places, sizes, strict=True)
    ]
    if any(threshold is None for threshold in found):
        return radix_thresholds(sweep, sizes, places, dtype)
    return [threshold for threshold in found if threshold is not None]


@dataclass(eq=False)
class _Bracket:
    """Magnitudes above low and up to high, and what was counted about them.

    Attributes:
        low: lower end, which is not inside.
        high: upper end, which is.
        above: entries larger than `high`.
        kept: number of entries inside.
        inside: these entries, up to the first block with which they are too many.
    """

    low: float
    high: float
    above: int = 0
    kept: int = 0
    inside: list[Tensor] = field(default_factory=list)

    def take(self, magnitudes: Tensor) -> None:
        """Count some magnitudes, and keep those inside."""
        over = (magnitudes - self.high).sign_().relu_()  # 1 above, 0 elsewhere: faster than a comparison on a CPU
        self.above += int(over.sum(dtype=torch.float64))
        if self.kept <= MOST:
            within = (magnitudes - self.low).sign_().relu_().sub_(over).flatten()
            self.inside.append(magnitudes.flatten()[within.nonzero()[:, 0]])
            self.kept += self.inside[-1].numel()

    def select(self, place: int) -> float | None:
        """The magnitude at a place counted from the largest, from 1; None if it is not known to be here."""
        place -= self.above
        if not 1 <= place <= self.kept <= MOST:
            return None
        inside = torch.cat(self.inside)
        return float(inside.kthvalue(inside.numel() - place + 1).values)


def _from(sweep: Sweep) -> Pick:
    """Every n-th entry of a pass."""

    def pick(strides: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        seen = [0 for _ in strides]
        for adapter, entries in sweep():
            flat, stride = entries.flatten(), strides[adapter]
            yield adapter, flat[-seen[adapter] % stride :: stride]
            seen[adapter] += flat.numel()

    return pick


def _sampled_brackets(pick: Pick, sizes: Sequence[int], places: Sequence[int], dtype: torch.dtype) -> list[_Bracket]:
    samples: list[list[Tensor]] = [[] for _ in sizes]
    for adapter, entries in pick([max(1, size // SAMPLE) | 1 for size in sizes]):  # odd, to take from all columns
        samples[adapter].append(entries.to(dtype, copy=True))  # lets the block go
    return [
        _bracket(torch.cat(sample).abs(), place / size) if size else _Bracket(0.0, 0.0)
        for sample, place, size in zip(samples, places, sizes, strict=True)
    ]


def _bracket(sample: Tensor, share: float) -> _Bracket:
    """The magnitudes between which the `share` of the largest ends, going by a sample."""
    ordered, n = sample.sort(descending=True).values, sample.numel()
    slack = SURE * math.sqrt(n * share * (1 - share)) + 2
    first, last = math.floor(share * n - slack), math.ceil(share * n + slack)
    high = float(ordered[first]) if first >= 0 else math.inf
    low = float(ordered[last]) if last < n else -1.0
    return _Bracket(min(low, high), high)  # never turned round: `take` would count what lies between twice


def radix_thresholds(sweep: Sweep, sizes: Sequence[int], places: Sequence[int], dtype: torch.dtype) -> list[float]:
    """The magnitude at a place of each adapter, from the largest, by a radix select on the bits of the magnitudes.

    They order as the numbers do: two passes over float32, four over float64, with a histogram of 65,536 counts per
    adapter and nothing else in memory. Arguments as for `magnitude_thresholds`; `places` from 1.
    """
    left = list(places)
    found = [0 for _ in sizes]  # leading bits of each threshold
    digits = dtype.itemsize * 8 // _RADIX
    for depth in range(digits):
        shift = _RADIX * (digits - 1 - depth)
        counts = torch.zeros(len(sizes), 1 << _RADIX, dtype=torch.int64)
        for adapter, entries in sweep():
            counts[adapter] += _histogram(entries.to(dtype), shift, found[adapter])
        for adapter, size in enumerate(sizes):
            digit, left[adapter] = _descend(counts[adapter], left[adapter]) if size else (0, 0)
            found[adapter] = found[adapter] << _RADIX | digit
    return torch.tensor(found, dtype=_BITS[dtype]).view(dtype).tolist()


def _histogram(entries: Tensor, shift: int, prefix: int) -> Tensor:
    """Counts of the digit at `shift` among the magnitudes whose leading bits are `prefix`, (65536,) on the CPU."""
    bits = entries.abs().flatten().view(_BITS[entries.dtype])
    top = bits >> shift
    if shift + _RADIX < entries.itemsize * 8:  # there are leading bits
        top = top[top >> _RADIX == prefix] & ((1 << _RADIX) - 1)
    return torch.bincount(top, minlength=1 << _RADIX).cpu()


def _descend(counts: Tensor, place: int) -> tuple[int, int]:
    """The digit of the entry at `place` from the largest, and its place among the entries of that digit."""
    from_largest = counts.flip(0).cumsum(0)
    step = int(torch.searchsorted(from_largest, place))
    above = int(from_largest[step - 1]) if step else 0
    return counts.numel() - 1 - step, place - above
