"""Entry-wise pieces of TIES and DARE: exact magnitude thresholds, seeded masks, sign election."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from loracompose.composition.settings import is_finite

_RADIX = 16
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def check_sparsity(owner: str, drop: float, density: float, scale: float) -> None:
    """Refuse settings of a composer, `owner`, that mean nothing.

    Raises:
        ValueError: drop outside [0, 1), density outside (0, 1], scale not finite, or one of them no number.
    """
    if not (is_finite(drop) and 0 <= drop < 1):
        raise ValueError(f"{owner}: drop must be in [0, 1), got {drop!r}")
    if not (is_finite(density) and 0 < density <= 1):
        raise ValueError(f"{owner}: density must be in (0, 1], got {density!r}; 1 keeps every entry")
    if not is_finite(scale):
        raise ValueError(f"{owner}: scale must be a finite number, got {scale!r}")


def magnitude_thresholds(
    sweep: Callable[[], Iterable[tuple[int, Tensor]]], sizes: Sequence[int], density: float, dtype: torch.dtype
) -> list[float]:
    """The magnitude from which on an entry belongs to the largest `density` of its adapter, exactly.

    A radix select on the bits of the magnitudes, which order as the numbers do: two passes over float32, four
    over float64, with a histogram of 65,536 counts per adapter and nothing else in memory.

    Args:
        sweep: makes (adapter, entries) pairs anew, bit-equal each time; several may come per adapter.
        sizes: number of entries that `sweep` makes for each adapter.
        density: share to keep, in (0, 1].
        dtype: float32 or float64, the widest among the entries.

    Returns:
        One threshold per adapter: keeping |entry| >= threshold keeps ceil(density * size) entries, or more where
        several are equal to the last one kept. 0 at density 1 and for an adapter without entries.
    """
    places = [math.ceil(density * size) for size in sizes]  # of the last entry kept, counted from the largest
    found = [0 for _ in sizes]  # leading bits of each threshold
    digits = 0 if density == 1 else dtype.itemsize * 8 // _RADIX
    for depth in range(digits):
        shift = _RADIX * (digits - 1 - depth)
        counts = torch.zeros(len(sizes), 1 << _RADIX, dtype=torch.int64)
        for adapter, entries in sweep():
            counts[adapter] += _histogram(entries.to(dtype), shift, found[adapter])
        for adapter, size in enumerate(sizes):
            digit, places[adapter] = _descend(counts[adapter], places[adapter]) if size else (0, 0)
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


def trim(entries: Tensor, threshold: float) -> Tensor:
    """The entries of at least that magnitude, the others 0."""
    return entries * (entries.abs() >= threshold)


def mask_stream(fingerprint: str, module: str, seed: int) -> torch.Generator:
    """The random numbers of one adapter in one module: the same whoever else is in the composition.

    Drawn row after row on the CPU, so that the mask depends neither on the block size nor on the device.
    """
    digest = hashlib.sha256(f"{fingerprint}\0{module}\0{seed}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))


def drop_out(entries: Tensor, drop: float, streams: Sequence[torch.Generator]) -> Tensor:
    """Each entry 0 with probability `drop`, else divided by 1 - drop, so that the expectation stays.

    Args:
        entries: the next rows of G modules, (G, rows, d_in).
        drop: probability in [0, 1).
        streams: one per module, advanced by the rows.
    """
    if drop == 0:
        return entries
    shape = entries.shape[1:]
    draws = torch.stack([torch.rand(shape, generator=stream) for stream in streams])  # (G, rows, d_in)
    keep = (draws >= drop).to(entries.device)
    return entries * keep / (1 - drop)


def elect_and_average(updates: Sequence[Tensor], weights: Sequence[float], mass: float) -> Tensor:
    """Elect a sign per entry by the weighted sum, and average the members that have it.

        out = mass · Σ_{i agrees} |w_i| t_i / Σ_{i agrees} |w_i|,    t_i = sign(w_i) · update_i

    With equal weights of sum 1 that is the disjoint mean of TIES. An entry of 0 takes no part. Where the sum is 0
    up to rounding nobody is elected and the entry is 0.

    Args:
        updates: the members' entries, of one shape.
        weights: one per member, any sign, none 0.
        mass: factor of the mean, Σ|w_i| over the members of the row.
    """
    up, down, for_up, for_down = (torch.zeros_like(updates[0]) for _ in range(4))
    for update, w in zip(updates, weights, strict=True):
        vote = w * update
        up += vote.clamp(min=0)
        down -= vote.clamp(max=0)
        for_up += abs(w) * (vote > 0).to(up)
        for_down += abs(w) * (vote < 0).to(up)
    votes = up - down
    votes *= votes.abs() > 64 * torch.finfo(votes.dtype).eps * (up + down)  # a sum of rounding errors elects nobody
    mean = torch.where(votes > 0, up, -down) / torch.where(votes > 0, for_up, for_down)
    return torch.where(votes == 0, torch.zeros_like(mean), mass * mean)


def add_up(updates: Sequence[Tensor], weights: Sequence[float], mass: float) -> Tensor:
    """Σ w_i · update_i, whatever the mass."""
    total = torch.zeros_like(updates[0])
    for update, w in zip(updates, weights, strict=True):
        total += w * update
    return total
