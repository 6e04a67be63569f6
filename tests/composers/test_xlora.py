"""X-LoRA against its equations in plain loops, and against PEFT's own X-LoRA inside a model."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, XLoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor

from loracompose.adapters.checkpoint import load_adapter
from loracompose.adapters.lora import Adapter
from loracompose.composers import compose
from loracompose.composers.base import Pool
from loracompose.composers.xlora import Xlora
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.gates import GateContext
from loracompose.composition.router import Router
from loracompose.runtime.attach import attach
from tests import laws, tiny
from tests.composers.one_module import factors
from tests.composers.two_layers import (
    BATCH,
    HIDDEN,
    MODULES,
    Q0,
    SEQ,
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

SETTINGS: list[dict[str, Any]] = [{}, {"granularity": "network"}, {"depth": 3, "width": 4}]


def states() -> Tensor:
    return torch.randn(BATCH, SEQ, HIDDEN, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def by_hand(router: Router, x: dict[str, Tensor], h: Tensor) -> dict[str, Tensor]:
    """Token by token and adapter by adapter."""
    chosen, outputs, settings, learnt = adapters(), {}, router.settings, router.tensors
    for path in MODULES:
        y = torch.zeros(BATCH, SEQ, SHAPES[path][1], dtype=torch.float64)
        head = "network" if settings["granularity"] == "network" else path
        for row in range(BATCH):
            members = [i for i, w in enumerate(WEIGHTS[row]) if w]
            for t in range(SEQ):
                f = h[row, t]
                for layer in range(settings["depth"] - 1):
                    weight, bias = learnt[f"trunk.{layer}.weight"], learnt[f"trunk.{layer}.bias"]
                    f = torch.stack([(row_.dot(f) + b).clamp_min(0) for row_, b in zip(weight, bias, strict=True)])
                says = {i: (learnt[f"{head}.weight"][i].dot(f) + learnt[f"{head}.bias"][i]).exp() for i in members}
                for i in members:
                    if path in chosen[i].factors:
                        part = chosen[i].factors[path]
                        y[row, t] = y[row, t] + says[i] / sum(says.values()) * (part.B @ (part.A @ x[path][row, t]))
        outputs[path] = y
    return outputs


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_it_is_the_papers_equations_forward_and_backward(settings: dict[str, Any]):
    router, x, h = learned(Xlora, **settings), inputs(), states()
    got, want = run(composed(Xlora(router)), x, base=h), by_hand(router, x, h)
    for path in MODULES:
        assert torch.allclose(got[path], want[path], atol=1e-12)
    mine, theirs = gradients(score(got), router), gradients(score(want), router)
    for name in router.tensors:
        assert theirs[name].abs().max() > 1e-6
        assert torch.allclose(mine[name], theirs[name], atol=1e-10)


def test_it_starts_as_the_mean_of_the_members_and_learns_from_there():
    router = noisy(Xlora.initial(pool(), 0, {"depth": 2, "width": 4}), spread=0.0)
    x, outputs = inputs(), run(composed(Xlora(router)), inputs(), base=states())
    chosen = adapters()
    dense = [a.factors[Q0].B @ a.factors[Q0].A if Q0 in a.factors else torch.zeros(9, HIDDEN) for a in chosen]
    for row, weights in enumerate(WEIGHTS):
        members = [update.double() for update, w in zip(dense, weights, strict=True) if w]
        want = x[Q0][row] @ (sum(members) / len(members)).mT if members else torch.zeros(SEQ, 9, dtype=torch.float64)
        assert torch.allclose(outputs[Q0][row], want, atol=1e-12)
    moved = gradients(score(outputs), router)
    assert moved[f"{Q0}.weight"].any()
    assert not moved["trunk.0.weight"].any()  # only after the heads have moved
    assert router.tensors["trunk.0.weight"].any()


def test_dropping_all_members_is_the_base_and_leaves_no_nan_in_any_gradient():
    router = learned(Xlora)
    outputs = run(composed(Xlora(router), [[0.0] * 4] * BATCH), inputs(), base=states())
    assert not any(y.any() for y in outputs.values())
    assert not any(g.any() for g in gradients(score(outputs), router).values())


def test_some_of_the_routers_adapters_alone_are_what_they_are_among_all():
    composer, chosen, x, h = Xlora(learned(Xlora)), adapters(), inputs(), states()
    among = run(composed(composer, [(0.0, 1.0, 0.0, 1.0)] * BATCH), x, base=h)
    alone = run(composed(composer, [(1.0, 1.0)] * BATCH, [chosen[1], chosen[3]]), x, base=h)
    assert alone
    assert all(torch.allclose(alone[path], among[path], atol=1e-12) for path in alone)


def test_the_trunk_is_run_once_for_all_modules_that_read_the_same_tokens():
    scratch: dict[str, Tensor] = {}
    deltas, x, h = composed(Xlora(learned(Xlora, depth=2, width=4))), inputs(), states()
    other, kept = 2 * h, []
    for path in (*MODULES, *MODULES):
        for read in (h, other):  # as in the decoder of an encoder-decoder
            deltas[path](x[path], GateContext(path, scratch=scratch, base_states=read))
        kept.append({name: id(value) for name, value in scratch.items()})
    assert len(kept[0]) == 4  # two states, and what was made of each
    assert all(held == kept[0] for held in kept)


# ---------------------------------------------------------------- inside a model


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = [("one", {"r": 3}), ("two", {"r": 4, "target_modules": ["q_proj", "down_proj"], "lora_alpha": 3})]
    return [
        tiny.peft_adapter(tmp_path, name, seed=i, dtype=torch.float64, **lora)[0] for i, (name, lora) in enumerate(made)
    ]


def peft_xlora(folders: list[Path], **settings: Any) -> PeftModel:
    base = tiny.base_model("llama", dtype=torch.float64)
    base.config.use_cache = False  # PEFT asks for it
    paths = {str(i): str(folder) for i, folder in enumerate(folders)}
    config = XLoraConfig(task_type="CAUSAL_LM", hidden_size=32, adapters=paths, xlora_dropout_p=0.0, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, config, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        if "classifier" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model.eval()


def same_router(model: PeftModel, found: list[Adapter], settings: dict[str, Any]) -> Router:
    """PEFT's classifier as a router of ours; `found` are the adapters in PEFT's order."""
    order = content_order(found)
    ours = Pool("tiny", 32, tuple(found[i].name for i in order), gather_banks([found[i] for i in order]))
    start, layers = Xlora.initial(ours, 0, settings), model.base_model.internal_xlora_classifier.layers
    linear = [layer for layer in layers if isinstance(layer, torch.nn.Linear)]
    tensors = {}
    for i, layer in enumerate(linear[:-1]):
        tensors[f"trunk.{i}.weight"], tensors[f"trunk.{i}.bias"] = layer.weight, layer.bias
    adapted = [
        name for name, module in model.base_model.lora_model.model.named_modules() if isinstance(module, LoraLayer)
    ]
    heads = adapted if settings.get("granularity", "matrix") == "matrix" else ["network"]
    K = len(found)
    for i, name in enumerate(heads):
        rows = slice(K * i, K * (i + 1))
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
            linear[-1].weight[rows][order],
            linear[-1].bias[rows][order],
        )
    assert set(tensors) == set(start.tensors)
    return Router("xlora", start.settings, tensors, start.base_model, start.adapters)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"layerwise_scalings": True}),
        ({"granularity": "network"}, {"layerwise_scalings": False}),
        ({"depth": 3, "width": 8}, {"layerwise_scalings": True, "xlora_depth": 3, "xlora_size": 8}),
    ],
    ids=["matrix", "network", "deep"],
)
def test_it_is_pefts_xlora_with_all_adapters_as_members_and_decodes_with_a_cache_what_peft_does_without(
    folders: list[Path], ours: dict[str, Any], theirs: dict[str, Any]
):
    model, found = peft_xlora(folders, **theirs), [load_adapter(folder) for folder in folders]
    deltas = laws.compose_rows(Xlora(same_router(model, found, ours)), found, [[0.5, 0.5]])
    want = tiny.logits(model, batch=2, seq=7)
    assert (
        laws.distance(laws.logits(laws.base("llama"), deltas, "llama", batch=2), tiny.logits(model, batch=2, seq=6))
        < 1e-6
    )
    assert laws.distance(want, tiny.logits(laws.base("llama"), batch=2, seq=7)) > 1e-2
    prompt = laws.padded(laws.prompts((6,)))
    told = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with attach(laws.base("llama"), deltas):
        got = laws.base("llama").generate(**prompt, **told)
    assert torch.equal(got, model.generate(**prompt, **told))


@pytest.mark.parametrize("on", ["llama", "t5"])
def test_beams_with_a_cache_are_those_without(on: str):
    """The base's keys and values must follow their beam as the adapted ones do."""
    deltas = laws.compose_rows(laws.ROWS["xlora"].settings[0], laws.hostile_adapters(on), laws.BATCH[:2])
    inputs = laws.padded(laws.prompts((6, 3)))
    with_cache, without = (
        laws.generate(on, inputs, deltas, num_beams=4, num_return_sequences=3, use_cache=cached)
        for cached in (True, False)
    )
    assert torch.equal(with_cache.sequences, without.sequences)
    assert laws.distance(with_cache.sequences_scores, without.sequences_scores) < laws.GENERATED


# ---------------------------------------------------------------- refusals


def test_an_adapter_it_was_not_trained_for_is_refused_by_name():
    with pytest.raises(LookupError, match="it knows a"):
        composed(Xlora(learned(Xlora)), [[1.0]], [Adapter("new", {Q0: factors(2, 99, 6, 9)})])


def test_a_module_that_reads_other_tokens_than_the_base_did_and_a_run_without_a_first_pass_are_refused():
    delta, x = composed(Xlora(learned(Xlora)))[Q0], inputs()[Q0]
    with pytest.raises(ValueError, match=r"cannot gate a module outside the body"):
        delta(x[:, -1:], GateContext(Q0, base_states=states()))
    with pytest.raises(ValueError, match="run it with attach"):
        delta(x, GateContext(Q0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "layer"}, "granularity must be one of matrix, network"),
        ({"depth": 0}, "depth must be an integer of at least 1"),
        ({"width": 0}, "width must be an integer of at least 1"),
        ({"top_k": 1}, "has no setting top_k"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Xlora.initial(pool(), 0, settings)


def test_another_methods_router_is_refused_and_it_cannot_be_merged():
    with pytest.raises(ValueError, match="belongs to the composer 'mole'"):
        Xlora(Router("mole", {}, {}, "toy"))
    with pytest.raises(ValueError, match="gates the ranks by token"):
        compose(adapters(), composer=Xlora(learned(Xlora)))
