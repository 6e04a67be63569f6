"""An adapter in host memory, ready to go to another device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter, Kind, LoraFactors

Place = tuple[int, torch.Size, torch.dtype]  # where a factor begins in the buffer of its dtype


@dataclass(frozen=True, eq=False)
class Packed:
    """All factors of an adapter in one buffer for each dtype, in pinned memory where CUDA runs.

    Attributes:
        bare: the adapter without its factors.
        buffers: dtype -> every number of that dtype, on the CPU.
        places: module -> where its A and its B, rank after rank, begin, and of what kind it is.
    """

    bare: Adapter
    buffers: Mapping[torch.dtype, Tensor]
    places: Mapping[str, tuple[Place, Place, Kind]]

    @classmethod
    def of(cls, adapter: Adapter) -> Packed:
        """Copy an adapter on the CPU."""
        ends: dict[torch.dtype, int] = {}
        parts: dict[torch.dtype, list[Tensor]] = {}

        def place(tensor: Tensor) -> Place:
            start = ends.get(tensor.dtype, 0)
            ends[tensor.dtype] = start + tensor.numel()
            parts.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
            return start, tensor.shape, tensor.dtype

        places = {module: (place(own.A), place(own.B.mT), own.kind) for module, own in adapter.factors.items()}
        buffers = {}
        for dtype, own in parts.items():
            buffers[dtype] = torch.empty(ends[dtype], dtype=dtype, pin_memory=pins())
            torch.cat(own, out=buffers[dtype])
        return cls(replace(adapter, factors={}, known_fingerprint=adapter.fingerprint), buffers, places)

    @property
    def nbytes(self) -> int:
        """Bytes that all buffers occupy."""
        return sum(occupied(buffer.nbytes) for buffer in self.buffers.values())

    def on(self, device: torch.device, beside: Any = None) -> Adapter:
        """The adapter on a device, its factors views of one tensor a dtype; the copy is complete on return.

        Args:
            device: where it goes.
            beside: the CUDA stream that copies to a GPU, so that it runs beside what the GPU computes; always the same
                for one device, for memory that was given out on it is given out again on it alone.
        """
        there = self._sent(device, beside)

        def view(place: Place) -> Tensor:
            start, shape, dtype = place
            return there[dtype][start : start + prod(shape)].view(shape)

        factors = {module: LoraFactors(view(A), view(B).mT, kind) for module, (A, B, kind) in self.places.items()}
        return replace(self.bare, factors=factors)

    def _sent(self, device: torch.device, beside: Any) -> dict[torch.dtype, Tensor]:
        if beside is None:
            return {dtype: buffer.to(device) for dtype, buffer in self.buffers.items()}
        with torch.cuda.stream(beside):
            sent = {dtype: buffer.to(device, non_blocking=True) for dtype, buffer in self.buffers.items()}
        beside.synchronize()
        for buffer in sent.values():  # whose memory is not given out anew before what computes is done with it
            buffer.record_stream(torch.cuda.current_stream(device))
        return sent


def pins() -> bool:
    """Whether memory of the host is pinned: from other memory a GPU cannot copy while it computes."""
    return torch.cuda.is_available()


def occupied(nbytes: int) -> int:
    """Bytes of the host that a buffer takes: torch gives out pinned memory in powers of two."""
    return 1 << (nbytes - 1).bit_length() if pins() and nbytes else nbytes
