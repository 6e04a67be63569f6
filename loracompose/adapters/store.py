"""A bounded cache of loaded adapters: each is read once, by however many threads ask, and known by content."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loracompose.adapters.base import Base, as_module
from loracompose.adapters.bounded import Bounded
from loracompose.adapters.checkpoint import adapter_dtype, check_dtype, convert, read_adapter, read_checked
from loracompose.adapters.folder import CONFIG, WEIGHTS
from loracompose.adapters.layout import read_layout
from loracompose.adapters.lora import Adapter

Signature = tuple[tuple[int, int, int], ...]


class ChangedAdapterError(ValueError):
    """An adapter folder does not hold the content that was asked for."""


@dataclass(frozen=True)
class StoreStats:
    """Counts since the store was made, and what it holds now.

    Attributes:
        hits: answers without a read of their own, waiting for another thread's included.
        misses: reads begun.
        evictions: copies dropped for lack of room.
        adapters: copies held.
        bytes: bytes they occupy.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    adapters: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Known:
    """A folder that was read in full: its files' signature then, and its adapter without the tensors."""

    signature: Signature
    adapter: Adapter
    dtype: torch.dtype


@dataclass(frozen=True)
class _Request:
    """One read: which files, and the copy wanted of them."""

    folder: Path
    signature: Signature
    device: torch.device
    dtype: torch.dtype | None


class AdapterStore:
    """Adapters by folder, loaded when first asked for and kept, least recently used out first.

    A copy is kept for each content, device and dtype, so equal adapters in two folders share one. A folder whose
    files have the size and time they had when they were read in full is trusted to hold the same and, once its copy was
    dropped, only read; otherwise it is read, checked and hashed again. A copy that is dropped goes on living where it
    is used. Safe to use from several threads; simultaneous requests for one adapter make one read.
    A failed read reaches everyone who waited for it and is not remembered.

    Args:
        max_bytes: of factors kept at once; a larger adapter is returned but not kept.
        device: default device of the copies.
        dtype: default dtype of the copies; float32 (float64 for float64 files) if None.
        base: the base model or its configuration, which every adapter must fit.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 2 * 2**30,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        base: Base | None = None,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._base = None if base is None else as_module(base)
        self._lock = threading.Lock()
        self._known: dict[Path, _Known] = {}
        self._copies: Bounded[tuple[str, torch.device, torch.dtype], Adapter] = Bounded(max_bytes)
        self._reads: dict[_Request, Future[Adapter]] = {}
        self._hits = self._misses = 0

    @property
    def stats(self) -> StoreStats:
        """Counts up to now."""
        with self._lock:
            return StoreStats(self._hits, self._misses, self._copies.evictions, len(self._copies), self._copies.bytes)

    def get(
        self,
        path: Path | str,
        *,
        fingerprint: str | None = None,
        name: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Adapter:
        """The adapter in a folder, as `load_adapter` gives it.

        Args:
            path: the folder.
            fingerprint: the content expected; a folder that holds another is refused.
            name: the adapter's name; the folder's if not given.
            device: of this copy; the store's if not given.
            dtype: of this copy; the store's if not given.

        Raises:
            ChangedAdapterError: the folder holds another content than expected, or changed while it was read.
            FileNotFoundError, LookupError, UnsupportedAdapterError, ValueError: as `load_adapter`.
        """
        folder = Path(path).resolve()
        wanted = dtype if dtype is not None else self._dtype
        if wanted is not None:
            check_dtype(wanted)
        place = _full_device(device if device is not None else self._device)
        adapter = self._find(_Request(folder, _signature(folder), place, wanted))
        if fingerprint is not None and adapter.fingerprint != fingerprint:
            raise ChangedAdapterError(
                f"{folder} holds the adapter {adapter.fingerprint}, expected {fingerprint}: its files were changed; "
                "restore them, or enter the adapter into the index again"
            )
        return adapter if name in (None, adapter.name) else replace(adapter, name=name)

    def _find(self, request: _Request) -> Adapter:
        """A copy held, a copy somebody is reading, or one read now."""
        with self._lock:
            held = self._held(request)
            if held is not None:
                self._hits += 1
                return held
            pending = self._reads.get(request)
            if pending is None:
                mine: Future[Adapter] = Future()
                self._reads[request] = mine
                self._misses += 1
            else:
                self._hits += 1
        return pending.result() if pending is not None else self._read(request, mine)

    def _held(self, request: _Request) -> Adapter | None:
        known = self._known.get(request.folder)
        if known is None or known.signature != request.signature:
            return None
        key = (known.adapter.fingerprint, request.device, request.dtype or known.dtype)
        copy = self._copies.get(key)
        if copy is None:
            return None
        return replace(known.adapter, factors=copy.factors)

    def _read(self, request: _Request, mine: Future[Adapter]) -> Adapter:
        """Read the folder and tell everyone who waits, whatever comes of it."""
        try:
            adapter = self._load(request)
        except BaseException as error:
            with self._lock:
                del self._reads[request]
            mine.set_exception(error)
            raise
        with self._lock:
            del self._reads[request]
        mine.set_result(adapter)
        return adapter

    def _load(self, request: _Request) -> Adapter:
        known = self._known.get(request.folder)
        trusted = known is not None and known.signature == request.signature
        if trusted:  # held against the base, checked and hashed when it was first read
            layout = read_layout(request.folder, request.folder.name)
        else:
            layout = read_checked(request.folder, base=self._base, name=None)
        adapter = read_adapter(layout, trusted=trusted)
        if _signature(request.folder) != request.signature:
            raise ChangedAdapterError(f"{request.folder} changed while it was read; try again")
        identity = known.adapter.fingerprint if known is not None and trusted else adapter.fingerprint
        natural = adapter_dtype(layout)
        bare = replace(adapter, factors={}, known_fingerprint=identity)
        copy = convert(replace(adapter, known_fingerprint=identity), request.device, request.dtype)
        with self._lock:
            self._known[request.folder] = _Known(request.signature, bare, natural)
            kept = self._keep((identity, request.device, request.dtype or natural), copy)
        return replace(bare, factors=kept.factors)

    def _keep(self, key: tuple[str, torch.device, torch.dtype], copy: Adapter) -> Adapter:
        """Hold a copy if it has room, unless one of the same content is held already: then that one."""
        held = self._copies.get(key)
        if held is not None:
            return held
        self._copies.put(key, copy, copy.nbytes)
        return copy


def _signature(folder: Path) -> Signature:
    """Size, time and file number of the files that decide what an adapter is; zeros for one that is missing."""
    return tuple(_stamp(folder / file) for file in (CONFIG, WEIGHTS))


def _stamp(file: Path) -> tuple[int, int, int]:
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):  # the read that follows says what is missing
        return 0, 0, 0
    return status.st_size, status.st_mtime_ns, status.st_ino


def _full_device(device: torch.device | str) -> torch.device:
    """The device with its number, so that "cuda" and "cuda:0" share a copy."""
    full = torch.device(device)
    if full.type == "cuda" and ":" not in str(full):
        return torch.device("cuda", torch.cuda.current_device())
    return full
