from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composers import compose
from loracompose.composers.milora import Milora, layer_weights
from loracompose.composers.milora_gate import balance_loss
from loracompose.composition.gates import GateContext
from loracompose.composition.layers import layer_of
from loracompose.composition.router import Router
from tests.composers.one_module import factors
from tests.composers.two_layers import (
    BATCH,
    HIDDEN,
    MODULES,
    PROMPT,
    Q0,
    SHAPES,
    WEIGHTS,
    adapters,
    composed,
    gradients,
    inputs,
    learned,
    noisy,
    pool,
    run,
    score,
)

LAYERS = ("model.layers.0", "model.layers.1")


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def activated(router: Router, layer: str, h: Tensor) -> Tensor:
    """Each feature through the quotient of polynomials, or GeLU."""
    if router.settings["activation"] == "gelu":
        return torch.stack([gelu(x) for x in h])
    c = router.tensors[f"{layer}.activation"]
    entries = []
    for x in h:
        above, below = c[0], torch.zeros((), dtype=torch.float64)
        for j in range(1, 7):
            above = above + c[j] * x**j
        for i in range(1, 6):
            below = below + c[6 + i] * x**i
        entries.append(above / (1 + below.abs()))
    return torch.stack(entries)


def pooled(router: Router, layer: str, row: int) -> Tensor:
    """Eq. 8 or one of its alternatives, over the tokens of the row's prompt."""
    tokens = [inputs(HIDDEN)[layer][row, t] for t in range(PROMPT.shape[1]) if PROMPT[row, t]]
    match router.settings["pooler"]:
        case "last":
            return tokens[-1]
        case "mean":
            return sum(tokens) / len(tokens)
        case "max":
            return torch.stack([max(token[f] for token in tokens) for f in range(HIDDEN)])
    powers = [router.tensors[f"{layer}.pooler"].dot(token).exp() for token in tokens]
    return sum(power / sum(powers) * token for power, token in zip(powers, tokens, strict=True))


def probabilities(router: Router, layer: str, row: int) -> dict[int, Tensor]:
    """Expert -> p; the experts are the row's adapters, or the layer's modules sorted by path."""
    g = activated(router, layer, pooled(router, layer, row))
    if router.settings["form"] == "modules":
        experts = range(len(router.settings["modules"][layer])) if any(WEIGHTS[row]) else []
    else:
        experts = [i for i, w in enumerate(WEIGHTS[row]) if w]
    powers = {i: router.tensors[f"{layer}.experts"][i].dot(g).exp() for i in experts}
    return {i: power / sum(powers.values()) for i, power in powers.items()}


def by_hand(router: Router, x: dict[str, Tensor]) -> dict[str, Tensor]:
    chosen, outputs, form = adapters(), {}, router.settings["form"]
    for path in MODULES:
        layer, y = layer_of(path), torch.zeros(BATCH, x[path].shape[1], SHAPES[path][1], dtype=torch.float64)
        for row in range(BATCH):
            p = probabilities(router, layer, row)
            kept = sorted(p, key=lambda i: -p[i].item())[: router.settings["top_k"]]
            total = sum(p[i].item() for i in kept)
            for i, w in enumerate(WEIGHTS[row]):
                if not w or path not in chosen[i].factors:
                    continue
                if form == "modules":
                    module = router.settings["modules"][layer].index(path)
                    # 1 as a value, p for the gradient
                    times = w * (1 - p[module].item() + p[module]) if module in kept else None
                else:
                    times = p[i] / total if i in kept else None
                for t in range(x[path].shape[1]) if times is not None else ():
                    y[row, t] = y[row, t] + times * (
                        chosen[i].factors[path].B @ chosen[i].factors[path].A @ x[path][row, t]
                    )
        outputs[path] = y
    return outputs


def balance_by_hand(router: Router) -> Tensor:
    losses = []
    for layer in LAYERS:
        rows = [p for row in range(BATCH) if (p := probabilities(router, layer, row))]
        experts = sorted({i for p in rows for i in p})
        loss = torch.zeros((), dtype=torch.float64)
        for i in experts:
            first = sum(max(p, key=lambda j: p[j].item()) == i for p in rows) / len(rows)
            loss = loss + first * sum(p[i] for p in rows if i in p) / len(rows)
        losses.append(len(experts) * loss)
    return sum(losses) / len(losses)


FORMS = [
    {"form": "adapters"},
    {"form": "adapters", "top_k": 1, "pooler": "last", "activation": "gelu"},
    {"form": "adapters", "top_k": 9, "pooler": "mean"},
    {"form": "modules"},
    {"form": "modules", "top_k": 3, "pooler": "max"},
]


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_outputs_and_gradients_are_those_of_the_papers_equations_written_out(settings: dict[str, object]):
    router, x = learned(Milora, **settings), inputs()
    got, want = run(composed(Milora(router)), x), by_hand(router, x)
    for path in MODULES:
        assert torch.allclose(got[path], want[path], atol=1e-12)
    mine, theirs = gradients(score(got), router), gradients(score(want), router)
    for name in router.tensors:
        assert torch.allclose(mine[name], theirs[name], atol=1e-9)
        assert theirs[name].any()


@pytest.mark.parametrize("settings", FORMS, ids=str)
def test_the_balance_loss_and_its_gradient_are_those_of_the_switch(settings: dict[str, object]):
    router, scratch = learned(Milora, **settings, balance=0.3), {}
    run(composed(Milora(router)), inputs(), scratch=scratch)
    got, want = Milora(router).auxiliary_loss(scratch), 0.3 * balance_by_hand(router)
    assert got is not None
    assert torch.allclose(got, want, atol=1e-12)
    mine, theirs = gradients(got, router), gradients(want, router)
    for name in router.tensors:
        assert torch.allclose(mine[name], theirs[name], atol=1e-10)
        assert mine[name].any()


def test_the_balance_loss_is_1_at_balance_and_the_number_of_experts_if_one_takes_all():
    everyone = torch.ones(4, 4, dtype=torch.bool)
    assert balance_loss(torch.eye(4), everyone).item() == pytest.approx(1.0)
    assert balance_loss(torch.eye(4)[[2, 2, 2, 2]], everyone).item() == pytest.approx(4.0)


@pytest.mark.parametrize("form", ["adapters", "modules"])
def test_a_decision_is_made_once_by_the_prompt_and_kept_for_other_tokens(form: str):
    deltas, memory = composed(Milora(learned(Milora, form=form))), {}
    run(deltas, inputs(), memory=memory)
    kept = {key: value.clone() for key, value in memory.items()}
    hidden = torch.zeros(BATCH, 1, HIDDEN, dtype=torch.float64)
    for path, delta in deltas.items():
        delta(inputs()[path][:, :1], GateContext(path, hidden, memory=memory))
    assert kept.keys() == memory.keys()
    assert all(torch.equal(kept[key], memory[key]) for key in kept)


def test_the_weights_of_every_layer_can_be_read_and_have_at_most_k_members_of_sum_1():
    memory: dict[str, Tensor] = {}
    run(composed(Milora(learned(Milora))), inputs(), memory=memory)
    found = layer_weights(memory)
    assert tuple(sorted(found)) == LAYERS
    member = torch.tensor(WEIGHTS) != 0
    for weights in found.values():
        assert torch.allclose(weights.sum(dim=1), torch.tensor([1.0, 1.0, 1.0, 0.0]).double(), atol=1e-12)
        assert ((weights != 0).sum(dim=1) == member.sum(dim=1).clamp_max(2)).all()
        assert not (weights != 0)[~member].any()
    assert not torch.equal(*found.values())


def test_the_choice_of_modules_runs_a_module_as_it_was_trained_or_not_at_all():
    deltas, memory = composed(Milora(learned(Milora, form="modules"))), {}
    x = inputs()
    got = run(deltas, x, memory=memory)
    for layer, chosen in layer_weights(memory).items():
        assert torch.equal(chosen.sum(dim=1), torch.tensor([2.0, 2.0, 2.0, 0.0]).double())
        for path in (p for p in MODULES if layer_of(p) == layer):
            on = chosen[:, sorted(p for p in MODULES if layer_of(p) == layer).index(path)]
            full = replace(deltas[path], gate=None)(x[path])
            assert torch.allclose(got[path], full * on[:, None, None], atol=1e-12)


@pytest.mark.parametrize("form", ["adapters", "modules"])
def test_dropping_all_members_is_the_base_and_leaves_no_nan_in_any_gradient(form: str):
    router, scratch = learned(Milora, form=form), {}
    outputs = run(composed(Milora(router), [[0.0] * 4] * BATCH), inputs(), scratch=scratch)
    assert not any(y.any() for y in outputs.values())
    loss = Milora(router).auxiliary_loss(scratch)
    assert loss == 0
    assert not any(g.any() for g in gradients(score(outputs) + loss, router).values())


def test_with_one_expert_kept_the_router_still_learns_from_the_task():
    router = learned(Milora, top_k=1)
    found = gradients(score(run(composed(Milora(router)), inputs())), router)
    assert all(found[f"{layer}.experts"].abs().max() > 1e-3 for layer in LAYERS)


def test_the_start_pools_by_the_mean_and_is_gelu():
    start = Milora.initial(pool(), 0, {})
    assert start.tensors["model.layers.0.activation"].shape == (12,)
    plain = Milora.initial(pool(), 0, {"pooler": "mean", "activation": "gelu"})
    assert sorted(plain.tensors) == [f"{layer}.experts" for layer in LAYERS]
    got, want = (run(composed(Milora(noisy(r, 0.0))), inputs())[Q0] for r in (start, plain))
    assert (got - want).abs().max() < 1e-3 * want.abs().max()


def test_embeddings_and_modules_outside_the_layers_keep_their_weights():
    both = [Adapter("e", {"embed": replace(factors(2, 1, 30, 6), kind="embedding"), Q0: factors(1, 2, 6, 9)})]
    both = [replace(both[0], factors={**both[0].factors, "lm_head": factors(1, 2, 6, 30)})]
    deltas = composed(Milora(noisy(Milora.initial(pool(both), 0, {}))), [[-0.5]], both)
    assert [path for path, delta in deltas.items() if delta.gate is not None] == [Q0]
    assert torch.equal(deltas["lm_head"].weights, torch.tensor([[-0.5]]).double())


def test_keys_and_values_of_cross_attention_decide_on_the_encoders_tokens_apart():
    self_, cross = "decoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.1.EncDecAttention.k"
    one = [Adapter("a", {self_: factors(1, 1, 6, 6), cross: factors(1, 2, 6, 6)})]
    deltas, memory = composed(Milora(noisy(Milora.initial(pool(one), 0, {}))), [[1.0]], one), {}
    for path, seq in ((self_, 1), (cross, 5)):
        x = torch.randn(1, seq, 6, generator=torch.Generator().manual_seed(seq)).double()
        deltas[path](x, GateContext(path, x, memory=memory))
    assert sorted(layer_weights(memory)) == ["decoder.block.0", "decoder.block.0 (encoder)"]


def test_an_adapter_or_module_it_was_not_trained_for_is_refused_by_name():
    composer = Milora(learned(Milora))
    with pytest.raises(LookupError, match="it knows a"):
        composed(composer, [[1.0]], [Adapter("new", {Q0: factors(2, 99, 6, 9)})])
    wider = Adapter("wider", {"model.layers.0.mlp.gate_proj": factors(1, 3, 6, 8)})
    known = replace(composer.router, adapters=pool([wider]).adapters * 4)
    with pytest.raises(LookupError, match=r"without the module 'model.layers.0.mlp.gate_proj'"):
        composed(Milora(known), [[1.0]], [wider])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "rows"}, "form must be one of adapters, modules, got 'rows'"),
        ({"pooler": "sum"}, "pooler must be one of attention, mean, max, last, got 'sum'"),
        ({"activation": "relu"}, "activation must be one of rational, gelu"),
        ({"top_k": 0}, "top_k must be an integer of at least 1"),
        ({"balance": float("nan")}, "balance must be a finite number"),
        ({"k": 2}, "has no setting k"),
    ],
)
def test_settings_that_are_none_or_out_of_range_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Milora.initial(pool(), 0, settings)


def test_a_pool_without_layers_is_refused():
    with pytest.raises(ValueError, match="nothing to route"):
        Milora.initial(pool([Adapter("head", {"lm_head": factors(1, 2, 6, 30)})]), 0, {})


def test_it_cannot_be_merged():
    with pytest.raises(ValueError, match="gates the ranks by prompt"):
        compose(adapters(), composer=Milora(learned(Milora)))
