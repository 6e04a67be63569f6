"""The routers that ship are for the pool that ships."""

from __future__ import annotations

from pathlib import Path

import pytest

from loracompose import COMPOSERS, Engine, load_adapter
from loracompose.composers import get_composer
from loracompose.composition.router import load_router
from loracompose.models import DEFAULT_BASE

INDEX = Path(__file__).parent.parent / "index"
SMORA = INDEX / "smora" / "nine_tasks"
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


def test_the_shipped_smora_adapter_has_a_router_of_its_own_and_both_are_small():
    adapter, router = load_adapter(SMORA), load_router(SMORA.with_name(f"{SMORA.name}.router"))
    assert router.adapters is not None
    assert [(own.name, own.fingerprint) for own in router.adapters] == [(SMORA.name, adapter.fingerprint)]
    assert {part.rank for part in adapter.factors.values()} == {64}
    assert router.settings["active"] == 8
    assert sum(file.stat().st_size for file in SMORA.parent.rglob("*") if file.is_file()) < 13e6


@pytest.mark.real
def test_the_shipped_smora_adapter_answers_by_its_gates():
    router = load_router(SMORA.with_name(f"{SMORA.name}.router"))
    prompts = [
        'Is this movie review positive or negative?\n"two hours of my life that i will never get back."',
        "French: Une femme lit un livre dans le parc.\nEnglish:",
    ]
    with Engine.from_pretrained(device="cpu") as engine:
        gated, ungated = (
            [answer.text for answer in engine.generate(prompts, adapters=[[SMORA]] * 2, composer=c, max_new_tokens=16)]
            for c in (get_composer("smora", router), "mixture")
        )
    assert gated == ["negative", "A woman is reading a book in the park."]
    assert ungated != gated


def test_routers_of_the_methods_that_the_documents_use_are_there():
    assert {"lora_flow", "mole", "ramole", "milora", "smora"} <= {folder.name for folder in ROUTERS}
