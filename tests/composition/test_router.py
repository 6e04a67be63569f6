"""Routers: what was learned is what is read back, and nothing else."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loracompose.composers import get_composer
from loracompose.composition.router import Router, RouterAdapter, load_router, save_router


def router() -> Router:
    generator = torch.Generator().manual_seed(0)
    return Router(
        "mole",
        {"granularity": "layer", "temperature": 1.5},
        {"layer.0": torch.randn(2, 3, generator=generator), "bias": torch.randn(2, generator=generator).bfloat16()},
        "tiny",
        (RouterAdapter("aa11", "sst2"), RouterAdapter("bb22", "trec")),
        {"seed": 3, "losses": [2.5, 1.25]},
    )


def test_a_saved_router_is_read_back_bit_by_bit(tmp_path: Path):
    save_router(router(), tmp_path / "r")
    found = load_router(tmp_path / "r")
    assert found.fingerprint == router().fingerprint
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in router().tensors.items())
    same = [(r.method, dict(r.settings), r.base_model, r.adapters, dict(r.training)) for r in (found, router())]
    assert same[0] == same[1]


def test_a_router_is_identified_by_what_it_computes():
    one = router()
    changed = {**one.tensors, "bias": one.tensors["bias"] + 1}
    assert replace(one, tensors=changed).fingerprint != one.fingerprint
    assert replace(one, settings={"granularity": "block"}).fingerprint != one.fingerprint
    assert replace(one, adapters=None).fingerprint != one.fingerprint
    assert replace(one, training={}).fingerprint == one.fingerprint


def test_its_repr_holds_its_fingerprint_and_no_tensors():
    assert repr(router()) == f"Router('mole', {router().fingerprint[:12]})"


def test_adapters_are_counted_by_content_in_any_order():
    assert router().columns(["bb22", "aa11"]) == [1, 0]


def test_an_adapter_it_was_not_trained_for_is_refused_by_name_of_those_it_knows():
    with pytest.raises(LookupError, match="fingerprint cc33; it knows sst2, trec"):
        router().columns(["aa11", "cc33"])


def test_a_missing_tensor_and_a_wrong_shape_are_refused():
    with pytest.raises(LookupError, match="no tensor"):
        router().tensor("layer.1", (2, 3))
    with pytest.raises(ValueError, match=r"shape \(2, 3\), expected \(3, 3\)"):
        router().tensor("layer.0", (3, 3))


def test_an_existing_folder_is_not_overwritten(tmp_path: Path):
    save_router(router(), tmp_path / "r")
    with pytest.raises(FileExistsError, match="exists already"):
        save_router(router(), tmp_path / "r")


@pytest.mark.parametrize("damage", ["no tensors", "other tensors", "newer", "no json", "no settings"])
def test_a_damaged_router_is_refused(tmp_path: Path, damage: str):
    home = tmp_path / "r"
    save_router(router(), home)
    record = json.loads((home / "router.json").read_text())
    match damage:
        case "no tensors":
            (home / "router.safetensors").write_bytes(b"short")
        case "other tensors":
            save_file({"bias": torch.zeros(2)}, home / "router.safetensors")
        case "newer":
            (home / "router.json").write_text(json.dumps({**record, "format": 2}))
        case "no json":
            (home / "router.json").write_text("{")
        case "no settings":
            del record["settings"]
            (home / "router.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="train"):
        load_router(home)


def test_a_folder_without_a_router_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="no router in"):
        load_router(tmp_path)


def test_a_composer_that_learns_nothing_takes_no_router():
    with pytest.raises(ValueError, match="learns nothing"):
        get_composer("mixture", router())


def test_an_instance_takes_no_router_beside_it():
    with pytest.raises(ValueError, match="is no name"):
        get_composer(get_composer("mixture"), router())
