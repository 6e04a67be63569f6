"""What is not plain LoRA is refused by name; what is broken or incomplete is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig
from safetensors.torch import load_file

from loracompose import UnsupportedAdapterError, load_adapter
from loracompose.adapters.peft_config import LoraSettings, read_settings
from tests.tiny import edited, peft_adapter


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return peft_adapter(tmp_path_factory.mktemp("plain"))[0]


@pytest.fixture
def broken(plain, tmp_path):
    """Makes a copy of a good adapter with its configuration or tensors changed."""

    def make(config=None, tensors=None, name="broken"):
        return edited(plain, tmp_path / name, config=config, tensors=tensors)

    return make


UNSUPPORTED = {
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1, 2],
    "target_parameters": ["experts.gate_up_proj"],
    "layer_replication": [[0, 1], [0, 1]],
    "alora_invocation_tokens": [5],
    "use_qalora": True,
    "kasa_config": {"beta": 1.0},
    "arrow_config": {"top_k": 2},
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"groups": 2},
    "megatron_config": {"tp": 2},
    "ensure_weight_tying": True,
    "loftq_config": {"loftq_bits": 4},
    "corda_config": {"corda_method": "ipm"},
    "lora_ga_config": {"direction": "ArB2r"},
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_a_field_that_changes_the_update_is_refused_by_name(broken, field):
    with pytest.raises(UnsupportedAdapterError, match=f"broken: {field}="):
        load_adapter(broken({field: UNSUPPORTED[field]}))


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "mica", "shiny", "EVA", 1, {"a": 1}]
)
def test_an_initialisation_that_rewrites_the_base_is_refused(broken, init):
    with pytest.raises(UnsupportedAdapterError, match=r"init_lora_weights=.*path_initial_model_for_weight_conversion"):
        load_adapter(broken({"init_lora_weights": init}))


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "eva"])
def test_an_initialisation_that_leaves_the_base_alone_is_read(broken, plain, init):
    folder = broken({"init_lora_weights": init, "eva_config": {"rho": 2.0} if init == "eva" else None})
    assert load_adapter(folder).fingerprint == load_adapter(plain).fingerprint


@pytest.mark.parametrize("value", [True, 1, 0, 0.5, "on", ["x"], {"x": 1}])
def test_an_option_nobody_knows_is_refused_when_it_is_set(broken, value):
    with pytest.raises(UnsupportedAdapterError, match="use_shiny="):
        load_adapter(broken({"use_shiny": value}))


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_an_option_nobody_knows_is_allowed_when_it_is_off(broken, plain, value):
    assert load_adapter(broken({"use_shiny": value})).fingerprint == load_adapter(plain).fingerprint


def test_every_field_of_the_installed_peft_is_read_inert_or_refused(broken, plain):
    """A new PEFT field, set to anything but its default, must not slip through."""
    inert = {
        "auto_mapping": {"base_model_class": "X"},
        "peft_version": "0.1",
        "revision": "main",
        "inference_mode": False,
        "lora_dropout": 0.3,
        "megatron_core": "other",
        "qalora_group_size": 4,
        "eva_config": {"rho": 1.0},
        "fan_in_fan_out": True,
        "base_model_name_or_path": "x",
        "task_type": None,
    }
    shaping = {
        "peft_type", "r", "lora_alpha", "use_rslora", "target_modules", "exclude_modules", "layers_to_transform",
        "layers_pattern", "rank_pattern", "alpha_pattern", "init_lora_weights",
    }  # fmt: skip
    assert load_adapter(broken(inert)).fingerprint == load_adapter(plain).fingerprint
    fields = set(json.loads((plain / "adapter_config.json").read_text()))
    for field in fields - set(inert) - shaping:
        with pytest.raises(UnsupportedAdapterError, match=f"{field}="):
            load_adapter(broken({field: ["set"]}, name=f"with_{field}"))


def test_all_refused_fields_are_listed_at_once(broken):
    with pytest.raises(UnsupportedAdapterError) as caught:
        load_adapter(broken({"use_dora": True, "bias": "all", "use_shiny": 3}))
    assert [word in str(caught.value) for word in ("use_dora", "bias", "use_shiny")] == [True] * 3


@pytest.mark.parametrize("config", [AdaLoraConfig, LoHaConfig])
def test_another_peft_method_is_refused(broken, config):
    with pytest.raises(UnsupportedAdapterError, match="only LORA is supported"):
        load_adapter(broken({"peft_type": config(**({"total_step": 9} if config is AdaLoraConfig else {})).peft_type}))


def test_a_configuration_without_a_method_is_refused(broken):
    folder = broken()
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UnsupportedAdapterError, match="peft_type=None"):
        load_adapter(folder)


WRONG_VALUES = {
    "r": [0, -1, 2.5, True, "4", None],
    "lora_alpha": ["8", None, True, 1e999, [8]],
    "use_rslora": [1, "yes"],
    "target_modules": [7, ["q_proj", 3], {"q_proj": 1}, "(q_proj"],
    "exclude_modules": [7, [None], "["],
    "layers_to_transform": ["0", [0.5], [-1], [True]],
    "rank_pattern": [["q_proj"], {"q_proj": 0}, {"q_proj": "2"}, {"(": 2}],
    "alpha_pattern": [7, {"q_proj": None}, {"*": 2}],
    "base_model_name_or_path": [7],
    "task_type": [["CAUSAL_LM"]],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in WRONG_VALUES.items() for v in values])
def test_a_field_of_the_wrong_type_or_value_is_refused_by_name(plain, field, value):
    raw = json.loads((plain / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match=f"x: {field} must be"):
        read_settings({**raw, field: value}, "x")


def test_what_peft_cannot_load_is_refused(plain):
    raw = json.loads((plain / "adapter_config.json").read_text())
    with pytest.raises(ValueError, match="layers_to_transform needs target_modules as a list"):
        read_settings({**raw, "target_modules": ".*q_proj", "layers_to_transform": [0]}, "x")
    with pytest.raises(ValueError, match="layers_pattern is set, layers_to_transform is not"):
        read_settings({**raw, "layers_pattern": ["layers"]}, "x")


def test_absent_fields_have_pefts_defaults():
    settings = read_settings({"peft_type": "LORA", "target_modules": ["q"]}, "x")
    assert isinstance(settings, LoraSettings)
    assert (settings.r, settings.lora_alpha, settings.use_rslora) == (8, 8, False)


QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def without(*parts):
    return lambda tensors: {k: v for k, v in tensors.items() if not any(part in k for part in parts)}


BROKEN_TENSORS = {
    "B without A": (without(f"{QUERY}.lora_A"), ValueError, "'model.layers.0.self_attn.q_proj' has a tensor B"),
    "A without B": (without(f"{QUERY}.lora_B"), ValueError, "'model.layers.0.self_attn.q_proj' has a tensor A"),
    "a target without tensors": (without("q_proj"), LookupError, r"no tensors for target_modules \['q_proj'\]"),
    "no tensors": (lambda t: {}, ValueError, "holds no LoRA tensors"),
    "a stray tensor": (
        lambda t: {**t, "base_model.model.model.layers.9.mlp.what.weight": torch.zeros(2)},
        ValueError,
        "layers.9.mlp.what.weight' belongs to no LoRA factor",
    ),
    "a name without the prefix": (
        lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()},
        ValueError,
        "names begin with 'base_model.model.'",
    ),
    "a module that is no target": (
        lambda t: {
            **t,
            **{k.replace("q_proj", "k_proj"): v.clone() for k, v in t.items() if "0.self_attn.q_proj" in k},
        },
        ValueError,
        "'model.layers.0.self_attn.k_proj' has tensors, but the configuration does not target it",
    ),
    "another rank": (
        lambda t: {k: v[:2] if k.startswith(QUERY) and "lora_A" in k else v for k, v in t.items()},
        ValueError,
        r"q_proj' has A \(2, 32\) and B \(32, 4\), expected A \(4, d_in\)",
    ),
    "both kinds": (
        lambda t: {**t, f"{QUERY}.lora_embedding_A": torch.zeros(4, 32)},
        ValueError,
        "of a linear and of an embedding",
    ),
    "a convolution": (
        lambda t: {k: v[..., None, None].contiguous() if k.startswith(QUERY) else v for k, v in t.items()},
        UnsupportedAdapterError,
        "no convolutions",
    ),
    "DoRA's magnitudes": (
        lambda t: {**t, f"{QUERY}.lora_magnitude_vector": torch.zeros(32)},
        UnsupportedAdapterError,
        "DoRA's magnitudes",
    ),
    "a bias of B": (lambda t: {**t, f"{QUERY}.lora_B.bias": torch.zeros(32)}, UnsupportedAdapterError, "trained bias"),
    "a resized embedding": (
        lambda t: {**t, "base_model.model.model.embed_tokens.weight": torch.zeros(9, 32)},
        UnsupportedAdapterError,
        "a whole embedding.*save_embedding_layers=False",
    ),
    "a base weight": (
        lambda t: {**t, "base_model.model.lm_head.base_layer.weight": torch.zeros(9, 32)},
        UnsupportedAdapterError,
        "replaces a weight of the base",
    ),
    "a copy of another shape": (
        lambda t: {**t, f"{QUERY}.base_layer.weight": torch.zeros(9, 32)},
        ValueError,
        r"has shape \(9, 32\), its module's factors say \(32, 32\)",
    ),
    "an integer tensor": (
        lambda t: {**t, f"{QUERY}.lora_A.weight": torch.zeros(4, 32, dtype=torch.int32)},
        ValueError,
        "dtype 'I32'",
    ),
}


@pytest.mark.parametrize("case", BROKEN_TENSORS)
def test_tensors_that_do_not_make_the_adapter_are_refused(broken, case):
    change, error, message = BROKEN_TENSORS[case]
    with pytest.raises(error, match=message):
        load_adapter(broken(tensors=change))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("side", ["lora_A", "lora_B"])
def test_values_that_are_not_finite_are_refused_with_their_tensor(broken, side, value):
    def poison(tensors):
        tensors[f"{QUERY}.{side}.weight"][1, 1] = value
        return tensors

    with pytest.raises(ValueError, match=rf"{QUERY}.{side}.weight has 1 values that are not finite"):
        load_adapter(broken(tensors=poison))


def test_a_scaling_that_overflows_is_refused(broken):
    with pytest.raises(ValueError, match=r"times scaling 2.5e\+29 has .* not finite"):
        load_adapter(broken({"lora_alpha": 1e30}, lambda t: {k: v + 1e10 for k, v in t.items()}))


def test_a_rounding_that_overflows_is_refused(broken):
    folder = broken({"lora_alpha": 1e6}, lambda t: {k: v + 1 for k, v in t.items()})
    load_adapter(folder)
    with pytest.raises(ValueError, match=r"not finite in torch\.float16"):
        load_adapter(folder, dtype=torch.float16)


def test_a_layer_listed_without_tensors_is_refused(plain, tmp_path):
    folder, _ = peft_adapter(tmp_path, layers_to_transform=[0, 1])
    with pytest.raises(LookupError, match="lists layer 1, which has no tensors"):
        load_adapter(edited(folder, tmp_path / "short", tensors=without("layers.1.")))


def test_files_that_are_missing_are_named_beside_those_that_are_there(broken, tmp_path):
    folder = broken()
    (folder / "adapter_model.safetensors").rename(folder / "weights.safetensors")
    with pytest.raises(LookupError, match=r"no adapter_model.safetensors .*'weights.safetensors'"):
        load_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(LookupError, match=r"no adapter_config\.json"):
        load_adapter(folder)
    with pytest.raises(FileNotFoundError, match="no adapter folder"):
        load_adapter(tmp_path / "nowhere")


def test_pickled_weights_are_refused_unread(broken):
    folder = broken()
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    load_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UnsupportedAdapterError, match=r"adapter_model.bin is a pickle.*safe_serialization=True"):
        load_adapter(folder)
