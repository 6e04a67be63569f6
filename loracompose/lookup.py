"""From what a caller names to adapters: names in the index, folders, or adapters as they are."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from loracompose.adapters.lora import Adapter
from loracompose.adapters.store import AdapterStore
from loracompose.membership import AdapterRef, Row
from loracompose.request import Identity
from loracompose.retrieval.index import AdapterIndex


def look_up(
    rows: Sequence[Row],
    store: AdapterStore,
    index: AdapterIndex | None,
    device: torch.device,
    dtype: torch.dtype | None = None,
) -> tuple[dict[AdapterRef, Adapter], dict[AdapterRef, Identity]]:
    """The adapters that have a weight in some row, and who everybody is.

    An adapter of the index that has weight 0 in every row is named from its card and not loaded.

    Args:
        rows: members of every prompt.
        store: where adapters are read and kept.
        index: where names are looked up.
        device: where the adapters go.
        dtype: of those that come from the index; the store's if None.

    Raises:
        LookupError: a name that the index does not have.
        ValueError: an adapter that cannot be read, or whose folder has changed since it was indexed.
    """
    loaded: dict[AdapterRef, Adapter] = {}
    identities: dict[AdapterRef, Identity] = {}
    used = {member.ref for row in rows for member in row if member.weight}
    for ref in dict.fromkeys(member.ref for row in rows for member in row):
        record = index.record(ref) if index is not None and isinstance(ref, str) else None
        if index is not None and record is not None:
            identities[ref] = Identity(record.name, record.fingerprint, record.base_model)
            if ref in used:
                folder = index.folder_of(record)
                loaded[ref] = store.get(folder, fingerprint=record.fingerprint, name=record.name, dtype=dtype)
        else:
            loaded[ref] = widened(by_hand(ref, store, index), device)
            identities[ref] = Identity(loaded[ref].name, loaded[ref].fingerprint, loaded[ref].base_model)
    return loaded, identities


def widened(adapter: Adapter, device: torch.device) -> Adapter:
    """The adapter on a device, in float32 or better: what is composed of it is rounded once, at the end."""
    dtype = torch.float32
    for factors in adapter.factors.values():
        dtype = torch.promote_types(torch.promote_types(factors.A.dtype, factors.B.dtype), dtype)
    return adapter.to(device, dtype)


def by_hand(ref: AdapterRef, store: AdapterStore, index: AdapterIndex | None) -> Adapter:
    """An adapter as it is, or out of a folder.

    A bare name is never looked up in the working directory: a removed adapter must not come back from there.

    Raises:
        LookupError: a name that is in no index.
        TypeError: neither a name, nor a folder, nor an adapter.
    """
    if isinstance(ref, Adapter):
        return ref
    if isinstance(ref, Path) or (isinstance(ref, str) and ("/" in ref or os.sep in ref)):
        return store.get(Path(ref))
    if not isinstance(ref, str):
        raise TypeError(f"an adapter is a name in the index, a folder or an Adapter, got {ref!r}")
    have = "the engine has no index" if index is None else f"the index has {near_names(ref, index)}"
    raise LookupError(f"no adapter {ref!r}: {have}; a folder is given as a Path or with a slash, ./{ref}")


def near_names(name: str, index: AdapterIndex) -> str:
    """What an index has that looks like a name, or how much it has."""
    near = difflib.get_close_matches(name, [card.name for card in index.cards], n=3)
    return ", ".join(near) if near else f"{len(index)} others"
