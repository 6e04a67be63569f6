"""Watching a gate changes nothing and shows what it decided."""

from __future__ import annotations

import pytest
import torch

from loracompose.composers.arrow import Arrow
from loracompose.composers.mixture import Mixture
from loracompose.composers.rank_gating import RankGating
from loracompose.composition.bank import content_order, gather_banks
from loracompose.evaluation.watching import by_layer, decisions, watch
from loracompose.runtime.attach import attach
from tests import laws, tiny


@pytest.mark.parametrize(
    "composer", [RankGating(m=2), Arrow(), *(laws.ROWS[name].settings[0] for name in ("lora_flow", "xlora"))], ids=repr
)
def test_watched_deltas_run_to_the_last_bit_as_before_and_every_gate_is_noted(composer):
    deltas = laws.compose_rows(composer, laws.hostile_adapters(), laws.BATCH[:2])
    model = laws.base("llama")
    with attach(model, deltas):
        plain = tiny.logits(model, "llama", batch=2, seq=6)
    with attach(model, watch(deltas)) as attached:
        assert torch.equal(tiny.logits(model, "llama", batch=2, seq=6), plain)
    found = decisions(attached.scratch)
    gated = {module for module, delta in deltas.items() if delta.gate is not None}
    assert set(found) == gated
    for module, multipliers in found.items():
        assert multipliers.shape == (2, 6, deltas[module].weights.shape[1])


def test_what_is_noted_is_what_the_gate_says_of_the_last_pass():
    deltas = laws.compose_rows(RankGating(m=2), laws.hostile_adapters(), laws.BATCH[:2])
    with attach(laws.base("llama"), watch(deltas)) as attached:
        tiny.logits(laws.base("llama"), "llama", batch=2, seq=3)
        tiny.logits(laws.base("llama"), "llama", batch=2, seq=6)
    for module, multipliers in decisions(attached.scratch).items():
        assert multipliers.shape[1] == 6
        acting = (multipliers != 0).sum(dim=-1)
        assert ((acting <= 2) | (deltas[module].weights.shape[1] <= 2)).all()
        kept = multipliers != 0
        weights = deltas[module].weights[:, None].expand_as(multipliers)
        assert torch.equal(multipliers[kept], weights[kept])  # a rank is kept at its adapter's weight


def test_layers_stand_in_the_order_they_run_and_hold_the_mean_over_an_adapters_ranks():
    decided = {
        "model.layers.10.self_attn.q_proj": torch.tensor([[[0.0, 1.0, 4.0]]]),
        "model.layers.2.self_attn.q_proj": torch.tensor([[[3.0, 1.0]]]),
        "model.layers.2.self_attn.v_proj": torch.tensor([[[2.0]]]),
        "lm_head": torch.tensor([[[7.0]]]),
    }
    owners = {module: torch.zeros(value.shape[-1], dtype=torch.int64) for module, value in decided.items()}
    owners["model.layers.10.self_attn.q_proj"] = torch.tensor([0, 0, 2])
    noted = {f"watched {module}": value for module, value in decided.items()}
    found = decisions({**noted, "a loss": torch.zeros(())})
    assert list(found)[:2] == ["model.layers.2.self_attn.q_proj", "model.layers.2.self_attn.v_proj"]
    shares = by_layer(found, owners, 3)
    assert shares.shape == (1, 3, 2, 1)
    assert torch.equal(shares[0, 0, :, 0], torch.tensor([2.0, 0.5]))
    assert shares[0, 1].isnan().all()
    assert shares[0, 2, :, 0].isnan().tolist() == [True, False]
    assert shares[0, 2, 1, 0] == 4.0


def test_owners_of_the_banks_are_those_of_the_decisions():
    adapters = laws.hostile_adapters()
    ordered = [adapters[i] for i in content_order(adapters)]
    deltas = laws.compose_rows(RankGating(m=2), adapters, laws.BATCH[:2])
    owners = {module: bank.owner for module, bank in gather_banks(ordered).items()}
    with attach(laws.base("llama"), watch(deltas)) as attached:
        tiny.logits(laws.base("llama"), "llama", batch=2, seq=4)
    shares = by_layer(decisions(attached.scratch), owners, len(adapters))
    assert shares.shape == (2, len(adapters), 2, 4)
    members = torch.tensor(laws.BATCH[1])[content_order(adapters)] != 0
    assert (shares[1, ~members].nan_to_num() == 0).all()  # who is no member of a row lets nothing pass in it
    assert (shares[1, members].nan_to_num() != 0).any()


def test_without_a_gate_that_ran_there_is_nothing_to_see():
    static = laws.compose_rows(Mixture(), laws.hostile_adapters(), laws.BATCH[:2])
    assert watch(static) == dict(static)
    with attach(laws.base("llama"), watch(static)) as attached:
        tiny.logits(laws.base("llama"), "llama", batch=2, seq=3)
    with pytest.raises(LookupError, match="no watched gate has run"):
        decisions(attached.scratch)
    with pytest.raises(ValueError, match="numbered layer"):
        by_layer({"lm_head": torch.ones(1, 2, 3)}, {"lm_head": torch.zeros(3, dtype=torch.int64)}, 1)
