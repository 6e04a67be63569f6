"""An adapter is held against its base: modules, shapes, kinds and completeness."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from loracompose import UnsupportedAdapterError, load_adapter
from loracompose.adapters.base import as_module
from tests.tiny import CONFIGS, base_model, edited, peft_adapter


def llama(**changes) -> LlamaConfig:
    return LlamaConfig.from_dict({**CONFIGS["llama"].to_dict(), **changes})


@pytest.mark.parametrize("base", ["llama", "gpt2", "t5"])
def test_a_configuration_serves_as_a_base_without_weights(tmp_path, base):
    folder, _ = peft_adapter(tmp_path, base=base)
    model = as_module(CONFIGS[base])
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert load_adapter(folder, base=CONFIGS[base]).fingerprint == load_adapter(folder).fingerprint


def test_the_architecture_a_configuration_names_is_built():
    assert type(as_module(llama(architectures=["LlamaModel"]))).__name__ == "LlamaModel"
    assert type(as_module(llama(architectures=None))).__name__ == "LlamaForCausalLM"


def test_a_module_the_base_lacks_is_an_error_with_what_it_has(tmp_path):
    folder, _ = peft_adapter(tmp_path)
    with pytest.raises(LookupError, match=r"no module 'model.layers.1.self_attn.q_proj'; it has \['model.layers.0"):
        load_adapter(folder, base=llama(num_hidden_layers=1))
    with pytest.raises(LookupError, match=r"no module 'model.layers.0.self_attn.q_proj'"):
        load_adapter(folder, base=CONFIGS["gpt2"])


def test_a_shape_that_does_not_fit_is_an_error_with_both_shapes(tmp_path):
    folder, _ = peft_adapter(tmp_path, target_modules=["down_proj"])
    with pytest.raises(ValueError, match=r"mlp.down_proj' maps 64 -> 32 in the adapter and 48 -> 32 in the base"):
        load_adapter(folder, base=llama(intermediate_size=48))
    embedding, _ = peft_adapter(tmp_path, "embedding", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match=r"'model.embed_tokens' maps 128 -> 32 in the adapter and 130 -> 32"):
        load_adapter(embedding, base=llama(vocab_size=130))


def test_conv1d_is_held_against_its_transposed_weight(tmp_path):
    folder, _ = peft_adapter(tmp_path, base="gpt2", target_modules=["c_attn"])
    factors = load_adapter(folder, base=base_model("gpt2")).factors["transformer.h.0.attn.c_attn"]
    assert (factors.d_in, factors.d_out) == (32, 96)


def test_a_kind_that_does_not_fit_is_an_error(tmp_path):
    folder, _ = peft_adapter(tmp_path, target_modules=["q_proj"])
    model = base_model()
    model.model.layers[0].self_attn.q_proj = nn.Embedding(32, 32)
    with pytest.raises(ValueError, match="is of kind linear in the adapter and embedding in the base"):
        load_adapter(folder, base=model)
    model.model.layers[0].self_attn.q_proj = nn.Conv1d(32, 32, 1)
    with pytest.raises(UnsupportedAdapterError, match="is a Conv1d in the base"):
        load_adapter(folder, base=model)


def test_a_module_without_tensors_is_missed_when_the_base_has_it(tmp_path):
    folder, _ = peft_adapter(tmp_path)
    short = edited(
        folder, tmp_path / "short", tensors=lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.q" not in k}
    )
    load_adapter(short)  # the configuration alone cannot tell
    with pytest.raises(LookupError, match=r"no tensors for model.layers.1.self_attn.q_proj, which"):
        load_adapter(short, base=CONFIGS["llama"])


def test_a_target_the_base_does_not_have_is_no_loss(tmp_path):
    folder, _ = peft_adapter(tmp_path)
    wide = edited(folder, tmp_path / "wide", config={"target_modules": ["q_proj", "v_proj", "query_key_value"]})
    with pytest.raises(LookupError, match=r"no tensors for target_modules \['query_key_value'\].*base=\.\.\."):
        load_adapter(wide)
    assert load_adapter(wide, base=CONFIGS["llama"]).fingerprint == load_adapter(folder).fingerprint


@pytest.mark.parametrize("targets", ["all-linear", "ALL-LINEAR", None])
def test_targets_only_the_base_knows_are_checked_when_it_is_given(tmp_path, targets):
    made, _ = peft_adapter(tmp_path, target_modules=["q_proj", "v_proj"] if targets is None else "all-linear")
    folder = edited(made, tmp_path / "copy", config={"target_modules": targets})
    adapter = load_adapter(folder, base=CONFIGS["llama"])
    assert len(adapter.factors) == (4 if targets is None else 14)
    short = edited(
        folder, tmp_path / "short", tensors=lambda t: {k: v for k, v in t.items() if "layers.1.self_attn.v" not in k}
    )
    with pytest.raises(LookupError, match=r"no tensors for model.layers.1.self_attn.v_proj"):
        load_adapter(short, base=CONFIGS["llama"])


def test_targets_nobody_names_need_a_known_architecture(tmp_path):
    made, _ = peft_adapter(tmp_path)
    folder = edited(made, tmp_path / "copy", config={"target_modules": None, "layers_to_transform": [0, 1]})
    load_adapter(folder, base=base_model())
    model = base_model()
    model.config.model_type = "homemade"
    with pytest.raises(LookupError, match="PEFT has no default for 'homemade'"):
        load_adapter(folder, base=model)


def test_a_saved_copy_of_the_embedding_must_be_the_bases(tmp_path):
    folder, _ = peft_adapter(tmp_path, target_modules=["embed_tokens", "lm_head"])
    assert "base_layer" in str((folder / "adapter_model.safetensors").read_bytes()[:3000])
    model = base_model()
    assert load_adapter(folder, base=model).fingerprint == load_adapter(folder).fingerprint
    with torch.no_grad():
        model.model.embed_tokens.weight[3, 3] += 1
    with pytest.raises(UnsupportedAdapterError, match=r"differs from the base's 'model.embed_tokens'"):
        load_adapter(folder, base=model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_copy_of_the_embedding_that_rounds_to_the_bases_is_the_bases(tmp_path, dtype):
    folder, _ = peft_adapter(tmp_path, target_modules=["embed_tokens"])
    assert load_adapter(folder, base=base_model(dtype=dtype)).fingerprint == load_adapter(folder).fingerprint
    with pytest.raises(UnsupportedAdapterError, match=r"differs from the base's 'model.embed_tokens'"):
        load_adapter(folder, base=base_model(seed=1, dtype=dtype))


def test_tensors_outside_a_regex_of_the_base_are_stray(tmp_path):
    folder, _ = peft_adapter(tmp_path, target_modules=r".*\.(q|v)_proj")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["target_modules"] == r".*\.(q|v)_proj"
    narrow = edited(folder, tmp_path / "narrow", config={"target_modules": r".*\.q_proj"})
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.v_proj' has tensors, but"):
        load_adapter(narrow, base=CONFIGS["llama"])
