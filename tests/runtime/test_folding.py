from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from loracompose.composers.mixture import Mixture
from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.attach import attach
from loracompose.runtime.machine import Machine
from tests import laws, tiny
from tests.laws import BASES, BATCH
from tests.runtime.toy import Recorder, random_delta

FREE = Machine(*[1e30] * 5, 1.0)  # products cost nothing and calls much: folding always pays


def same(on: str, rows: int = 2) -> Any:
    return laws.compose_rows(Mixture(), laws.hostile_adapters(on), [BATCH[3]] * rows)


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


@pytest.mark.parametrize("on", BASES)
def test_the_weights_come_back_bit_by_bit_after_success_and_after_an_exception(on: str):
    model, deltas = laws.base(on), same(on)
    own, before = weights_of(model), {k: v.clone() for k, v in model.state_dict().items()}
    plain = tiny.logits(model, on, batch=2, seq=6)
    with attach(model, deltas, form="folded"):
        assert any(weights_of(model)[name] is not weight for name, weight in own.items())
        assert laws.distance(tiny.logits(model, on, batch=2, seq=6), plain) > 1e-3
    with pytest.raises(RuntimeError, match="inside"), attach(model, deltas, form="folded"):
        raise RuntimeError("inside")
    assert all(weights_of(model)[name] is weight for name, weight in own.items())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(tiny.logits(model, on, batch=2, seq=6), plain)


def test_a_failure_in_the_middle_of_folding_gives_every_weight_back(monkeypatch: pytest.MonkeyPatch):
    from loracompose.runtime import folding

    model, own, folded = laws.base("llama"), weights_of(laws.base("llama")), []

    def failing(module: nn.Module, delta: LowRankDelta) -> nn.Parameter:
        if len(folded) == 3:
            raise MemoryError
        folded.append(true(module, delta))
        return folded[-1]

    true = folding.folded_weight
    monkeypatch.setattr(folding, "folded_weight", failing)
    with pytest.raises(MemoryError), attach(model, same("llama"), form="folded"):
        pass
    assert len(folded) == 3
    assert all(weights_of(model)[name] is weight for name, weight in own.items())
    assert not any(m._forward_hooks for m in model.modules())


def test_rows_of_unequal_compositions_are_refused_by_name():
    deltas = laws.compose_rows(Mixture(), laws.hostile_adapters(), BATCH[:2])
    with pytest.raises(ValueError, match=r"layers.*the rows of the batch have different compositions"):
        attach(laws.base("llama"), deltas, form="folded").__enter__()


def test_a_gated_delta_is_refused():
    plain = random_delta(32, 32, weights=torch.ones(1, 5, dtype=torch.float64))
    delta = LowRankDelta(plain.A, plain.B, plain.weights, Recorder())
    with pytest.raises(ValueError, match="its gate decides token by token"):
        attach(laws.base("llama"), {"model.layers.0.self_attn.q_proj": delta}, form="folded").__enter__()


class Own(nn.Linear):
    """A linear module of another library, which might keep its weight in a format of its own."""


def changed(how: str) -> nn.Module:
    model = nn.Sequential(nn.Linear(12, 9, bias=False))
    if how == "quantised":
        model[0].weight = nn.Parameter(torch.ones(9, 12, dtype=torch.int8), requires_grad=False)
    elif how == "float8":
        model[0].weight = nn.Parameter(model[0].weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    elif how == "computed":
        nn.utils.parametrizations.weight_norm(model[0])
    else:
        model[0] = Own(12, 9)
    return model


@pytest.mark.parametrize("how", ["quantised", "float8", "computed", "foreign"])
def test_weights_that_are_no_plain_floating_numbers_are_refused(how: str):
    delta = random_delta(weights=torch.ones(1, 5))
    with pytest.raises(ValueError, match="cannot run folded"):
        attach(changed(how), {"0": delta}, form="folded").__enter__()


def test_the_output_head_of_a_tied_embedding_is_folded_alone():
    model = copy.deepcopy(laws.base("llama"))
    model.lm_head.weight = model.model.embed_tokens.weight
    head = random_delta(32, tiny.VOCABULARY, weights=torch.ones(2, 5, dtype=torch.float64))
    with attach(model, {"lm_head": head}):
        want = tiny.logits(model, "llama", batch=2, seq=6)
    words = model.model.embed_tokens.weight.clone()
    with attach(model, {"lm_head": head}, form="folded"):
        assert torch.equal(model.model.embed_tokens.weight, words)
        assert laws.distance(tiny.logits(model, "llama", batch=2, seq=6), want) < laws.ROUNDING["llama"]
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_folded_modules_are_known_to_have_run():
    with attach(laws.base("llama"), same("llama"), form="folded") as attached:
        assert attached.never_ran
        tiny.logits(laws.base("llama"), "llama", batch=2, seq=6)
        assert attached.never_ran == ()


def test_the_plan_folds_only_what_all_rows_share_and_only_when_told_how_long_answers_are():
    model, own = laws.base("llama"), weights_of(laws.base("llama"))

    def folds(deltas: Any, tokens: int | None) -> bool:
        with attach(model, deltas, tokens=tokens, machine=FREE):
            return any(weights_of(model)[name] is not weight for name, weight in own.items())

    assert folds(same("llama"), 64)
    assert not folds(same("llama"), None)
    unequal = laws.compose_rows(Mixture(), laws.hostile_adapters(), [BATCH[3], BATCH[0]])
    assert not folds(unequal, 64)
    nothing = laws.compose_rows(Mixture(), laws.hostile_adapters(), [BATCH[2]] * 2)
    assert not folds(nothing, 64)


@pytest.mark.parametrize("machine", [FREE, replace(FREE, wide=True)])
def test_the_plan_does_not_round_a_delta_off_in_weights_of_16_bits(machine: Machine):
    model = tiny.base_model("llama", dtype=torch.bfloat16)
    own = weights_of(model)
    with attach(model, same("llama"), tokens=64, machine=machine):
        assert all(weights_of(model)[name] is weight for name, weight in own.items())
    with attach(model, same("llama"), form="folded"):
        assert tiny.logits(model, "llama", batch=2, seq=6).dtype == torch.bfloat16


def test_a_folded_block_inside_a_folded_block_adds_up_and_gives_back_what_it_found():
    model, deltas = laws.base("llama"), same("llama")
    plain = tiny.logits(model, "llama", batch=2, seq=6)
    with attach(model, deltas, form="folded"):
        once = tiny.logits(model, "llama", batch=2, seq=6)
        with attach(model, deltas, form="folded"):
            twice = tiny.logits(model, "llama", batch=2, seq=6)
        assert torch.equal(tiny.logits(model, "llama", batch=2, seq=6), once)
    with attach(model, deltas), attach(model, deltas):
        assert laws.distance(tiny.logits(model, "llama", batch=2, seq=6), twice) < laws.ROUNDING["llama"]
    assert torch.equal(tiny.logits(model, "llama", batch=2, seq=6), plain)


def test_a_model_folded_in_inference_mode_can_be_trained_around_it():
    model = copy.deepcopy(laws.base("llama"))
    with torch.inference_mode(), attach(model, same("llama"), form="folded"):
        tiny.logits(model, "llama", batch=2, seq=6)
    model(torch.ones(1, 3, dtype=torch.int64)).logits.sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad is not None


def test_one_module_under_two_paths_gets_its_own_weight_back():
    model = nn.ModuleDict({"one": nn.Linear(12, 9).double()})
    model["two"] = model["one"]
    own = model["one"].weight
    deltas = {path: random_delta(weights=torch.ones(2, 5).double(), seed=i) for i, path in enumerate(("one", "two"))}
    with attach(model, deltas, form="folded"):
        assert model["one"].weight is not own
    assert model["one"].weight is own
