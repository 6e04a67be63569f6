"""Where and with which numbers a model computes."""

from __future__ import annotations

import torch


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device to use: "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device; the message says which it has.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = _devices()
    try:
        found = torch.device(device)
        if (found.index or 0) < there.get(found.type, 0):
            return found
    except (RuntimeError, TypeError):  # no device has such a name, anywhere
        pass
    names = ", ".join(kind if kind != "cuda" else f"cuda:{i}" for kind, count in there.items() for i in range(count))
    raise ValueError(f"device must be auto or one that exists, got {str(device)!r}; this machine has {names}")


def _devices() -> dict[str, int]:
    """How many devices of each kind this machine has."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "cuda": cuda, "mps": int(torch.backends.mps.is_available())}


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to use: "auto" is bfloat16 on CUDA, else float32.

    Raises:
        ValueError: no floating dtype of torch has this name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be auto, float32, bfloat16, float16 or a floating torch.dtype, got {dtype!r}")
    return found
