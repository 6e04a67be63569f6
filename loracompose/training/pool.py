"""The pool that a router is trained with: adapters from an index, from folders or as they are, for one base."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from loracompose.adapters.checkpoint import load_adapter
from loracompose.adapters.lora import Adapter
from loracompose.composers.base import Pool
from loracompose.composition.bank import content_order, gather_banks
from loracompose.models import BaseModel
from loracompose.retrieval.index import AdapterIndex
from loracompose.retrieval.placement import CATALOG_FILE

Adapters = AdapterIndex | str | Path | Sequence[str | Path | Adapter]
CONFIG_FILE = "adapter_config.json"


@dataclass(frozen=True, eq=False)
class LoadedPool:
    """A pool, and the index that finds its adapters if there is one."""

    pool: Pool
    index: AdapterIndex | None


@contextmanager
def open_pool(adapters: Adapters, base: BaseModel) -> Iterator[LoadedPool]:
    """Load adapters in float32 where the base is, sorted by content; an index opened for it is closed behind it.

    Args:
        adapters: an open index or its folder, a folder of adapter folders, or folders and adapters one by one.
        base: the base they must fit.

    Raises:
        FileNotFoundError: a folder that holds no adapter.
        ValueError: no adapter, one that does not fit the base, two of one name, one that stands twice, or one that
            was changed since it was indexed.
    """
    if isinstance(adapters, str | Path) and (Path(adapters) / CATALOG_FILE).is_file():
        with AdapterIndex.open(adapters) as index:
            yield _load(indexed(index, base), index, base)
    elif isinstance(adapters, AdapterIndex):
        yield _load(indexed(adapters, base), adapters, base)
    else:
        found = [a if isinstance(a, Adapter) else _read(a, base) for a in listed(adapters)]
        yield _load(found, None, base)


def _load(loaded: Sequence[Adapter], index: AdapterIndex | None, base: BaseModel) -> LoadedPool:
    check_distinct(loaded)
    ordered = [loaded[i].to(base.device, torch.float32) for i in content_order(loaded)]
    hidden = int(base.model.config.get_text_config().hidden_size)
    names = tuple(adapter.name for adapter in ordered)
    return LoadedPool(Pool(base.name, hidden, names, gather_banks(ordered)), index)


def _read(folder: Path, base: BaseModel, name: str | None = None) -> Adapter:
    return load_adapter(folder, base=base.model, name=name, dtype=torch.float32, device=base.device)


def indexed(index: AdapterIndex, base: BaseModel) -> list[Adapter]:
    """The adapters of an index under the names it has for them.

    Raises:
        ValueError: a folder was changed since it was indexed, or an adapter does not fit the base.
    """
    loaded = []
    for card in index.cards:
        adapter = _read(index.path(card.name), base, card.name)
        if adapter.fingerprint != card.fingerprint:
            raise ValueError(
                f"{index.path(card.name)} holds the adapter {adapter.fingerprint[:12]}, and the index knows "
                f"{card.name!r} as {card.fingerprint[:12]}: it was changed since; tell the index with update(folder)"
            )
        loaded.append(adapter)
    return loaded


def listed(adapters: str | Path | Sequence[str | Path | Adapter]) -> list[Path | Adapter]:
    """Adapters one by one; a folder that is no adapter stands for those in it."""
    if not isinstance(adapters, str | Path):
        return [adapter if isinstance(adapter, Adapter) else Path(adapter) for adapter in adapters]
    home = Path(adapters)
    if (home / CONFIG_FILE).is_file():
        return [home]
    found = sorted(config.parent for config in home.glob(f"*/{CONFIG_FILE}"))
    if not found:
        raise FileNotFoundError(f"{home} is no index, and no folder in it holds an adapter ({CONFIG_FILE})")
    return list(found)


def check_distinct(adapters: Sequence[Adapter]) -> None:
    """Refuse a pool of nothing, and one in which two adapters cannot be told apart.

    Raises:
        ValueError: it is such a pool.
    """
    if not adapters:
        raise ValueError("a router needs adapters to choose from, got none")
    seen: dict[str, str] = {}
    for adapter in adapters:
        if adapter.name in seen.values():
            raise ValueError(f"two adapters of the pool are named {adapter.name!r}")
        if adapter.fingerprint in seen:
            raise ValueError(f"adapters {seen[adapter.fingerprint]!r} and {adapter.name!r} are the same; leave one out")
        seen[adapter.fingerprint] = adapter.name
