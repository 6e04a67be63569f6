"""The pass of the bare base before every pass, for gates that ask for its states."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext
from loracompose.runtime.attach import attach
from tests import laws
from tests.runtime.toy import random_delta

PATHS = {
    "llama": ("model.embed_tokens", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.wte", "transformer.h.1.mlp.c_proj"),
    "t5": (
        "encoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.1.layer.1.EncDecAttention.v",
    ),
}


@dataclass(eq=False)
class Asking:
    """Passes everything and remembers the states of the base."""

    asks: bool = True
    seen: list[Tensor | None] = field(default_factory=list)

    needs_layer_input: ClassVar[bool] = False

    @property
    def needs_base_states(self) -> bool:
        return self.asks

    def to(self, device: torch.device, dtype: torch.dtype) -> Asking:
        return self

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        self.seen.append(context.base_states)
        return w[:, None, :]


def asking(on: str, asks: bool = True) -> tuple[dict[str, LowRankDelta], dict[str, Asking]]:
    deltas, gates = {}, {path: Asking(asks) for path in PATHS[on]}
    for seed, (path, gate) in enumerate(gates.items()):
        kind, d_in, d_out = laws.shapes(on)[path]
        plain = random_delta(d_in, d_out, weights=torch.ones(2, 5).double(), seed=seed)
        deltas[path] = LowRankDelta(plain.A, plain.B, plain.weights, gate, kind)  # type: ignore[arg-type]
    return deltas, gates


INPUTS = {
    "input_ids": torch.tensor([[5, 6, 7, 8], [0, 9, 3, 4]]),
    "attention_mask": torch.tensor([[1] * 4, [0, 1, 1, 1]]),
}


@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_a_gate_that_asks_sees_the_last_hidden_states_of_the_bare_base(on: str):
    model, (deltas, gates) = laws.base(on), asking(on)
    with torch.no_grad():
        want = model.base_model(**INPUTS).last_hidden_state
        with attach(model, deltas):
            adapted = model(**INPUTS).logits
    assert laws.distance(adapted, model.lm_head(want)) > 1e-3
    for gate in gates.values():
        (states,) = gate.seen
        assert torch.equal(states, want)


def test_a_gate_that_does_not_ask_costs_no_first_pass():
    deltas, gates = asking("llama", asks=False)
    calls: list[int] = []
    model = laws.base("llama")
    hook = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad(), attach(model, deltas):
        model(**INPUTS)
    hook.remove()
    assert len(calls) == 1
    assert all(gate.seen == [None] for gate in gates.values())


def test_each_module_of_an_encoder_decoder_is_told_of_the_tokens_that_it_reads():
    model, (deltas, gates), decoder = laws.base("t5"), asking("t5"), torch.tensor([[0, 7, 8], [0, 9, 2]])
    with torch.no_grad():
        encoder = model.get_encoder()(**INPUTS).last_hidden_state
        mask = {"encoder_attention_mask": INPUTS["attention_mask"]}
        own = model.get_decoder()(input_ids=decoder, encoder_hidden_states=encoder, **mask).last_hidden_state
        with attach(model, deltas):
            model(**INPUTS, decoder_input_ids=decoder)
    for path, want in zip(PATHS["t5"], (encoder, own, encoder), strict=True):
        (states,) = gates[path].seen
        assert torch.equal(states, want)


def test_a_decoder_that_is_given_another_text_than_the_encoder_read_last_is_refused():
    model, (deltas, _), decoder = laws.base("t5"), asking("t5"), torch.tensor([[0, 7, 8], [0, 9, 2]])
    other = {**INPUTS, "input_ids": INPUTS["input_ids"].flip(1)}
    with torch.no_grad():
        before = model.get_encoder()(**INPUTS)
        with attach(model, deltas):
            with pytest.raises(ValueError, match="other encoder states"):
                model(encoder_outputs=before, decoder_input_ids=decoder)
            first = model.get_encoder()(**INPUTS)
            mask = INPUTS["attention_mask"]
            want = model(encoder_outputs=first, attention_mask=mask, decoder_input_ids=decoder).logits
            model.get_encoder()(**other)
            with pytest.raises(ValueError, match="other encoder states"):
                model(encoder_outputs=first, decoder_input_ids=decoder)
            again = model(**INPUTS, decoder_input_ids=decoder).logits
    assert torch.equal(again, want)


@pytest.mark.parametrize("first", [0, 1])
def test_a_gate_that_asks_shares_its_model_with_no_other_block(first: int):
    model = laws.base("llama")
    blocks = [asking("llama")[0], asking("llama", asks=False)[0]]
    blocks = [blocks[first], blocks[1 - first]]
    with attach(model, blocks[0]), pytest.raises(ValueError, match="another attach"), attach(model, blocks[1]):
        pass
    assert not model._forward_hooks


@pytest.mark.parametrize("on", laws.BASES)
def test_caches_are_left_as_the_model_alone_would_leave_them_and_serve_within_the_block(on: str):
    model, (deltas, _), T = laws.base(on), asking(on), {"t5": "decoder_input_ids"}.get(on, "input_ids")
    start = {"input_ids": INPUTS["input_ids"]} if on == "t5" else {}
    with torch.no_grad():
        alone = model(**start, **{T: INPUTS["input_ids"]}, use_cache=True).past_key_values
        with attach(model, deltas):
            past = model(**start, **{T: INPUTS["input_ids"]}, use_cache=True).past_key_values
            model(**start, **{T: INPUTS["input_ids"][:, :1]}, past_key_values=past, use_cache=True)
            parts = [past.self_attention_cache, past.cross_attention_cache] if on == "t5" else [past]
            assert [len(part.layers) for part in parts] == [4] * len(parts)
    assert [len(part.layers) for part in parts] == [2] * len(parts)
    assert len(alone) == len(past)
    assert past.get_seq_length() == alone.get_seq_length() + 1


def test_a_cache_that_was_filled_elsewhere_is_refused():
    model, (deltas, _) = laws.base("llama"), asking("llama")
    with torch.no_grad():
        past = model(**INPUTS, use_cache=True).past_key_values
        with attach(model, deltas), pytest.raises(ValueError, match="4 tokens that were read without this composition"):
            model(input_ids=INPUTS["input_ids"][:, :1], past_key_values=past)
        assert len(past.layers) == 2


@pytest.mark.parametrize("make", [lambda config: DynamicCache(), lambda config: StaticCache(config, max_cache_len=16)])
def test_any_kind_of_cache_that_is_given_empty_serves(make):
    composer, model = laws.ROWS["xlora"].settings[0], laws.base("llama")
    deltas = laws.compose_rows(composer, laws.hostile_adapters(), laws.BATCH[:2])
    told = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with attach(model, deltas):
        want = model.generate(**INPUTS, **told, use_cache=False)
        got = model.generate(**INPUTS, **told, past_key_values=make(model.config))
    assert torch.equal(got, want)


def test_asked_for_its_hidden_states_the_model_gives_those_of_the_second_pass_alone():
    composer, model = laws.ROWS["xlora"].settings[0], copy.deepcopy(laws.base("llama"))  # transformers leaves hooks
    deltas = laws.compose_rows(composer, laws.hostile_adapters(), laws.BATCH[:2])
    with torch.no_grad(), attach(model, deltas):
        hidden = model(**INPUTS, output_hidden_states=True).hidden_states
        plain = model.model(**INPUTS).last_hidden_state
    assert len(hidden) == 3
    assert torch.equal(hidden[-1], plain)


def test_the_second_pass_is_composed_again_after_a_first_pass_that_failed():
    model, (deltas, _) = laws.base("llama"), asking("llama")
    with torch.no_grad():
        bare = model(**INPUTS).logits

    def fail(*_: object) -> None:
        raise RuntimeError("inside")

    with torch.no_grad(), attach(model, deltas):
        before = model(**INPUTS).logits
        assert laws.distance(before, bare) > 1e-3
        hook = model.model.norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="inside"):
            model(**INPUTS)
        hook.remove()
        assert torch.equal(model(**INPUTS).logits, before)


def test_a_model_that_is_not_of_transformers_and_weights_that_would_be_folded_are_refused():
    deltas, _ = asking("llama")
    inner = nn.ModuleDict({"model": laws.base("llama").model})
    with pytest.raises(ValueError, match="runs on a transformers model"), attach(inner, deltas):
        pass
    path = "model.layers.0.self_attn.q_proj"
    static = LowRankDelta(deltas[path].A, deltas[path].B, deltas[path].weights[:1])
    embedding = deltas["model.embed_tokens"]
    words = LowRankDelta(embedding.A, embedding.B, embedding.weights[:1], embedding.gate, embedding.kind)
    mixed = {path: static, "model.embed_tokens": words}
    with pytest.raises(ValueError, match="beside a gate that asks"), attach(laws.base("llama"), mixed, form="folded"):
        pass
