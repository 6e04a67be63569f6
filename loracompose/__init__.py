"""loracompose: find, compose and run LoRA adapters per prompt, a whole batch of compositions at once.

The public names are imported on first use, so that `import loracompose` runs nothing and the catalog
can be used without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loracompose.adapters.checkpoint import UnsupportedAdapterError, load_adapter, save_adapter
    from loracompose.adapters.lora import Adapter, LoraFactors
    from loracompose.adapters.store import AdapterStore
    from loracompose.composers import COMPOSERS, compose
    from loracompose.engine import Engine, Generation
    from loracompose.retrieval.catalog import Card
    from loracompose.retrieval.index import AdapterIndex
    from loracompose.retrieval.retriever import Retriever

__version__ = "0.1.0"

_HOME = {
    "Adapter": "loracompose.adapters.lora",
    "LoraFactors": "loracompose.adapters.lora",
    "UnsupportedAdapterError": "loracompose.adapters.checkpoint",
    "load_adapter": "loracompose.adapters.checkpoint",
    "save_adapter": "loracompose.adapters.checkpoint",
    "AdapterStore": "loracompose.adapters.store",
    "COMPOSERS": "loracompose.composers",
    "compose": "loracompose.composers",
    "Engine": "loracompose.engine",
    "Generation": "loracompose.engine",
    "Card": "loracompose.retrieval.catalog",
    "AdapterIndex": "loracompose.retrieval.index",
    "Retriever": "loracompose.retrieval.retriever",
}

__all__ = [
    "COMPOSERS",
    "Adapter",
    "AdapterIndex",
    "AdapterStore",
    "Card",
    "Engine",
    "Generation",
    "LoraFactors",
    "Retriever",
    "UnsupportedAdapterError",
    "compose",
    "load_adapter",
    "save_adapter",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'loracompose' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
