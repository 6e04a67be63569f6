"""The routers that ship are for the pool that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from loracompose import COMPOSERS, load_adapter
from loracompose.composition.router import load_router
from loracompose.models import DEFAULT_BASE

INDEX = Path(__file__).parent.parent / "index"
ROUTERS = sorted(folder for folder in (INDEX / "routers").iterdir() if folder.is_dir())


def fingerprints():
    return {load_adapter(config.parent).fingerprint for config in (INDEX / "pool").glob("*/adapter_config.json")}


@pytest.mark.parametrize("folder", ROUTERS, ids=lambda folder: folder.name)
def test_a_shipped_router_serves_the_shipped_pool_and_is_small(folder: Path):
    router = load_router(folder)
    assert router.method == folder.name in COMPOSERS
    assert router.base_model == DEFAULT_BASE
    if router.adapters is not None:
        assert {adapter.fingerprint for adapter in router.adapters} == fingerprints()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 13e6
    assert router.training["steps"] > 0


def test_routers_of_the_methods_that_the_documents_use_are_there():
    assert {"lora_flow", "mole", "ramole", "milora", "smora"} <= {folder.name for folder in ROUTERS}
