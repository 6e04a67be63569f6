"""An adapter in host memory, ready to go to another device in one copy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

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
        places: module -> where its A and its B begin, and of what kind it is.
    """

    bare: Adapter
    buffers: Mapping[torch.dtype, Tensor]
    places: Mapping[str, tuple[Place, Place, Kind]]

    @classmethod
    def of(cls, adapter: Adapter) -> Packed:
        """Copy an adapter on the CPU."""
        pin = torch.cuda.is_available()  # from other memory a GPU cannot copy while it computes
        ends: dict[torch.dtype, int] = {}
        parts: dict[torch.dtype, list[Tensor]] = {}

        def place(tensor: Tensor) -> Place:
            start = ends.get(tensor.dtype, 0)
            ends[tensor.dtype] = start + tensor.numel()
            parts.setdefault(tensor.dtype, []).append(tensor.reshape(-1))
            return start, tensor.shape, tensor.dtype

        places = {module: (place(own.A), place(own.B), own.kind) for module, own in adapter.factors.items()}
        buffers = {}
        for dtype, own in parts.items():
            buffers[dtype] = torch.empty(ends[dtype], dtype=dtype, pin_memory=pin)
            torch.cat(own, out=buffers[dtype])
        return cls(replace(adapter, factors={}, known_fingerprint=adapter.fingerprint), buffers, places)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    def on(self, device: torch.device) -> Adapter:
        """The adapter on a device, its factors views of one tensor a dtype.

        To a GPU the copy runs on a stream of its own, beside what the GPU computes; it is complete on return.
        """
        there = self._sent(device)

        def view(place: Place) -> Tensor:
            start, shape, dtype = place
            return there[dtype][start : start + prod(shape)].view(shape)

        factors = {module: LoraFactors(view(A), view(B), kind) for module, (A, B, kind) in self.places.items()}
        return replace(self.bare, factors=factors)

    def _sent(self, device: torch.device) -> dict[torch.dtype, Tensor]:
        if device.type != "cuda":
            return {dtype: buffer.to(device) for dtype, buffer in self.buffers.items()}
        beside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(beside):
            sent = {dtype: buffer.to(device, non_blocking=True) for dtype, buffer in self.buffers.items()}
        beside.synchronize()
        for buffer in sent.values():  # whose memory is not given out anew before that stream is done with it
            buffer.record_stream(torch.cuda.current_stream(device))
        return sent
