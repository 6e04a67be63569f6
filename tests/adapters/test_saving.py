"""What is saved is a plain PEFT folder: stock PEFT gives the same logits, and reading it back gives it again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loracompose import Adapter, LoraFactors, load_adapter, save_adapter
from loracompose.adapters.folder import write_folder
from tests.adapters.test_flavours import BASES, FLAVOURS
from tests.tiny import EMBEDDINGS, base_model, edited, logits, peft_adapter, peft_load, relative_error


def small(rank=2, *, name="small", recipe=None, dtype=torch.float32, **other) -> Adapter:
    generator = torch.Generator().manual_seed(3)

    def factors(rank, dtype=dtype):
        A = torch.randn(rank, 32, generator=generator, dtype=torch.float64)
        B = torch.randn(16, rank, generator=generator, dtype=torch.float64)
        return LoraFactors(A.to(dtype), B.to(dtype))

    modules = {"model.layers.0.self_attn.v_proj": rank, **other}
    return Adapter(name, {module: factors(r) for module, r in modules.items()}, recipe=recipe)


def assert_equal(got: Adapter, want: Adapter) -> None:
    assert list(got.factors) == list(want.factors)
    for module, factors in want.factors.items():
        assert torch.equal(got.factors[module].A, factors.A)
        assert torch.equal(got.factors[module].B, factors.B)
        assert got.factors[module].kind == factors.kind
    assert got.fingerprint == want.fingerprint


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "flavour", ["plain", "both patterns and rslora", "every linear by list", "embedding, linear and rslora"]
)
def test_stock_peft_loads_it_to_equal_logits(tmp_path, flavour, base):
    folder, peft = peft_adapter(tmp_path, base=base, scale=0.1, **FLAVOURS[flavour](base))
    saved = save_adapter(load_adapter(folder), tmp_path / "saved")
    assert relative_error(logits(peft_load(saved, base=base), base), logits(peft, base)) < 1e-5
    assert relative_error(logits(base_model(base), base), logits(peft, base)) > 1e-3


def test_it_is_read_back_as_it_was_recipe_included(tmp_path):
    folder, _ = peft_adapter(tmp_path, target_modules=["q_proj", EMBEDDINGS["llama"]])
    recipe = {"method": "mixture", "sources": [{"name": "a", "fingerprint": "0" * 64}], "weights": [0.5]}
    made = load_adapter(folder)
    adapter = Adapter("x", made.factors, base_model="b", task_type="CAUSAL_LM", recipe=recipe)
    back = load_adapter(save_adapter(adapter, tmp_path / "saved"), name="x")
    assert_equal(back, adapter)
    assert (back.base_model, back.task_type, back.recipe) == ("b", "CAUSAL_LM", recipe)
    versions = json.loads((tmp_path / "saved" / "recipe.json").read_text())["versions"]
    assert set(versions) == {"loracompose", "torch", "peft"}
    assert_equal(load_adapter(save_adapter(back, tmp_path / "again")), adapter)


def test_an_adapter_without_a_recipe_is_saved_as_a_copy_of_itself(tmp_path):
    adapter = small()
    back = load_adapter(save_adapter(adapter, tmp_path / "saved"))
    assert back.recipe == {"method": "copy", "sources": [{"name": "small", "fingerprint": adapter.fingerprint}]}


def test_unequal_ranks_are_padded_to_one_without_patterns(tmp_path):
    adapter = small(2, **{"model.layers.1.self_attn.v_proj": 5, "model.layers.1.self_attn.k_proj": 0})
    saved = save_adapter(adapter, tmp_path / "saved")
    config = json.loads((saved / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (5, 5, {}, False)
    assert config["target_modules"] == list(adapter.factors)
    for module, factors in load_adapter(saved, base=base_model()).factors.items():
        assert factors.rank == 5
        torch.testing.assert_close(factors.B @ factors.A, adapter.factors[module].B @ adapter.factors[module].A)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_are_kept(tmp_path, dtype):
    adapter = small(dtype=dtype)
    saved = save_adapter(adapter, tmp_path / "saved")
    assert {t.dtype for t in load_file(saved / "adapter_model.safetensors").values()} == {dtype}
    back = load_adapter(saved, dtype=dtype)
    for module, factors in adapter.factors.items():
        assert torch.equal(back.factors[module].B, factors.B)


def test_factors_that_share_memory_or_are_views_can_be_saved(tmp_path):
    A, B = torch.randn(3, 32), torch.randn(3, 16)
    factors = LoraFactors(A, B.T)
    adapter = Adapter("x", {"a.q": factors, "a.v": factors, "a.k": LoraFactors(A[:2], B.T[:, :2])})
    back = load_adapter(save_adapter(adapter, tmp_path / "saved"))
    assert torch.equal(back.factors["a.v"].B, factors.B)


def test_equal_adapters_make_equal_files(tmp_path):
    one, two = save_adapter(small(), tmp_path / "one"), save_adapter(small(), tmp_path / "two")
    for file in one.iterdir():
        assert file.read_bytes() == (two / file.name).read_bytes()


@pytest.mark.parametrize("adapter", [Adapter("void", {}), small(0, name="void")])
def test_an_adapter_without_ranks_is_refused(tmp_path, adapter):
    with pytest.raises(ValueError, match="void: it has no ranks"):
        save_adapter(adapter, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_whoever_may_read_the_folder_may_read_its_files(tmp_path):
    folder = save_adapter(small(), tmp_path / "saved")
    allowed = folder.stat().st_mode & 0o444
    assert {file.stat().st_mode & 0o444 for file in folder.iterdir()} == {allowed}


def test_values_that_are_not_finite_are_refused(tmp_path):
    adapter = Adapter("x", {"a.q": LoraFactors(torch.full((1, 2), float("inf")), torch.ones(2, 1))})
    with pytest.raises(ValueError, match=r"a\.q\.lora_A.* not finite"):
        save_adapter(adapter, tmp_path / "saved")


def test_a_recipe_that_names_versions_itself_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'versions' is written by save_adapter"):
        save_adapter(small(recipe={"versions": {}}), tmp_path / "saved")


def test_an_existing_target_is_refused_and_left_alone(tmp_path):
    target = save_adapter(small(), tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in target.iterdir()}
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_adapter(small(3), target)
    assert {file.name: file.read_bytes() for file in target.iterdir()} == before


def test_overwriting_replaces_the_folder_and_leaves_nothing_beside_it(tmp_path):
    target = save_adapter(small(), tmp_path / "saved")
    assert_equal(load_adapter(save_adapter(small(3), target, overwrite=True)), small(3))
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_overwriting_never_deletes_what_is_no_adapter(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no adapter is not replaced"):
        save_adapter(small(), tmp_path / "home", overwrite=True)
    with pytest.raises(ValueError, match="not a folder"):
        save_adapter(small(), tmp_path / "file", overwrite=True)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    assert_equal(load_adapter(save_adapter(small(), tmp_path / "empty", overwrite=True)), small())


@pytest.mark.parametrize("step", ["fill", "rename"])
def test_a_failure_leaves_the_old_folder_and_no_trace(tmp_path, monkeypatch, step):
    target = save_adapter(small(), tmp_path / "saved")
    rename = Path.rename

    def fail_for_the_new_folder(self, to):
        if self.suffix == ".new":
            raise OSError("disk gone")
        return rename(self, to)

    if step == "rename":
        monkeypatch.setattr(Path, "rename", fail_for_the_new_folder)
        adapter, error = small(3), OSError
    else:
        adapter, error = small(3, recipe={"method": object()}), TypeError
    with pytest.raises(error):
        save_adapter(adapter, target, overwrite=True)
    assert_equal(load_adapter(target), small())
    assert [p.name for p in tmp_path.iterdir()] == ["saved"]


def test_parents_are_made_and_a_recipe_must_be_an_object(tmp_path):
    saved = save_adapter(small(), tmp_path / "a" / "b" / "saved")
    assert_equal(load_adapter(saved), small())
    (saved / "recipe.json").write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        load_adapter(saved)


def test_a_copy_with_another_scaling_is_another_adapter(tmp_path):
    saved = save_adapter(small(), tmp_path / "saved")
    other = edited(saved, tmp_path / "other", config={"lora_alpha": 4})
    assert load_adapter(other).fingerprint != small().fingerprint


def test_folders_inside_a_folder_can_be_entered_and_read(tmp_path):
    def fill(fresh):
        (fresh / "inside").mkdir()
        (fresh / "inside" / "file").write_text("text")
        (fresh / "inside" / "file").chmod(0o600)

    write_folder(tmp_path / "made", fill, overwrite=False)
    allowed = (tmp_path / "made").stat().st_mode & 0o777
    assert (tmp_path / "made" / "inside").stat().st_mode & 0o777 == allowed
    assert (tmp_path / "made" / "inside" / "file").stat().st_mode & 0o444 == allowed & 0o444
