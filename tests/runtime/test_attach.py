from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from loracompose import Adapter, LoraFactors, load_adapter
from loracompose.composers.mixture import Mixture
from loracompose.composition.bank import gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.layers import layer_of
from loracompose.runtime import assembly
from loracompose.runtime.attach import attach
from loracompose.runtime.fitting import widened
from loracompose.runtime.forms import SharedForm
from loracompose.runtime.machine import Machine, save_machine
from tests import laws, tiny
from tests.runtime.toy import Recorder, random_delta

Q = "model.layers.0.self_attn.q_proj"
V = "model.layers.1.self_attn.v_proj"


def delta_for(on: str, path: str, rows: int = 1, seed: int = 0) -> LowRankDelta:
    kind, d_in, d_out = laws.shapes(on)[path]
    return random_delta(d_in, d_out, weights=torch.full((rows, 5), 0.2).double(), seed=seed, kind=kind)


def hooks(model: nn.Module) -> list[int]:
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_nested_blocks_add_up_and_each_removes_only_its_own_hooks():
    model = laws.base("llama")
    outer, inner = delta_for("llama", Q), delta_for("llama", Q, seed=1)
    alone = laws.logits(model, {Q: outer}, "llama")
    with attach(model, {Q: outer}):
        with attach(model, {Q: inner, V: delta_for("llama", V)}):
            assert len(model.get_submodule(Q)._forward_hooks) == 2
        assert len(model.get_submodule(Q)._forward_hooks) == 1
        assert not model.get_submodule(V)._forward_hooks
        assert torch.equal(tiny.logits(model, "llama", batch=2, seq=6), alone)
        with pytest.raises(RuntimeError), attach(model, {Q: inner}):
            raise RuntimeError
        assert torch.equal(tiny.logits(model, "llama", batch=2, seq=6), alone)
    both = laws.logits(model, {Q: LowRankDelta(*stacked(outer, inner))}, "llama")
    with attach(model, {Q: outer}), attach(model, {Q: inner}):
        assert laws.distance(tiny.logits(model, "llama", batch=2, seq=6), both) < laws.ROUNDING["llama"]
    assert not any(hooks(model))


def stacked(*deltas: LowRankDelta) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.cat([d.A for d in deltas]),
        torch.cat([d.B for d in deltas], dim=1),
        torch.cat([d.weights for d in deltas], dim=1),
    )


def test_hooks_of_others_survive():
    model = copy.deepcopy(laws.base("llama"))
    handle = model.get_submodule(Q).register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError), attach(model, {Q: delta_for("llama", Q)}):
        raise RuntimeError
    assert list(model.get_submodule(Q)._forward_hooks) == [handle.id]


@pytest.mark.parametrize("form", ["auto", "shared", "gathered"])
@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_and_autocast_give_what_float32_gives_up_to_rounding(form: Any, seq: int, autocast: bool):
    module, x = nn.Linear(12, 9), torch.randn(3, seq, 12, generator=torch.Generator().manual_seed(2))
    deltas = {"0": random_delta(weights=torch.eye(5)[:3]).to(torch.device("cpu"), torch.float32)}
    with torch.no_grad():
        with attach(nn.Sequential(module), deltas, form=form):
            want = module(x)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                got = module(x)
        if not autocast:
            low = copy.deepcopy(module).bfloat16()
            with attach(nn.Sequential(low), deltas, form=form):
                got = low(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert laws.distance(got.double(), want.double()) < 0.05


WIDE = Machine(wide=True)


@pytest.mark.parametrize("form", ["auto", "shared", "gathered"])
@pytest.mark.parametrize("seq", [1, 4])
@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("kind", ["static", "gated", "embedding"])
def test_a_wide_delta_of_a_16_bit_module_is_computed_in_float32_and_the_sum_rounded_once(
    form: Any, seq: int, gradients: bool, kind: str
):
    generator = torch.Generator().manual_seed(2)
    embeds = kind == "embedding"
    module = (nn.Embedding(12, 9) if embeds else nn.Linear(12, 9)).bfloat16()
    ids = torch.randint(0, 12, (3, seq), generator=generator)
    x = ids if embeds else torch.randn(3, seq, 12, generator=generator).bfloat16()
    delta = random_delta(weights=torch.eye(5)[:3].double(), kind="embedding" if embeds else "linear")
    precise = delta.to(torch.device("cpu"), torch.float32)
    gate = Recorder() if kind == "gated" else None
    with torch.set_grad_enabled(gradients):
        want = (module(x).float() + precise(x if embeds else x.float())).bfloat16()
        with attach(nn.Sequential(module), {"0": replace(delta, gate=gate)}, form=form, machine=WIDE):
            got = module(x)
    assert got.dtype == torch.bfloat16
    # products of another order may round to the neighbour, one in a thousand or so
    assert (got != want).sum() <= 1
    assert laws.distance(got.double(), want.double()) < 0.01
    assert gate is None or gate.moved_to == [torch.float32]


def test_the_plan_of_a_wide_delta_counts_with_what_was_measured_for_the_models_dtype(tmp_path, monkeypatch):
    monkeypatch.setenv("LORACOMPOSE_CACHE", str(tmp_path))
    measured = Machine(call=7.0, wide=True)
    save_machine(measured, torch.device("cpu"), torch.bfloat16)
    model, seen = nn.Sequential(nn.Linear(12, 9).bfloat16()), mock.Mock(wraps=assembly.StaticGroup)
    monkeypatch.setattr(assembly, "StaticGroup", seen)
    with attach(model, {"0": random_delta(weights=torch.ones(1, 5))}):
        assert seen.call_args.kwargs["machine"] == measured


def test_states_and_outputs_are_widened_and_never_narrowed():
    narrow, ids = torch.ones(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.int64)
    assert widened(narrow, torch.float32).dtype == torch.float32
    for x, dtype in ((narrow.float(), torch.bfloat16), (narrow, torch.float16), (ids, torch.float32)):
        assert widened(x, dtype) is x
    with torch.autocast("cpu", torch.bfloat16):
        assert widened(narrow, torch.float32) is narrow


def test_modules_that_share_an_input_share_one_product_of_its_wide_copy(monkeypatch: pytest.MonkeyPatch):
    model, seen, shrink = tiny.base_model("llama", dtype=torch.bfloat16), [], SharedForm.shrink
    paths = [Q, Q.replace("q_proj", "k_proj"), Q.replace("q_proj", "v_proj")]
    deltas = {path: delta_for("llama", path) for path in paths}

    def watched(form: SharedForm, x: Tensor) -> tuple[Tensor, ...]:
        seen.append(x.dtype)
        return shrink(form, x)

    monkeypatch.setattr(SharedForm, "shrink", watched)
    with torch.no_grad(), attach(model, deltas, machine=WIDE):
        assert tiny.logits(model, "llama", batch=1, seq=6).dtype == torch.bfloat16
    assert seen == [torch.float32]


def test_deltas_made_in_inference_mode_let_gradients_through_in_every_form():
    module = nn.Linear(12, 9).double()
    with torch.inference_mode():
        deltas = {"0": random_delta(weights=1.0 + torch.arange(15.0).view(3, 5).double())}  # all ranks, as they stand
    for form in ("shared", "gathered"):
        x = torch.randn(3, 4, 12, dtype=torch.float64, requires_grad=True)
        with attach(nn.Sequential(module), deltas, form=form):
            with torch.inference_mode():
                module(x.detach())
            module(x).sum().backward()
        assert x.grad is not None


def test_whoever_saw_a_modules_output_first_keeps_it_as_it_was():
    model, seen, kept = copy.deepcopy(laws.base("llama")), [], []
    model.get_submodule(Q).register_forward_hook(lambda module, args, output: seen.append(output))
    model.get_submodule(Q).register_forward_hook(lambda module, args, output: kept.append(output.clone()))
    with torch.no_grad(), attach(model, {Q: delta_for("llama", Q)}):
        changed = tiny.logits(model, "llama", batch=2, seq=6)
    assert torch.equal(seen[0], kept[0])
    assert not torch.equal(changed, tiny.logits(model, "llama", batch=2, seq=6))


def test_an_unknown_module_is_refused_by_name_before_any_hook_is_put_on(monkeypatch: pytest.MonkeyPatch):
    model, put = laws.base("llama"), []
    monkeypatch.setattr(nn.Module, "register_forward_hook", lambda *a, **k: put.append(a))
    deltas = {Q: delta_for("llama", Q), "model.layers.9.self_attn.q_proj": delta_for("llama", Q)}
    with pytest.raises(LookupError, match=r"layers\.9\.self_attn\.q_proj.*layers\.0\.self_attn\.q_proj"):
        attach(model, deltas).__enter__()
    assert not put


@pytest.mark.parametrize(
    ("path", "delta", "message"),
    [
        (Q, random_delta(32, 31, weights=torch.ones(1, 5)), "32 -> 32, the adapter is linear 32 -> 31"),
        (Q, random_delta(16, 32, weights=torch.ones(1, 5)), "the adapter is linear 16 -> 32"),
        (Q, random_delta(32, 32, weights=torch.ones(1, 5), kind="embedding"), "the adapter is embedding"),
        ("model.layers.0.input_layernorm", random_delta(32, 32, weights=torch.ones(1, 5)), "LlamaRMSNorm"),
        ("model.embed_tokens", random_delta(128, 32, weights=torch.ones(1, 5)), "is embedding 128 -> 32"),
    ],
)
def test_a_delta_that_does_not_fit_is_refused_before_any_hook_is_put_on(path: str, delta: LowRankDelta, message: str):
    model = laws.base("llama")
    with pytest.raises(ValueError, match=message), attach(model, {V: delta_for("llama", V), path: delta}):
        pass
    assert not any(hooks(model))


def test_rows_that_are_no_multiple_of_the_compositions_are_refused():
    model = laws.base("llama")
    with pytest.raises(ValueError, match="3 rows of input for 2 compositions"):
        laws.logits(model, {Q: delta_for("llama", Q, rows=2)}, "llama", batch=3)
    assert not any(hooks(model))


class Flattening(nn.Module):
    """Runs its projection on tokens of all rows together, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 9, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def test_a_module_that_flattens_rows_and_tokens_is_refused():
    model = Flattening()
    delta = random_delta(weights=torch.ones(1, 5, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"inner: its output has shape \(8, 9\)"), attach(model, {"inner": delta}):
        model(torch.zeros(2, 4, 12, dtype=torch.float64))


def test_the_delta_runs_in_the_dtype_of_the_module():
    model = tiny.base_model("llama", dtype=torch.bfloat16)
    with attach(model, {Q: delta_for("llama", Q)}):
        out = tiny.logits(model, "llama", batch=2, seq=6)
    assert out.dtype == torch.bfloat16
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("on", laws.BASES)
def test_every_kind_of_module_gains_B_A_x(on: str):
    """Linear, GPT-2's transposed Conv1D and embeddings, against changed weights."""
    adapter = laws.random_adapter("all", on, seed=3, rank=3, words=True)
    assert {f.kind for f in adapter.factors.values()} == {"linear", "embedding"}
    deltas = laws.compose_rows(Mixture(), [adapter], [[0.7]])
    want = tiny.logits(laws.dense_sum(on, [adapter], [0.7]), on, batch=2, seq=6)
    assert laws.distance(laws.logits(laws.base(on), deltas, on), want) < laws.ROUNDING[on]


def test_beams_of_an_encoder_decoder_keep_the_composition_of_their_prompt():
    """The encoder sees one row a prompt, the decoder one a beam."""
    adapters, rows = laws.hostile_adapters("t5"), laws.BATCH[:3]
    seen: dict[str, set[int]] = {"encoder.block.0": set(), "decoder.block.0": set()}
    handles = [
        laws.base("t5")
        .get_submodule(f"{name}.layer.0.SelfAttention.q")
        .register_forward_hook(lambda _m, args, _o, name=name: seen[name].add(args[0].shape[0]))
        for name in seen
    ]
    try:
        inputs = laws.padded(laws.prompts()[:3])
        beams = laws.generate("t5", inputs, laws.compose_rows(Mixture(), adapters, rows), num_beams=4)
    finally:
        for handle in handles:
            handle.remove()
    assert seen == {"encoder.block.0": {3}, "decoder.block.0": {12}}
    for i, row in enumerate(rows):
        alone = laws.compose_rows(Mixture(), adapters, [row])
        one = laws.generate("t5", laws.padded(laws.prompts()[i : i + 1]), alone, num_beams=4)
        assert torch.equal(beams.sequences[i], one.sequences[0])


@pytest.mark.parametrize("on", laws.BASES)
def test_samples_of_one_prompt_keep_its_composition(on: str):
    """Each returned sequence is scored again alone, under the composition of the prompt it came from."""
    adapters, rows, prompts = laws.hostile_adapters(on), laws.BATCH[:3], laws.prompts((4, 4, 4))
    torch.manual_seed(0)
    deltas = laws.compose_rows(Mixture(), adapters, rows)
    out = laws.generate(on, laws.padded(prompts), deltas, do_sample=True, num_return_sequences=3, temperature=1.5)
    thought = torch.stack(out.logits, dim=1)  # (9, new, vocabulary)
    assert out.sequences.shape[0] == 9
    for sample in range(9):
        alone = laws.compose_rows(Mixture(), adapters, [rows[sample // 3]])
        want = scored(on, prompts[sample // 3], out.sequences[sample], alone)
        assert laws.distance(thought[sample], want) < laws.GENERATED


def scored(on: str, prompt: Tensor, sequence: Tensor, deltas: Any) -> Tensor:
    model, inputs = laws.base(on), {"input_ids": sequence[None], "attention_mask": torch.ones_like(sequence)[None]}
    if on == "t5":
        inputs = {"input_ids": prompt[None], "decoder_input_ids": sequence[None]}
    with torch.no_grad(), attach(model, deltas):
        return model(**inputs).logits[0, -laws.NEW - 1 : -1]


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.self_attn.q_proj", "model.layers.3"),
        ("transformer.h.11.attn.c_attn", "transformer.h.11"),
        ("encoder.block.0.layer.1.DenseReluDense.wi", "encoder.block.0"),
        ("model.embed_tokens", ""),
        ("lm_head", ""),
    ],
)
def test_the_layer_of_a_module_is_its_outermost_numbered_block(path: str, layer: str):
    assert layer_of(path) == layer


def test_an_embedding_that_scales_its_output_scales_the_adapter_too(tmp_path):
    """Gemma multiplies by the root of the width; PEFT does the same to the adapter's part."""
    config = Gemma3TextConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config).eval()
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["embed_tokens"])).eval()
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    peft.save_pretrained(tmp_path / "adapter")
    banks = gather_banks([load_adapter(tmp_path / "adapter")])
    ids = torch.arange(6)[None]
    with torch.no_grad(), attach(model, Mixture().compose(banks, torch.ones(1, 1))):
        got = model(ids).logits
    with torch.no_grad():
        assert tiny.relative_error(got, peft(ids).logits) < 1e-5
        assert tiny.relative_error(got, model(ids).logits) > 1e-2


def test_positions_looked_up_once_for_all_rows_take_every_rows_composition():
    factors = [LoraFactors(torch.randn(2, 128), torch.randn(32, 2), "embedding") for _ in range(2)]
    adapters = [Adapter(str(i), {"transformer.wpe": f}) for i, f in enumerate(factors)]
    model, ids = tiny.base_model("gpt2"), torch.tensor([[5, 6, 7], [8, 9, 10]])
    deltas = Mixture().compose(gather_banks(adapters), torch.eye(2))
    with torch.no_grad(), attach(model, deltas):
        got = model(ids).logits
    for row, f in enumerate(factors):
        dense = tiny.base_model("gpt2")
        dense.transformer.wpe.weight.data += (f.B @ f.A).T
        with torch.no_grad():
            assert tiny.relative_error(got[row], dense(ids[row : row + 1]).logits[0]) < 1e-5


def test_modules_that_were_never_called_are_known_afterwards():
    model = laws.base("llama")
    with attach(model, {Q: delta_for("llama", Q)}) as attached:
        assert attached.never_ran == (Q,)
        laws.base("llama")(torch.ones(1, 3, dtype=torch.int64))
        assert attached.never_ran == ()


class Stored(nn.Linear):
    """A linear module that keeps its weight in few bits and computes in the dtype of its input, as bitsandbytes' do."""

    def __init__(self, weight: Tensor, storage: torch.dtype) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(weight.to(storage), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype))


@pytest.mark.parametrize("storage", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("computing", [torch.bfloat16, torch.float64])
def test_a_module_with_stored_weights_computes_in_the_dtype_of_the_models_states(storage, computing):
    weight = torch.arange(9 * 12).reshape(9, 12) % 3
    model = nn.Sequential(Stored(weight, storage), nn.LayerNorm(9, dtype=computing))
    delta = random_delta(weights=torch.full((2, 5), 0.25).double())
    x = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    want = x @ (weight.double() + 0.25 * delta.B @ delta.A).T
    with attach(model, {"0": delta}):
        got = model[0](x.to(computing))
    assert got.dtype == computing
    assert (got - want).abs().max() < (0.02 if computing == torch.bfloat16 else 1e-12) * want.abs().max()
