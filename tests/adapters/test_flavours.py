"""Every flavour of plain LoRA is read exactly: PEFT is the oracle."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from loracompose import Adapter, load_adapter
from tests.tiny import ALL_TARGETS, EMBEDDINGS, base_model, edited, logits, peft_adapter, relative_error

BASES = ("llama", "gpt2", "t5")
LAYER_0 = {"llama": r"layers\.0\..*", "gpt2": r"h\.0\..*", "t5": r"block\.0\..*"}
FLAVOURS = {
    "plain": lambda base: {},
    "rslora": lambda base: {"use_rslora": True, "r": 8},
    "rank one": lambda base: {"r": 1},
    "rank above the width": lambda base: {"r": 40},
    "every linear by list": lambda base: {"target_modules": ALL_TARGETS[base], "r": 2},
    "every linear by name": lambda base: {"target_modules": "all-linear"},
    "regex": lambda base: {"target_modules": rf".*{LAYER_0[base]}({'|'.join(ALL_TARGETS[base])})"},
    "rank pattern": lambda base: {"rank_pattern": {LAYER_0[base]: 2}},
    "alpha pattern": lambda base: {"alpha_pattern": {LAYER_0[base]: 3}},
    "both patterns and rslora": lambda base: {
        "rank_pattern": {LAYER_0[base]: 2},
        "alpha_pattern": {ALL_TARGETS[base][0]: 5},
        "target_modules": ALL_TARGETS[base],
        "use_rslora": True,
    },
    "one layer": lambda base: {"layers_to_transform": [1]},
    "one layer, as a number": lambda base: {"layers_to_transform": 1},
    "one layer by pattern": lambda base: {
        "layers_to_transform": [0],
        "layers_pattern": {"llama": "layers", "gpt2": "h", "t5": "block"}[base],
    },
    "excluded by list": lambda base: {
        "target_modules": ALL_TARGETS[base],
        "exclude_modules": ALL_TARGETS[base][:1],
    },
    "excluded by regex": lambda base: {"exclude_modules": rf".*{LAYER_0[base]}"},
    "embedding": lambda base: {"target_modules": [EMBEDDINGS[base]]},
    "embedding, linear and rslora": lambda base: {
        "target_modules": [EMBEDDINGS[base], *ALL_TARGETS[base]],
        "use_rslora": True,
    },
    "fan in fan out": lambda base: {"fan_in_fan_out": True},
    "gaussian": lambda base: {"init_lora_weights": "gaussian"},
    "orthogonal": lambda base: {"init_lora_weights": "orthogonal"},
    "no initialisation": lambda base: {"init_lora_weights": False},
    "dropout": lambda base: {"lora_dropout": 0.5},
    "alpha zero": lambda base: {"lora_alpha": 0},
    "negative alpha": lambda base: {"lora_alpha": -4},
}

FLAVOURS_IN_MODEL = ["plain", "both patterns and rslora", "one layer", "embedding", "embedding, linear and rslora"]


def in_weight_layout(module: nn.Module, delta: torch.Tensor) -> torch.Tensor:
    return delta.T if isinstance(module, (Conv1D, nn.Embedding)) else delta


def add_to_weights(model: nn.Module, adapter: Adapter) -> nn.Module:
    """The dense model: each weight replaced by weight + B @ A (a new parameter, so tied weights come apart)."""
    for path, factors in adapter.factors.items():
        module = model.get_submodule(path)
        delta = in_weight_layout(module, factors.B.double() @ factors.A.double())
        module.weight = nn.Parameter((module.weight.double() + delta).to(module.weight.dtype))
    return model


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_every_delta_is_pefts(tmp_path, flavour, base):
    folder, peft = peft_adapter(tmp_path, base=base, dtype=torch.float64, **FLAVOURS[flavour](base))
    adapter = load_adapter(folder, base=base_model(base))
    layers = {k: m for k, m in peft.base_model.model.named_modules() if isinstance(m, LoraLayer)}
    assert set(adapter.factors) == set(layers) != set()
    for path, layer in layers.items():
        factors = adapter.factors[path]
        assert factors.B.dtype == factors.A.dtype == torch.float64
        got = in_weight_layout(layer.get_base_layer(), factors.B @ factors.A)
        torch.testing.assert_close(got, layer.get_delta_weight("default"), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flavour", FLAVOURS_IN_MODEL)
def test_the_dense_sum_gives_pefts_logits(tmp_path, flavour, base):
    double = torch.float64
    folder, peft = peft_adapter(tmp_path, base=base, dtype=double, **FLAVOURS[flavour](base))
    got = logits(add_to_weights(base_model(base, dtype=double), load_adapter(folder)), base)
    assert relative_error(got, logits(peft, base)) < 1e-6
    assert relative_error(logits(base_model(base, dtype=double), base), logits(peft, base)) > 1e-3


def test_an_adapter_says_its_name_base_and_task(tmp_path):
    made, _ = peft_adapter(tmp_path, task_type="CAUSAL_LM")
    folder = edited(made, tmp_path / "poet", config={"base_model_name_or_path": "someone/base"})
    adapter = load_adapter(folder)
    assert (adapter.name, adapter.base_model, adapter.task_type) == ("poet", "someone/base", "CAUSAL_LM")
    assert (load_adapter(str(folder), name="bard").name, adapter.recipe) == ("bard", None)
    assert "model.layers.0.self_attn.q_proj" in adapter.factors


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scaling_is_folded_in_float32_and_rounded_once(tmp_path, stored):
    folder, _ = peft_adapter(tmp_path, r=3, lora_alpha=7)
    copy = edited(folder, tmp_path / "copy", tensors=lambda t: {k: v.to(stored) for k, v in t.items()})
    full, rounded = load_adapter(copy), load_adapter(copy, dtype=torch.bfloat16)
    for module, factors in full.factors.items():
        assert factors.A.dtype == factors.B.dtype == torch.float32
        assert torch.equal(rounded.factors[module].A, factors.A.to(torch.bfloat16))
        assert torch.equal(rounded.factors[module].B, factors.B.to(torch.bfloat16))


def test_rounding_keeps_the_fingerprint_and_content_decides_it(tmp_path):
    folder, _ = peft_adapter(tmp_path)
    other, _ = peft_adapter(tmp_path, "other", seed=2)
    adapter = load_adapter(folder)
    assert load_adapter(folder, dtype=torch.bfloat16, name="x").fingerprint == adapter.fingerprint
    assert (
        load_adapter(edited(folder, tmp_path / "scaled", config={"lora_alpha": 9})).fingerprint != adapter.fingerprint
    )
    assert load_adapter(other).fingerprint != adapter.fingerprint


def test_factors_do_not_map_the_file(tmp_path):
    folder, _ = peft_adapter(tmp_path)
    adapter = load_adapter(folder)
    before = {module: factors.A.clone() for module, factors in adapter.factors.items()}
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert all(torch.equal(adapter.factors[module].A, A) for module, A in before.items())


def test_tensors_named_for_one_adapter_are_read_and_for_two_refused(tmp_path):
    folder, _ = peft_adapter(tmp_path, target_modules=["q_proj", "embed_tokens"])

    def named(tensors, *names):
        out = {}
        for i, (key, value) in enumerate(sorted(tensors.items())):
            name = names[i % len(names)]
            key = key.replace("lora_A.weight", f"lora_A.{name}.weight")
            key = key.replace("lora_B.weight", f"lora_B.{name}.weight")
            out[f"{key}.{name}" if "lora_embedding" in key else key] = value
        return out

    one = edited(folder, tmp_path / "one", tensors=lambda t: named(t, "poet"))
    assert load_adapter(one).fingerprint == load_adapter(folder).fingerprint
    two = edited(folder, tmp_path / "two", tensors=lambda t: named(t, "poet", "bard"))
    with pytest.raises(ValueError, match=r"several adapters \(\['bard', 'poet'\]\)"):
        load_adapter(two)


def test_a_dtype_that_cannot_hold_factors_is_refused(tmp_path):
    folder, _ = peft_adapter(tmp_path)
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_adapter(folder, dtype=torch.int8)
