"""All factors of a file in one read: one buffer in the dtype they are folded in, each factor a view of it."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

from loracompose.adapters.folder import open_regular
from loracompose.adapters.layout import AdapterLayout
from loracompose.adapters.lora import LoraFactors


def is_flat(layout: AdapterLayout) -> bool:
    """Whether the file holds factors of one dtype and nothing else, so that all of it is read at once."""
    return not layout.base_copies and len({entry.dtype for entry in layout.entries.values()}) == 1


def read_flat(layout: AdapterLayout, dtype: torch.dtype) -> tuple[Tensor, dict[str, LoraFactors]]:
    """The whole file as one tensor, and every module's factors as views of it, their scaling folded into B.

    A file of that dtype is read straight into the memory that the factors keep; another is rounded once on the way. No
    memory is mapped: a file cut short in place would crash every later use of what still maps it.

    Args:
        layout: of a file that `is_flat`.
        dtype: of the factors.

    Raises:
        ValueError: the file does not have the size that its header says.
    """
    stored = next(iter(layout.entries.values())).dtype
    size = max(entry.end for entry in layout.entries.values())
    flat = torch.empty(size // stored.itemsize, dtype=stored)
    with open_regular(layout.weights) as file:
        file.seek(os.fstat(file.fileno()).st_size - size)
        if file.readinto(flat.view(torch.uint8).numpy().data) != size:
            raise ValueError(f"{layout.name}: {layout.weights} was cut short while it was read; try again")
    flat = flat.to(dtype)
    placed = sorted(layout.entries.items(), key=lambda named: named[1].begin)  # without gaps, as the header was checked
    pieces = torch.split(flat, [math.prod(entry.shape) for _, entry in placed])
    views = {key: piece.view(entry.shape) for (key, entry), piece in zip(placed, pieces, strict=True)}
    factors = {}
    for module, own in layout.modules.items():
        A, B = views[own.A], views[own.B]
        factors[module] = LoraFactors(A, B if own.scaling == 1 else B.mul_(own.scaling), own.kind)
    return flat, factors


def surely_fits(flat: Tensor, layout: AdapterLayout) -> bool:
    """Whether every value is finite and no rank's factors or update can overflow; False says nothing.

    With m the largest magnitude and d the widest side no norm exceeds m √d and no update m² d.
    """
    low, high = (end.item() for end in torch.aminmax(flat))
    if not (math.isfinite(low) and math.isfinite(high)):  # aminmax hands on any nan
        return False
    widest = max(max(own.d_in, own.d_out) for own in layout.modules.values())
    largest = max(1.0, high, -low)
    return largest * largest * widest <= torch.finfo(flat.dtype).max
