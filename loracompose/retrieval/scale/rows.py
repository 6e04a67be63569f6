"""Rows of numbers in a file: written once from beginning to end, then read where they are wanted.

A row is kept as whole numbers of 16 bits under a scale of its own: half the bytes of single precision, and, other than
numbers of half precision, turned into single ones at the speed of memory. What is read differs from what was written by
at most the row's largest number over 65,534; written again it stays as it is.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_MAPPED_BYTES = 256 << 20
"""Size up to which a file is mapped, so that what was read of it stays. Of a larger one every piece is read anew, from
the system's cache: as quick as mapping pages and giving them back, and none of it is memory of this process."""

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


class StoredFile:
    """A file that is read in places: mapped if it is not large, otherwise piece by piece.

    An unlinked file stays readable until it is closed, with the last reference to it.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)
        self.size = os.fstat(self._file.fileno()).st_size
        self.mapped: memoryview | None = None
        if self.size > _MAPPED_BYTES:
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        elif self.size:
            self.mapped = memoryview(_mapped(self._file.fileno()))
        else:
            self.mapped = memoryview(b"")

    def pieces(self, starts: Sequence[int], ends: Sequence[int]) -> bytes:
        """The bytes between these places, one piece after the other."""
        cuts = zip(starts, ends, strict=True)
        if self.mapped is not None:
            return b"".join([self.mapped[start:end] for start, end in cuts])
        file = self._file.fileno()
        return b"".join([os.pread(file, end - start, start) for start, end in cuts])


def _mapped(file: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_POPULATE"):  # on Linux: else the first searches map it page by page
        return mmap.mmap(file, 0, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
    return mmap.mmap(file, 0, access=mmap.ACCESS_READ)


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
        self._file = StoredFile(path)
        self._numbers = _SCALE + width
        self._mapped = None if self._file.mapped is None else self._shaped(self._file.mapped)

    def __len__(self) -> int:
        return self._file.size // (2 * self._numbers)

    def take(self, rows: NDArray[np.int64]) -> Scaled:
        """These rows."""
        if self._mapped is not None:
            return _unpacked(self._mapped.take(rows, axis=0))
        starts = 2 * self._numbers * rows
        return _unpacked(self._shaped(self._file.pieces(starts.tolist(), (starts + 2 * self._numbers).tolist())))

    def blocks(self, size: int = 8192) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """All rows in their order, by blocks: the first row of each, and the block."""
        length = 2 * self._numbers
        for start in range(0, len(self), size):
            end = min(start + size, len(self))
            yield start, _unpacked(self._shaped(self._file.pieces([length * start], [length * end]))).rows

    def _shaped(self, content: bytes | memoryview) -> NDArray[np.int16]:
        return np.frombuffer(content, dtype="<i2").reshape(-1, self._numbers)


class HeldRows:
    """Rows of few numbers, all in memory, (n, width)."""

    def __init__(self, rows: NDArray[np.float32]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: NDArray[np.int64]) -> Scaled:
        """These rows."""
        return Scaled.of(self._rows[rows])

    def blocks(self, size: int = 8192) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """As `Rows.blocks`."""
        for start in range(0, len(self), size):
            yield start, self._rows[start : start + size]


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
