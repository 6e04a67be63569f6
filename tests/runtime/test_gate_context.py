from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import Gate, GateContext
from loracompose.runtime.attach import attach
from loracompose.runtime.machine import Machine
from tests import laws, tiny
from tests.runtime.toy import DecidedAtPrefill, Recorder, random_delta

PATHS = {
    "llama": ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
    "t5": ("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.1.layer.1.EncDecAttention.v"),
}


def test_a_mask_given_by_its_place_is_seen_as_one_given_by_name():
    gate = Recorder()
    model = laws.base("llama")
    ids, mask = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    with torch.no_grad(), attach(model, gated("llama", [gate])):
        model(input_ids=ids, attention_mask=mask)
        model(ids, mask)
    by_name, by_place = (context.valid(4) for context in gate.seen)
    assert by_name.tolist() == by_place.tolist() == [[False, False, True, True]]


def gated(on: str, gates: Sequence[Gate], rows: int = 1) -> dict[str, LowRankDelta]:
    deltas = {}
    for seed, (path, gate) in enumerate(zip(PATHS[on], gates, strict=False)):
        kind, d_in, d_out = laws.shapes(on)[path]
        plain = random_delta(d_in, d_out, weights=torch.linspace(0.1, 1, 5 * rows).reshape(rows, 5).double(), seed=seed)
        deltas[path] = LowRankDelta(plain.A, plain.B, plain.weights, gate, kind)
    return deltas


def run(on: str, inputs: dict[str, Tensor], *, model: nn.Module | None = None, **more: Any) -> Any:
    if on == "t5":
        more.setdefault("decoder_input_ids", inputs["input_ids"])
    with torch.no_grad():
        return (laws.base(on) if model is None else model)(**inputs, **more)


@pytest.mark.parametrize("on", laws.BASES)
def test_a_gate_is_told_its_module_and_the_mask_given_to_the_model(on: str):
    gates, inputs = (Recorder(), Recorder()), laws.padded(laws.prompts((5, 2)))
    with attach(laws.base(on), gated(on, gates)):
        run(on, inputs)
    for gate, path in zip(gates, PATHS[on], strict=True):
        assert [context.module for context in gate.seen] == [path]
        assert torch.equal(gate.seen[0].attention_mask, inputs["attention_mask"])
        assert gate.moved_to == [torch.float64]


def sides(*modules: str) -> tuple[dict[str, LowRankDelta], dict[str, Recorder]]:
    """A recording gate on modules of T5."""
    gates = {module: Recorder(needs_layer_input=True) for module in modules}
    deltas = {}
    for module, gate in gates.items():
        kind, d_in, d_out = laws.shapes("t5")[module]
        plain = random_delta(d_in, d_out, weights=torch.ones(2, 5).double())
        deltas[module] = LowRankDelta(plain.A, plain.B, plain.weights, gate, kind)
    return deltas, gates


ENCODER, OWN, CROSS, QUERY = (
    "encoder.block.1.layer.0.SelfAttention.k",
    "decoder.block.0.layer.0.SelfAttention.k",
    "decoder.block.0.layer.1.EncDecAttention.k",
    "decoder.block.0.layer.1.EncDecAttention.q",
)


def test_in_generate_the_gates_of_an_encoder_see_its_mask_and_a_clean_scratch():
    deltas, gates = sides(ENCODER, OWN, CROSS)
    inputs = laws.padded(laws.prompts((5, 2)))
    notes: list[int] = []

    class Noting(Recorder):
        def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: Any) -> Tensor:
            notes.append(len(context.scratch))
            context.scratch[context.module] = x
            return super().__call__(x, h, w, context)

    deltas[ENCODER] = LowRankDelta(*(getattr(deltas[ENCODER], n) for n in ("A", "B", "weights")), Noting())
    with attach(laws.base("t5"), deltas) as attached:
        for _ in range(2):
            laws.base("t5").generate(**inputs, max_new_tokens=3, min_new_tokens=3)
        assert ENCODER not in attached.scratch
    assert notes == [0, 0]
    noted = deltas[ENCODER].gate
    assert isinstance(noted, Noting)
    assert all(torch.equal(context.attention_mask, inputs["attention_mask"]) for context in noted.seen)
    assert all(torch.equal(context.attention_mask, inputs["attention_mask"]) for context in gates[CROSS].seen)


def test_each_module_of_an_encoder_decoder_sees_the_tokens_that_it_reads():
    deltas, gates = sides(ENCODER, OWN, CROSS, QUERY)
    inputs, decoder = laws.padded(laws.prompts((5, 2))), torch.tensor([[0, 7, 8], [0, 9, 2]])
    prompt = inputs["attention_mask"] != 0
    own_mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    with attach(laws.base("t5"), deltas, prompt):
        run("t5", inputs, decoder_input_ids=decoder, decoder_attention_mask=own_mask)
    for module in (ENCODER, CROSS):
        (context,) = gates[module].seen
        assert context.prompt_mask is prompt
        assert torch.equal(context.valid(5), prompt)
        assert context.layer_input.shape == (2, 5, 32)
    for module in (OWN, QUERY):
        (context,) = gates[module].seen
        assert context.prompt(3).tolist() == [[True, False, False]] * 2
        assert torch.equal(context.valid(3), own_mask != 0)
        assert context.layer_input.shape == (2, 3, 32)
    assert torch.equal(gates[OWN].seen[0].layer_input, gates[QUERY].seen[0].layer_input)


def test_an_encoder_read_by_a_decoder_of_as_many_tokens_is_not_taken_for_it():
    deltas, gates = sides(CROSS, QUERY)
    inputs = laws.padded(laws.prompts((4, 2)))
    with attach(laws.base("t5"), deltas):
        run("t5", inputs, decoder_input_ids=torch.tensor([[0, 7, 8, 9]] * 2))
    (cross,), (query,) = gates[CROSS].seen, gates[QUERY].seen
    assert query.attention_mask is None
    assert torch.equal(cross.attention_mask, inputs["attention_mask"])
    assert not torch.equal(cross.layer_input, query.layer_input)


def test_without_a_mask_there_is_none():
    gate = Recorder()
    with attach(laws.base("llama"), gated("llama", [gate])):
        run("llama", {"input_ids": torch.ones(1, 3, dtype=torch.int64)})
    assert gate.seen[0].attention_mask is None


@pytest.mark.parametrize("on", laws.BASES)
def test_a_gate_that_asks_sees_the_hidden_states_entering_its_layer(on: str):
    asks, does_not = Recorder(needs_layer_input=True), Recorder()
    inputs = laws.padded(laws.prompts((4, 4)))
    model = copy.deepcopy(laws.base(on))  # transformers puts hooks of its own on a model asked for its hidden states
    with attach(model, gated(on, (asks, does_not))):
        out = run(on, inputs, model=model, output_hidden_states=True)
    hidden = out.encoder_hidden_states if on == "t5" else out.hidden_states
    assert torch.equal(asks.seen[0].layer_input, hidden[0])
    assert does_not.seen[0].layer_input is None  # of another layer, where nobody asks


def test_a_gate_of_a_wide_delta_sees_the_states_that_enter_its_layer_in_float32():
    gate, model = Recorder(needs_layer_input=True), tiny.base_model("llama", dtype=torch.bfloat16)
    with attach(model, gated("llama", [gate]), machine=Machine(wide=True)):
        out = run("llama", laws.padded(laws.prompts((4, 4))), model=model, output_hidden_states=True)
    seen = gate.seen[0].layer_input
    assert seen.dtype == torch.float32
    assert torch.equal(seen, out.hidden_states[0].float())


def test_a_gate_of_a_wide_delta_still_knows_the_encoders_tokens_by_the_very_tensor():
    @dataclass(frozen=True, eq=False)
    class Compares(Recorder):
        same: list[bool] = field(default_factory=list)

        def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
            self.same.append(context.layer_input is x)
            return super().__call__(x, h, w, context)

    gates = {path: Compares(needs_layer_input=True) for path in (CROSS, QUERY)}
    model, shapes = tiny.base_model("t5", dtype=torch.bfloat16), laws.shapes("t5")
    deltas = {}
    for path, gate in gates.items():
        kind, d_in, d_out = shapes[path]
        plain = random_delta(d_in, d_out, weights=torch.ones(2, 5).double(), kind=kind)
        deltas[path] = LowRankDelta(plain.A, plain.B, plain.weights, gate, kind)
    with attach(model, deltas, machine=Machine(wide=True)):
        run("t5", laws.padded(laws.prompts((4, 2))), model=model, decoder_input_ids=torch.tensor([[0, 7, 8, 9]] * 2))
    assert (gates[CROSS].same, gates[QUERY].same) == ([True], [False])


@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_what_a_gate_decides_at_prefill_holds_at_every_decoding_step_and_for_the_padded_prompt_alone(on: str):
    deltas, prompts = gated(on, (DecidedAtPrefill(), DecidedAtPrefill()), rows=3), laws.prompts((6, 2, 4))
    batch = laws.generate(on, laws.padded(prompts), deltas)
    for i, prompt in enumerate(prompts):
        own = {p: LowRankDelta(d.A, d.B, d.weights[i : i + 1], d.gate, d.kind) for p, d in deltas.items()}
        one = laws.generate(on, laws.padded([prompt]), own)
        assert laws.distance(torch.stack(batch.logits)[:, i], torch.stack(one.logits)[:, 0]) < laws.GENERATED


def test_memory_is_kept_inside_one_block_and_not_carried_to_the_next():
    gate = Recorder()
    deltas, inputs = gated("llama", [gate]), laws.padded(laws.prompts((3,)))
    with attach(laws.base("llama"), deltas):
        run("llama", inputs)
        gate.seen[0].memory["decided"] = torch.ones(1)
        run("llama", inputs)
    with attach(laws.base("llama"), deltas):
        run("llama", inputs)
    first, second, other_block = (context.memory for context in gate.seen)
    assert first is second
    assert not other_block


def test_no_hook_watches_the_model_or_its_layers_unless_a_gate_asks():
    model = laws.base("llama")
    static = {p: LowRankDelta(d.A, d.B, d.weights, None, d.kind) for p, d in gated("llama", [Recorder()]).items()}
    with attach(model, static):
        assert not model._forward_pre_hooks
    with attach(model, gated("llama", [Recorder()])):
        assert len(model._forward_pre_hooks) == 1
        assert not model.model.layers[0]._forward_pre_hooks
    with attach(model, gated("llama", [Recorder(needs_layer_input=True)])):
        assert len(model.model.layers[0]._forward_pre_hooks) == 1
        assert not model.model.layers[1]._forward_pre_hooks
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_gated_delta_with_ranks_of_each_row_is_refused():
    plain = random_delta(weights=torch.ones(2, 5).double())
    with pytest.raises(ValueError, match="shares its ranks"):
        LowRankDelta(plain.A.expand(2, 5, 12), plain.B.expand(2, 9, 5), plain.weights, Recorder())


def test_padding_is_told_from_prompts_with_a_static_cache_too():
    gate, inputs = Recorder(), laws.padded(laws.prompts((5, 2)))
    with attach(laws.base("llama"), gated("llama", (gate,), rows=2)), torch.no_grad():
        laws.base("llama").generate(**inputs, max_new_tokens=2, do_sample=False, cache_implementation="static")
    prefill, step = gate.seen
    assert prefill.attention_mask.ndim == 4
    assert torch.equal(prefill.valid(5), inputs["attention_mask"] != 0)
    assert step.valid(1).all()


@pytest.mark.parametrize("layers", [("full_attention", "sliding_attention"), ("sliding_attention",) * 2])
def test_padding_is_told_from_prompts_where_a_static_cache_has_a_mask_for_each_kind_of_layer(layers: tuple[str, ...]):
    config = Qwen2Config(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=16,
        layer_types=list(layers),
        pad_token_id=0,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(config).double().eval()
    gate, inputs = Recorder(), laws.padded(laws.prompts((5, 2)))
    with attach(model, gated("llama", (gate,), rows=2)), torch.no_grad():
        model.generate(**inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False, cache_implementation="static")
    prefill, step = gate.seen
    assert torch.equal(prefill.valid(5), inputs["attention_mask"] != 0)
    assert step.valid(1).all()
