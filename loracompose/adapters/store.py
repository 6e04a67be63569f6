"""A bounded cache of loaded adapters: each is read once, by however many threads ask, and known by content."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from loracompose.adapters.base import Base, as_module, check_complete
from loracompose.adapters.bounded import Bounded
from loracompose.adapters.checkpoint import adapter_dtype, check_base_copies, check_dtype, convert, read_adapter
from loracompose.adapters.folder import CONFIG, WEIGHTS
from loracompose.adapters.layout import AdapterLayout, Headers, parse_layout, read_headers
from loracompose.adapters.lora import Adapter
from loracompose.adapters.transfer import Packed, occupied

# Layouts of adapters made alike are kept apart from `max_bytes`, which counts factors. One takes several times the
# bytes of its headers.
MAX_LAYOUT_BYTES = 2**25
LAYOUT_BYTES = 8

Signature = tuple[tuple[int, int, int], ...]


class ChangedAdapterError(ValueError):
    """An adapter folder does not hold the content that was asked for."""


@dataclass(frozen=True)
class StoreStats:
    """Counts since the store was made, and what it holds now.

    Attributes:
        hits: answers without a read of their own, waiting for another thread's included.
        misses: copies begun, from a file or from host memory.
        from_host: of these, those from host memory.
        evictions: copies dropped for lack of room.
        adapters: copies held.
        bytes: bytes they occupy.
        host_bytes: bytes of what host memory holds for other devices.
    """

    hits: int = 0
    misses: int = 0
    from_host: int = 0
    evictions: int = 0
    adapters: int = 0
    bytes: int = 0
    host_bytes: int = 0


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
    is used. What went to a device other than the CPU is kept in host memory too, pinned for CUDA, so that it comes
    back without a read when it was dropped there. Safe to use from several threads; simultaneous requests for one
    adapter make one read. A failed read reaches everyone who waited for it and is not remembered.

    Args:
        max_bytes: of factors kept at once; a larger adapter is returned but not kept.
        device: default device of the copies.
        dtype: default dtype of the copies; float32 (float64 for float64 files) if None.
        base: the base model or its configuration, which every adapter must fit.
        host_bytes: of factors kept in host memory for other devices; 0 keeps none.

    Raises:
        ValueError: a negative bound.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 2 * 2**30,
        host_bytes: int = 2 * 2**30,
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
        self._host: Bounded[tuple[str, torch.dtype], Packed] = Bounded(host_bytes, "host_bytes")
        self._streams: dict[torch.device, Any] = {}
        self._layouts: Bounded[Headers, AdapterLayout] = Bounded(MAX_LAYOUT_BYTES)
        self._reads: dict[_Request, Future[Adapter]] = {}
        self._hits = self._misses = self._from_host = 0

    @property
    def stats(self) -> StoreStats:
        """Counts up to now."""
        with self._lock:
            copies = self._copies
            counts = self._hits, self._misses, self._from_host
            return StoreStats(*counts, copies.evictions, len(copies), copies.bytes, self._host.bytes)

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
        known = self._trusted(request)
        if known is None:
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
        """A copy from host memory, or else from the file."""
        with self._lock:
            known, packed = self._trusted(request), None
            if known is not None:
                packed = self._host.get((known.adapter.fingerprint, request.dtype or known.dtype))
            if packed is not None:
                self._from_host += 1
        if known is not None and packed is not None:
            copy = packed.on(request.device, self._beside(request.device))
            bare, natural = known.adapter, known.dtype
        else:
            copy, bare, natural = self._from_file(request, known)
        with self._lock:
            self._known[request.folder] = _Known(request.signature, bare, natural)
            kept = self._keep((bare.fingerprint, request.device, request.dtype or natural), copy)
        return replace(bare, factors=kept.factors)

    def _from_file(self, request: _Request, known: _Known | None) -> tuple[Adapter, Adapter, torch.dtype]:
        """A copy, the adapter without tensors, and the dtype that the file is read in."""
        layout = self._layout(request.folder)
        if known is None and self._base is not None:
            check_base_copies(layout, self._base)
        adapter = read_adapter(layout, trusted=known is not None)
        if _signature(request.folder) != request.signature:
            raise ChangedAdapterError(f"{request.folder} changed while it was read; try again")
        identity = adapter.fingerprint if known is None else known.adapter.fingerprint
        adapter = replace(adapter, known_fingerprint=identity)
        bare, natural = replace(adapter, factors={}), adapter_dtype(layout)
        if request.device.type == "cpu" or not self._host.takes(occupied(adapter.nbytes)):
            return convert(adapter, request.device, request.dtype), bare, natural
        packed = Packed.of(convert(adapter, "cpu", request.dtype))
        with self._lock:
            self._hold((identity, request.dtype or natural), packed)
        return packed.on(request.device, self._beside(request.device)), bare, natural

    def _layout(self, folder: Path) -> AdapterLayout:
        """The layout of a folder, held against the base; once for all adapters whose headers are equal."""
        headers = read_headers(folder, folder.name)
        with self._lock:
            alike = self._layouts.get(headers)
        if alike is not None:
            return replace(alike, name=folder.name, weights=folder / WEIGHTS)
        layout = parse_layout(headers, folder, folder.name)
        check_complete(layout, self._base)
        with self._lock:
            if self._layouts.get(headers) is None:
                self._layouts.put(headers, layout, LAYOUT_BYTES * headers.nbytes)
        return layout

    def _beside(self, device: torch.device) -> Any:
        """The one stream that copies to a GPU; None for other devices."""
        if device.type != "cuda":
            return None
        with self._lock:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            return self._streams[device]

    def _trusted(self, request: _Request) -> _Known | None:
        known = self._known.get(request.folder)
        return known if known is not None and known.signature == request.signature else None

    def _hold(self, key: tuple[str, torch.dtype], packed: Packed) -> None:
        if self._host.get(key) is None:
            self._host.put(key, packed, packed.nbytes)

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
