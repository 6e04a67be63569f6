"""An upload is looked over from names, sizes and headers, and every problem is reported at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import safetensors
import torch

from loracompose import load_adapter
from loracompose.adapters.inspection import MAX_FILES, inspect_folder
from tests.tiny import CONFIGS, edited, peft_adapter


@pytest.fixture
def folder(tmp_path) -> Path:
    return peft_adapter(tmp_path, "good", rank_pattern={"layers.1.self_attn.v_proj": 2})[0]


def test_a_good_folder_is_described(folder):
    found = inspect_folder(folder, base=CONFIGS["llama"])
    assert found.ok
    assert found.problems == ()
    assert found.name == "good"
    assert found.modules == tuple(load_adapter(folder).factors)
    assert found.ranks["model.layers.1.self_attn.v_proj"] == 2
    assert found.dtypes == (torch.float32,)
    assert found.bytes == (folder / "adapter_model.safetensors").stat().st_size
    assert found.task_type == "CAUSAL_LM"
    assert set(found.ignored) == {"README.md", "card.json"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.name = "other"


def test_every_problem_is_reported(folder, tmp_path):
    copy = edited(folder, tmp_path / "copy", config={"use_dora": True, "bias": "all"})
    (copy / "adapter_model.safetensors").write_bytes(b"short")
    (copy / "recipe.json").write_text("7")
    found = inspect_folder(copy)
    assert not found.ok
    words = ("use_dora", "bias", "truncated", "JSON object")
    assert [sum(word in problem for problem in found.problems) for word in words] == [1] * 4


def test_nothing_is_quoted_from_behind_a_link_out_of_the_folder(folder, tmp_path):
    secret = tmp_path / "secret.json"
    secret.write_text('{"peft_type": "hunter2"}')
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_config.json").symlink_to(secret)
    found = inspect_folder(folder)
    assert "hunter2" not in "".join(found.problems)
    assert len(found.problems) == 1


def test_no_tensor_is_mapped(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("mapped")

    monkeypatch.setattr(safetensors, "safe_open", refuse)
    monkeypatch.setattr("loracompose.adapters.checkpoint.safe_open", refuse)
    monkeypatch.setattr("loracompose.adapters.checkpoint.read_flat", refuse)
    assert inspect_folder(folder).ok
    with pytest.raises(AssertionError, match="mapped"):
        load_adapter(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "recipe.json", "sub"])
def test_a_link_out_of_the_folder_is_a_problem_and_one_within_is_not(folder, tmp_path, name):
    outside = tmp_path / "outside"
    (folder / name).rename(outside) if (folder / name).exists() else outside.write_text("{}")
    (folder / name).symlink_to(outside)
    assert "link that leads out" in "".join(inspect_folder(folder).problems)
    (folder / name).unlink()
    outside.rename(folder / f"real_{name}")
    (folder / name).symlink_to(f"real_{name}")
    assert inspect_folder(folder).ok


def test_too_many_files_are_a_problem(folder):
    for i in range(MAX_FILES):
        (folder / f"{i}.txt").touch()
    assert "more than 1000 files" in inspect_folder(folder).problems[0]


def test_a_base_that_does_not_fit_is_a_problem(folder):
    assert "no module" in "".join(inspect_folder(folder, base=CONFIGS["gpt2"]).problems)


def test_a_pickle_is_a_problem_only_where_it_is_all_there_is(folder):
    (folder / "adapter_model.bin").write_bytes(b"x")
    assert inspect_folder(folder).ok
    assert "adapter_model.bin" in inspect_folder(folder).ignored
    (folder / "adapter_model.safetensors").unlink()
    assert "is a pickle" in "".join(inspect_folder(folder).problems)


def test_a_folder_that_is_not_there_is_a_problem(tmp_path):
    found = inspect_folder(tmp_path / "nowhere")
    assert len(found.problems) == 1
    assert "there is no adapter folder" in found.problems[0]
