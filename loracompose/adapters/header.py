"""The header of a safetensors file, checked before any tensor is mapped."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from loracompose.adapters.folder import open_regular, parse_json_object

MAX_HEADER_BYTES = 100_000_000
MAX_FILE_BYTES = 64 * 2**30
MAX_NAME_LENGTH = 1024
DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)


@dataclass(frozen=True)
class TensorEntry:
    """What the header says of one tensor: dtype, shape, and the bytes [begin, end) of the data it takes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class RawHeader:
    """The header of a safetensors file as it stands there, and how many bytes of data follow it."""

    text: bytes
    data_bytes: int


def read_raw_header(path: Path) -> RawHeader:
    """The header of a safetensors file.

    Raises:
        LookupError: the folder has no such file.
        ValueError: not a regular file, truncated or too large.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = _header_length(file.read(8), size, path)
        return RawHeader(file.read(length), size - 8 - length)


def parse_header(raw: RawHeader, path: Path) -> Mapping[str, TensorEntry]:
    """Name -> entry of every tensor in the file of a header, whose bytes they fill without gap or overlap.

    Raises:
        ValueError: malformed, a dtype that is no float, an empty dimension, or tensors that do not fill the file
            exactly.
    """
    header = parse_json_object(raw.text, f"the header of {path}")
    header.pop("__metadata__", None)
    entries = {name: _entry(name, value, path) for name, value in header.items()}
    _check_offsets(entries, raw.data_bytes, path)
    return MappingProxyType(entries)


def _header_length(raw: bytes, size: int, path: Path) -> int:
    if size > MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size} bytes, an adapter may have {MAX_FILE_BYTES}")
    length = int.from_bytes(raw, "little")
    if len(raw) < 8 or length < 2 or length > size - 8:
        raise ValueError(f"{path} is truncated or no safetensors file: {size} bytes, header length {length}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"the header of {path} has {length} bytes, at most {MAX_HEADER_BYTES} are read")
    return length


def _entry(name: str, value: Any, path: Path) -> TensorEntry:
    if not name.isprintable() or len(name) > MAX_NAME_LENGTH:
        raise ValueError(f"{path}: the tensor name {name[:80]!r} is too long or not printable")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{path}: the header entry of {name!r} must hold dtype, shape and data_offsets")
    dtype = DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise ValueError(f"{path}: {name!r} has dtype {value['dtype']!r}, expected one of {list(DTYPES)}")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_counts(shape) or 0 in shape:
        raise ValueError(f"{path}: {name!r} has shape {shape!r}, expected positive integers")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"{path}: {name!r} has data_offsets {offsets!r}, expected [begin, end]")
    begin, end = offsets
    if math.prod(shape) * dtype.itemsize != end - begin:
        raise ValueError(f"{path}: {name!r} of shape {shape} and {dtype} cannot fill {end - begin} bytes")
    return TensorEntry(dtype, tuple(shape), begin, end)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_offsets(entries: Mapping[str, TensorEntry], data_bytes: int, path: Path) -> None:
    spans = sorted((entry.begin, entry.end, name) for name, entry in entries.items())
    for (_, end, name), (begin, _, following) in pairwise([(0, 0, "the header"), *spans]):
        if begin != end:
            raise ValueError(f"{path}: {following!r} begins at byte {begin} of the data, {name!r} ends at {end}")
    last = spans[-1][1] if spans else 0
    if last != data_bytes:
        raise ValueError(f"{path} is truncated or padded: its tensors take {last} bytes of {data_bytes}")
