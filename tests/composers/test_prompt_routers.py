"""Gates of prompts inside whole models: decided once, kept, settled into static deltas, and trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loracompose.adapters.lora import Adapter
from loracompose.composers.base import Composer, LearnedComposer, Pool
from loracompose.composers.merge import plain_factors
from loracompose.composers.milora import Milora, layer_weights
from loracompose.composers.mixture import Mixture
from loracompose.composers.mole import Mole
from loracompose.composers.phatgoose import Phatgoose
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.prompt_gates import fit_rows, settle
from loracompose.composition.router import Router
from loracompose.runtime.attach import attach
from tests import laws
from tests.composers import two_layers

ROWS = laws.BATCH[:5]
PROMPT_GATES = [setting for name in ("mole", "milora") for setting in laws.ROWS[name].settings]
SETTLED = [*[(composer, "llama") for composer in PROMPT_GATES], (PROMPT_GATES[0], "t5"), (PROMPT_GATES[-1], "t5")]


def pool_of(on: str) -> Pool:
    adapters = laws.hostile_adapters(on)
    ordered = [adapters[i] for i in content_order(adapters)]
    return Pool(on, 32, tuple(a.name for a in ordered), gather_banks(ordered))


def of_contents(decided: Tensor) -> Tensor:
    """Decisions about adapters, those about equal adapters added up: between these, rounding chooses."""
    prints = sorted(adapter.fingerprint for adapter in laws.hostile_adapters())
    if decided.shape[-1] != len(prints):
        return decided
    return torch.stack(
        [sum(decided[..., i] for i, p in enumerate(prints) if p == own) for own in sorted(set(prints))], dim=-1
    )


@pytest.mark.parametrize("composer", PROMPT_GATES, ids=repr)
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_what_the_prefill_decides_is_what_holds_after_the_last_token_for_every_beam(
    composer: Composer, settings: dict[str, Any]
):
    model, batch = laws.base("llama"), laws.padded(laws.prompts()[:5])
    deltas = laws.compose_rows(composer, laws.hostile_adapters(), ROWS)
    seen: list[dict[str, Tensor]] = []
    with attach(model, deltas) as attached:
        watch = model.register_forward_hook(lambda *_: seen.append({k: v.clone() for k, v in attached.memory.items()}))
        model.generate(**batch, max_new_tokens=laws.NEW, min_new_tokens=laws.NEW, pad_token_id=0, **settings)
        watch.remove()
    assert len(seen) == laws.NEW
    assert seen[0].keys() == seen[-1].keys()
    beams = settings.get("num_beams", 1)
    for key, decided in seen[0].items():
        assert torch.equal(decided, seen[-1][key])
        own = of_contents(decided)
        assert torch.allclose(own, own[::beams].repeat_interleave(beams, dim=0), atol=1e-9)


@pytest.mark.parametrize(("composer", "on"), SETTLED, ids=repr)
def test_settled_deltas_generate_what_the_gates_generate(composer: Composer, on: str):
    batch, deltas = laws.padded(laws.prompts()[:5]), laws.compose_rows(composer, laws.hostile_adapters(on), ROWS)
    model = laws.base(on)
    with attach(model, deltas) as attached:  # beams, so that what is settled has more rows than the deltas
        model.generate(**batch, max_new_tokens=1, num_beams=2, pad_token_id=0)
    settled = settle(deltas, attached.memory)
    assert all(delta.gate is None and delta.batch == 5 for delta in settled.values())
    gated, static = laws.generate(on, batch, deltas), laws.generate(on, batch, settled)
    assert torch.equal(gated.sequences, static.sequences)
    assert laws.distance(torch.stack(static.logits), torch.stack(gated.logits)) < laws.GENERATED


def test_a_row_of_settled_deltas_is_a_plain_adapter_that_can_be_kept():
    composer, prompt = Milora(laws.learned(Milora)), laws.padded(laws.prompts()[:1])
    deltas = laws.compose_rows(composer, laws.hostile_adapters(), ROWS[:1])
    with attach(laws.base("llama"), deltas) as attached:
        laws.base("llama")(**prompt)
    settled = settle(deltas, attached.memory)
    kept = Adapter("kept", {path: plain_factors(delta) for path, delta in settled.items()})
    again = laws.generate("llama", prompt, laws.compose_rows(Mixture(), [kept], [(1.0,)]))
    gated = laws.generate("llama", prompt, deltas)
    assert laws.distance(torch.stack(again.logits), torch.stack(gated.logits)) < laws.GENERATED
    weights = layer_weights(attached.memory)
    assert sorted(weights) == ["model.layers.0", "model.layers.1"]
    assert all(torch.allclose(w.sum(dim=1), torch.ones(1).double()) for w in weights.values())


def test_before_the_prompts_have_run_nothing_can_be_settled_nor_can_gates_of_tokens_ever():
    for composer in (Mole(laws.learned(Mole)), Milora(laws.learned(Milora))):
        with pytest.raises(ValueError, match="decided"):
            settle(laws.compose_rows(composer, laws.hostile_adapters(), ROWS), {})
    by_token = laws.compose_rows(Phatgoose(laws.learned(Phatgoose)), laws.hostile_adapters(), ROWS)
    with pytest.raises(ValueError, match="PhatgooseGate decides by token"):
        settle(by_token, {})


@pytest.mark.parametrize("kind", [Mole, Milora, Phatgoose])
def test_some_of_the_routers_adapters_alone_are_what_they_are_among_all(kind: type[Any]):
    composer, chosen = kind(two_layers.learned(kind)), two_layers.adapters()
    among = two_layers.composed(composer, [(0.0, 1.0, 0.0, 1.0)] * two_layers.BATCH)
    alone = two_layers.composed(composer, [(1.0, 1.0)] * two_layers.BATCH, [chosen[1], chosen[3]])
    want, got = (two_layers.run(deltas, two_layers.inputs()) for deltas in (among, alone))
    assert got
    assert all(torch.allclose(got[path], want[path], atol=1e-12) for path in got)


def test_rows_of_a_decision_are_repeated_or_thinned_out_and_refused_otherwise():
    decided = torch.tensor([1, 2])
    assert fit_rows(decided, 4).tolist() == [1, 1, 2, 2]
    assert fit_rows(torch.tensor([1, 1, 2, 2]), 2).tolist() == [1, 2]
    with pytest.raises(ValueError, match="a decision for 2 rows cannot serve 3"):
        fit_rows(decided, 3)


def test_one_gate_for_the_whole_network_is_decided_by_its_first_module():
    router = Mole.initial(pool_of("llama"), 0, {"granularity": "network"})
    assert router.settings["sites"] == {"network": "model.layers.0.self_attn.q_proj"}
    loud = replace(router, tensors={n: 50 * t for n, t in router.tensors.items()})
    deltas = laws.compose_rows(Mole(loud), laws.hostile_adapters(), ROWS)
    with attach(laws.base("llama"), deltas) as attached:
        laws.base("llama")(**laws.padded(laws.prompts()[:5]))
    shares = attached.memory["mole.network"]
    assert torch.equal(shares != 0, torch.tensor(ROWS)[:, content_order(laws.hostile_adapters())] != 0)
    assert shares[3].std() > 0.01


# ---------------------------------------------------------------- training

METHODS = [
    (Mole, {"granularity": "matrix"}),
    (Mole, {"granularity": "block"}),
    (Milora, {"form": "adapters"}),
    (Milora, {"form": "modules"}),
    (Phatgoose, {}),
]


class Lesson:
    """Prompts and answers of random tokens, padded on the right; the last row has lost all its members."""

    def __init__(self, on: str, kind: type[LearnedComposer], weights: list[list[float]]) -> None:
        self.model, self.weights = laws.base(on), torch.tensor(weights, dtype=torch.float64)
        self.make = getattr(kind, "training", kind)
        adapters = laws.hostile_adapters(on)
        self.banks = gather_banks([adapters[i] for i in content_order(adapters)])
        self.ids = torch.stack(laws.prompts([9] * len(weights)))  # (batch, 9)
        self.mask = torch.arange(9) < torch.tensor([9, 7, 8, 9])[:, None]
        self.prompt = torch.arange(9) < torch.tensor([4, 3, 5, 2])[:, None]

    def loss(self, router: Router) -> Tensor:
        composer = self.make(router)
        with attach(self.model, composer.compose(self.banks, self.weights), self.prompt) as attached:
            logits = self.model(input_ids=self.ids, attention_mask=self.mask.long()).logits[:, :-1]
        answers = (self.mask & ~self.prompt)[:, 1:]
        loss = nn.functional.cross_entropy(logits[answers], self.ids[:, 1:][answers])
        extra = composer.auxiliary_loss(attached.scratch)
        return loss if extra is None else loss + 0.1 * extra


def gradients(loss: Tensor, router: Router) -> dict[str, Tensor]:
    """Of the router's tensors alone: the base of the tests must not collect any."""
    found = torch.autograd.grad(loss, list(router.tensors.values()), allow_unused=True)
    zero = {name: torch.zeros_like(t) for name, t in router.tensors.items()}
    return {name: zero[name] if g is None else g for name, g in zip(zero, found, strict=True)}


def parameters(router: Router) -> Router:
    return replace(router, tensors={name: nn.Parameter(t.double()) for name, t in router.tensors.items()})


@pytest.mark.parametrize(("kind", "settings"), METHODS, ids=str)
def test_a_few_steps_lower_the_loss_and_every_tensor_gets_a_gradient(
    kind: type[LearnedComposer], settings: dict[str, object]
):
    own = kind is Phatgoose
    weights = [[1.0, 0, 0, 0, 0, 0], [0, 1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1.0], [0.0] * 6]
    lesson = Lesson("llama", kind, weights if own else [*[[0.3, 0.2, 0.1, 0.2, 0.1, 0.1]] * 3, [0.0] * 6])
    router = parameters(kind.initial(pool_of("llama"), 0, settings))
    optimizer = torch.optim.Adam(router.tensors.values(), lr=0.03)
    losses = []
    for _ in range(12):
        loss = lesson.loss(router)
        found = gradients(loss, router)
        assert all(torch.isfinite(gradient).all() for gradient in found.values())
        for name, tensor in router.tensors.items():
            tensor.grad = found[name]
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < losses[0] - 0.02
    assert [name for name, gradient in found.items() if not gradient.any()] == []


@pytest.mark.parametrize(("kind", "settings"), METHODS, ids=str)
def test_a_batch_that_lost_all_its_members_gives_the_base_models_loss_and_no_nan(
    kind: type[LearnedComposer], settings: dict[str, object]
):
    lesson = Lesson("llama", kind, [[0.0] * 6] * 4)
    router = parameters(kind.initial(pool_of("llama"), 0, settings))
    loss = lesson.loss(router)
    assert not any(gradient.any() for gradient in gradients(loss, router).values())
    plain = lesson.model(input_ids=lesson.ids, attention_mask=lesson.mask.long()).logits[:, :-1]
    answers = (lesson.mask & ~lesson.prompt)[:, 1:]
    assert torch.equal(loss, nn.functional.cross_entropy(plain[answers], lesson.ids[:, 1:][answers]))


@pytest.mark.parametrize("composer", PROMPT_GATES, ids=repr)
def test_answers_do_not_reach_the_decision(composer: Composer):
    ids, prompt = torch.stack(laws.prompts([8] * 5)), torch.arange(8).expand(5, -1) < 4
    deltas, decided = laws.compose_rows(composer, laws.hostile_adapters(), ROWS), []
    for answers in (ids[:, 4:], ids[:, 4:].flip(0, 1)):
        with attach(laws.base("llama"), deltas, prompt) as attached, torch.no_grad():
            laws.base("llama")(input_ids=torch.cat([ids[:, :4], answers], dim=1))
        decided.append(attached.memory)
    assert decided[0].keys() == decided[1].keys()
    assert all(torch.allclose(decided[0][key], decided[1][key], atol=1e-12) for key in decided[0])
