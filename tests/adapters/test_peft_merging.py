"""Why compositions are not made with PEFT's own merging: it is not exact for adapters it loads itself."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from loracompose import load_adapter, save_adapter
from tests.tiny import base_model, logits, peft_adapter, peft_load, relative_error


def merged_by_peft(model):
    """One adapter, weight 1: its concatenation should be the adapter itself."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_weighted_adapter(["default"], [1.0], "merged", combination_type="cat")
    model.set_adapter("merged")
    return model


@pytest.mark.parametrize(("flavour", "holds"), [({}, True), ({"use_rslora": True}, False)])
def test_pefts_merge_of_one_adapter_is_not_that_adapter_with_rslora(tmp_path, flavour, holds):
    folder, peft = peft_adapter(tmp_path, r=8, scale=0.1, **flavour)
    want = logits(peft)
    ours = logits(peft_load(save_adapter(load_adapter(folder), tmp_path / "ours")))
    assert relative_error(ours, want) < 1e-5
    error = relative_error(logits(merged_by_peft(peft)), want)
    assert error < 1e-5 if holds else error > 1e-2


@pytest.mark.parametrize("flavour", [{"use_dora": True}, {"lora_bias": True}])
def test_pefts_merge_of_one_adapter_is_not_that_adapter_with_dora_or_a_bias(flavour):
    """These are refused by `load_adapter`; PEFT merges them without a word into something else."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        peft = get_peft_model(base_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **flavour)).eval()
        for key, parameter in peft.named_parameters():
            if "lora_" in key:
                parameter.data = parameter.data + 0.3 * torch.randn(parameter.shape)
    want = logits(peft)
    assert relative_error(logits(merged_by_peft(peft)), want) > 1e-3
