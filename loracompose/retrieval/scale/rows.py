"""Rows of numbers in a file: written once from beginning to end, then read where they are wanted.

A row is kept as whole numbers of 16 bits under a scale of its own: half the bytes of single precision, and, other than
numbers of half precision, turned into single ones at the speed of memory. What is read differs from what was written by
at most the row's largest number over 65,534; written again it stays as it is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_KEPT_BYTES = 64 << 20
"""Pages of a mapped file that may stay in this process, of those that were asked for: the system maps some around them
as well, up to seven times as many. Its cache keeps the others."""

_PAGE = 4096
_SPOTS, _SPOT_BYTES = 64, 1 << 16
_LARGEST = 32767
_SCALE = 2  # numbers of 16 bits that the scale of a row takes


class FileWriter:
    """Appends bytes to a new file and knows how many they are and their sha256."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._digest = hashlib.sha256()
        self._file = path.open("xb")

    def write(self, content: bytes | memoryview) -> None:
        """Append."""
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def close(self) -> str:
        """Make the file durable; returns its sha256."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self._digest.hexdigest()


class MappedFile:
    """A file that is read in places: mapped, with a bound on the pages that stay mapped.

    An unlinked file stays readable until it is closed.
    """

    def __init__(self, path: Path) -> None:
        self.size = path.stat().st_size
        self._touched = 0
        self._lock = threading.Lock()
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        if self._map is not None:
            self._map.madvise(mmap.MADV_RANDOM)

    @property
    def content(self) -> memoryview:
        """All bytes; what is read of them must be told by `touched`."""
        return memoryview(b"" if self._map is None else self._map)

    def touched(self, places: int, length: int) -> None:
        """Count reads, so many of this length, and let pages go when they are too many."""
        with self._lock:
            self._touched += places * (-(-length // _PAGE) + 1) * _PAGE
            if self._touched > _KEPT_BYTES and self._map is not None:
                self._map.madvise(mmap.MADV_DONTNEED)  # of a file: they are read again from the system's cache
                self._touched = 0


class Scaled(NamedTuple):
    """Rows as they are kept: `codes` (n, width), each row to be multiplied by its own of the `scales` (n,)."""

    codes: NDArray[np.float32]
    scales: NDArray[np.float32]

    @classmethod
    def of(cls, rows: NDArray[np.float32]) -> Scaled:
        """Rows that are not packed, (n, width)."""
        return cls(rows, np.ones(len(rows), dtype=np.float32))

    @property
    def rows(self) -> NDArray[np.float32]:
        """The rows themselves, (n, width)."""
        return self.codes * self.scales[:, None]

    def times(self, other: NDArray[np.float32]) -> NDArray[np.float32]:
        """Products with a vector (width,) or a matrix (width, r): (n,) or (n, r)."""
        product = self.codes @ other
        return np.asarray(product * (self.scales if product.ndim == 1 else self.scales[:, None]))

    def and_then(self, other: Scaled) -> Scaled:
        """These, and others after them."""
        return Scaled(np.concatenate([self.codes, other.codes]), np.concatenate([self.scales, other.scales]))


class Rows:
    """Rows of `width` numbers in a file, as `packed` made them."""

    def __init__(self, path: Path, width: int) -> None:
        self._file = MappedFile(path)
        self._rows = np.frombuffer(self._file.content, dtype="<i2").reshape(-1, _SCALE + width)

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: NDArray[np.int64]) -> Scaled:
        """These rows."""
        found: NDArray[np.int16] = np.take(self._rows, rows, axis=0)
        self._file.touched(len(rows), found.itemsize * found.shape[1])
        return _unpacked(found)

    def blocks(self, size: int = 8192) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in their order, by blocks: the first row of each, and the block."""
        for start in range(0, len(self), size):
            block = self._rows[start : start + size]
            self._file.touched(1, block.nbytes)
            yield start, _unpacked(block).rows


def packed(rows: NDArray[np.floating]) -> bytes:
    """Rows (n, width) as `Rows` reads them."""
    scales = (np.abs(rows).max(axis=1, initial=0.0) / _LARGEST).astype("<f4")
    scales[scales == 0] = 1.0
    found = np.empty((len(rows), _SCALE + rows.shape[1]), dtype="<i2")
    found[:, :_SCALE] = scales.view("<i2").reshape(-1, _SCALE)
    found[:, _SCALE:] = np.clip(np.rint(rows / scales[:, None]), -_LARGEST, _LARGEST)
    return found.tobytes()


def _unpacked(rows: NDArray[np.int16]) -> Scaled:
    scales = np.ascontiguousarray(rows[:, :_SCALE]).view("<f4").ravel()
    return Scaled(rows[:, _SCALE:].astype(np.float32), scales)


def spot_digest(path: Path) -> str:
    """The sha256 of evenly spaced parts of a file, of all of a small one: quick, and it notices a mangled copy."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for spot in range(_SPOTS):
            file.seek(max(size - _SPOT_BYTES, 0) * spot // (_SPOTS - 1))
            digest.update(file.read(_SPOT_BYTES))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
