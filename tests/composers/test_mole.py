from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composers import compose
from loracompose.composers.mole import Mole, group_of
from loracompose.composers.mole_gate import MEMBERS, SHARES
from loracompose.composition.gates import GateContext
from loracompose.composition.router import Router
from tests.composers.one_module import factors
from tests.composers.two_layers import (
    BATCH,
    K0,
    MODULES,
    PROMPT,
    Q0,
    SHAPES,
    UP0,
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

# the modules that share a gate, by granularity, and the first of them that runs
GROUPS = {
    "matrix": {path: [path] for path in MODULES},
    "layer": {
        f"model.layers.{i}.{name}": [p for p in MODULES if f"layers.{i}.{part}" in p]
        for i in (0, 1)
        for name, part in (("attention", "self_attn"), ("feed_forward", "mlp"))
    },
    "block": {f"model.layers.{i}": [p for p in MODULES if f"layers.{i}." in p] for i in (0, 1)},
    "network": {"network": list(MODULES)},
}


def shares_by_hand(router: Router, group: str, site: str, x: Tensor, row: int, mask: Tensor) -> dict[int, Tensor]:
    """Eqs. 9-11 for one row: adapter -> share."""
    chosen = adapters()
    members = [i for i, w in enumerate(WEIGHTS[row]) if w]
    features = {}
    for i in members:
        part = chosen[i].factors.get(site)
        if part is None:
            continue
        tokens = [part.B @ (part.A @ x[row, t]) for t in range(x.shape[1]) if mask[row, t]]
        mean = sum(tokens) / len(tokens)
        features[i] = mean / mean.norm()
    e, tau = router.tensors[f"{group}.weight"], router.tensors[f"{group}.log_temperature"].exp()
    powers = {}
    for i in members:
        logit = torch.zeros((), dtype=torch.float64)
        for j, feature in features.items():
            logit = logit + e[i, j].dot(feature)
        powers[i] = (logit / tau).exp()
    return {i: power / sum(powers.values()) for i, power in powers.items()}


def by_hand(router: Router, granularity: str, x: dict[str, Tensor], mask: Tensor = PROMPT) -> dict[str, Tensor]:
    """Row by row, token by token, adapter by adapter."""
    chosen, outputs = adapters(), {}
    for group, modules in GROUPS[granularity].items():
        for path in modules:
            y = torch.zeros(*x[path].shape[:2], SHAPES[path][1], dtype=torch.float64)
            for row in range(BATCH):
                shares = shares_by_hand(router, group, modules[0], x[modules[0]], row, mask)
                for t in range(x[path].shape[1]):
                    for i, share in shares.items():
                        if path in chosen[i].factors:
                            part = chosen[i].factors[path]
                            y[row, t] = y[row, t] + share * (part.B @ (part.A @ x[path][row, t]))
            outputs[path] = y
    return outputs


def balance_by_hand(router: Router, granularity: str, x: dict[str, Tensor]) -> Tensor:
    """Eqs. 14-16, less its minimum, over the members of each row."""
    total = torch.zeros((), dtype=torch.float64)
    for row, weights in enumerate(WEIGHTS):
        members = [i for i, w in enumerate(weights) if w]
        for i in members:
            q = [shares_by_hand(router, g, m[0], x[m[0]], row, PROMPT)[i] for g, m in GROUPS[granularity].items()]
            total = total - (sum(q) / len(q)).log()
        if members:
            total = total - len(members) * math.log(len(members))
    return total / BATCH


@pytest.mark.parametrize("granularity", GROUPS)
def test_outputs_and_gradients_are_those_of_the_papers_equations_written_out(granularity: str):
    router, x = learned(Mole, granularity=granularity), inputs()
    got, want = run(composed(Mole(router)), x), by_hand(router, granularity, x)
    for path in MODULES:
        assert torch.allclose(got[path], want[path], atol=1e-12)
    mine, theirs = gradients(score(got), router), gradients(score(want), router)
    for name in router.tensors:
        assert torch.allclose(mine[name], theirs[name], atol=1e-10)
        assert theirs[name].any()


@pytest.mark.parametrize("granularity", GROUPS)
def test_the_balancing_loss_and_its_gradient_are_those_of_the_paper_less_the_minimum(granularity: str):
    router, scratch = learned(Mole, granularity=granularity, balance=0.7), {}
    run(composed(Mole(router)), inputs(), scratch=scratch)
    got, want = Mole(router).auxiliary_loss(scratch), 0.7 * balance_by_hand(router, granularity, inputs())
    assert got is not None
    assert torch.allclose(got, want, atol=1e-12)
    mine, theirs = gradients(got, router), gradients(want, router)
    for name in router.tensors:
        assert torch.allclose(mine[name], theirs[name], atol=1e-10)
        assert mine[name].any()  # the released code's is zero: it takes the loss from detached numbers


def test_the_balancing_loss_is_zero_at_balance_and_bounds_the_mean_share_alone():
    even = torch.tensor([[0.25, 0.25, 0.25, 0.25]], dtype=torch.float64)
    everyone = torch.ones(1, 4, dtype=torch.bool)
    composer = Mole(learned(Mole, balance=1.0))
    one_hot = {f"{SHARES}{i}": row[None] for i, row in enumerate(torch.eye(4, dtype=torch.float64))}
    for shares in ({f"{SHARES}0": even}, one_hot):
        assert composer.auxiliary_loss({**shares, MEMBERS: everyone}).item() == pytest.approx(0.0, abs=1e-12)
    lopsided = composer.auxiliary_loss({f"{SHARES}0": torch.tensor([[0.97, 0.01, 0.01, 0.01]]), MEMBERS: everyone})
    assert lopsided.item() == pytest.approx(-math.log(0.97) - 3 * math.log(0.01) - 4 * math.log(4), rel=1e-5)


def test_the_loss_of_a_share_that_underflows_is_finite():
    shares = torch.tensor([[1.0, 0.0]], requires_grad=True)
    loss = Mole(learned(Mole)).auxiliary_loss({f"{SHARES}0": shares, MEMBERS: torch.ones(1, 2, dtype=torch.bool)})
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(shares.grad).all()


def test_masking_gives_the_shares_of_those_left_out_to_the_others_in_proportion():
    router, scratch = learned(Mole, granularity="matrix"), {}
    first, out = [i for i, a in enumerate(adapters()) if Q0 in a.factors][:2]
    e = torch.zeros_like(router.tensors[f"{Q0}.weight"])
    e[:, first] = torch.randn(e[:, first].shape, generator=torch.Generator().manual_seed(1)).double()
    composer = Mole(replace(router, tensors={**router.tensors, f"{Q0}.weight": e}))  # looks at one who stays
    some = [float(i != out) for i in range(4)]
    same = {Q0: inputs()[Q0][:1].expand(2, -1, -1)}
    delta = composed(composer, [[1.0] * 4, some])[Q0]
    delta(same[Q0], GateContext(Q0, scratch=scratch))
    g, masked = scratch[SHARES + Q0]
    assert g.std() > 0.05
    assert masked[out] == 0
    assert torch.allclose(masked, g * torch.tensor(some) / (1 - g[out]), atol=1e-14)


@pytest.mark.parametrize("granularity", GROUPS)
def test_a_group_is_gated_by_its_first_module_and_the_sites_do_not_depend_on_who_shares_a_batch(granularity: str):
    router = Mole.initial(pool(), 0, {"granularity": granularity})
    assert router.settings["sites"] == {group: modules[0] for group, modules in GROUPS[granularity].items()}
    # the two rows differ in who has the site: alone, the second has no gate input, and shares evenly as in the batch
    x, rows = inputs(), [(1.0, 1.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0)]
    attention = [i for i, a in enumerate(adapters()) if Q0 not in a.factors]
    rows[1] = tuple(float(i in attention) for i in range(4))
    beside = run(composed(Mole(noisy(router)), rows), x)
    alone = [a for a in adapters() if Q0 not in a.factors]
    got = run(composed(Mole(noisy(router)), [(0.0,), (1.0,), (0.0,), (0.0,)], alone), x)
    assert torch.allclose(got[UP0][1], beside[UP0][1], atol=1e-12)
    assert got[UP0][1].any()


def test_a_decision_is_made_once_and_kept_for_other_tokens():
    composer, memory = Mole(learned(Mole)), {}
    deltas = composed(composer)
    run(deltas, inputs(), memory=memory)
    kept = {key: value.clone() for key, value in memory.items()}
    later = {path: 5 * x.flip(1) for path, x in inputs().items()}
    got = run(deltas, later, memory=memory)
    assert kept.keys() == memory.keys() == {"mole.model.layers.0", "mole.model.layers.1"}
    assert all(torch.equal(kept[key], memory[key]) for key in kept)
    assert not torch.allclose(got[UP0], run(deltas, later)[UP0], atol=1e-3)


def test_a_module_that_runs_before_its_site_is_an_error_that_says_so():
    deltas = composed(Mole(learned(Mole)))
    with pytest.raises(ValueError, match=f"because {Q0}, which decides it, has not run yet"):
        run({K0: deltas[K0]}, inputs())


def test_dropping_all_members_is_the_base_and_leaves_no_nan_in_any_gradient():
    router, scratch = learned(Mole), {}
    outputs = run(composed(Mole(router), [[0.0] * 4] * BATCH), inputs(), scratch=scratch)
    assert not any(y.any() for y in outputs.values())
    loss = Mole(router).auxiliary_loss(scratch)
    assert loss == 0
    assert not any(g.any() for g in gradients(score(outputs) + loss, router).values())


def test_the_start_is_nearly_uniform_and_nothing_noted_is_no_loss():
    router, scratch = noisy(Mole.initial(pool(), 0, {}), spread=0.0), {}
    run(composed(Mole(router)), inputs(), scratch=scratch)
    assert (scratch[f"{SHARES}model.layers.0"][0] - 0.25).abs().max() < 0.02
    assert Mole(router).auxiliary_loss({}) is None


def outside() -> Adapter:
    table = replace(factors(2, 1, 30, 6), kind="embedding")
    return Adapter("outside", {"embed": table, "lm_head": factors(1, 2, 6, 30)})


@pytest.mark.parametrize("granularity", ["matrix", "layer", "block"])
def test_embeddings_and_modules_outside_the_layers_keep_their_weights(granularity: str):
    both = [replace(outside(), factors={**outside().factors, Q0: factors(2, 3, 6, 9)})]
    router = noisy(Mole.initial(pool(both), 0, {"granularity": granularity}))
    assert list(router.settings["sites"].values()) == [Q0]
    deltas = composed(Mole(router), [[-0.5]], both)
    assert [path for path, delta in deltas.items() if delta.gate is not None] == [Q0]
    assert torch.equal(deltas["embed"].weights, torch.tensor([[-0.5, -0.5]]).double())
    assert torch.equal(deltas["lm_head"].weights, torch.tensor([[-0.5]]).double())


def test_the_gate_of_the_network_counts_outside_the_layers_and_is_decided_inside():
    late = "decoder.block.0.layer.0.SelfAttention.q"  # of an encoder-decoder, whose head sorts before its decoder
    both = [replace(outside(), factors={**outside().factors, late: factors(2, 3, 6, 9)})]
    router = noisy(Mole.initial(pool(both), 0, {"granularity": "network"}))
    assert router.settings["sites"] == {"network": late}
    head = composed(Mole(router), [[-0.5]], both)["lm_head"]
    shares = head.gate.multipliers(head.weights, {"mole.network": torch.tensor([[0.25]])})
    assert shares.tolist() == [[0.25]]


@pytest.mark.parametrize("granularity", ["matrix", "layer", "block", "network"])
def test_adapters_of_nothing_inside_a_layer_leave_nothing_to_gate(granularity: str):
    with pytest.raises(ValueError, match="adapt no linear module inside a layer: there is nothing to gate"):
        Mole.initial(pool([outside()]), 0, {"granularity": granularity})


@pytest.mark.parametrize(
    ("granularity", "path", "group"),
    [
        ("layer", "encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1.attention"),
        ("layer", "decoder.block.0.layer.2.DenseReluDense.wi", "decoder.block.0.feed_forward"),
        ("layer", "transformer.h.3.attn.c_proj", "transformer.h.3.attention"),
        ("block", "transformer.h.3.mlp.c_proj", "transformer.h.3"),
        ("block", "lm_head", "lm_head"),
        ("network", "lm_head", "network"),
        ("matrix", "transformer.h.3.mlp.c_proj", "transformer.h.3.mlp.c_proj"),
    ],
)
def test_groups_of_real_models(granularity: str, path: str, group: str):
    assert group_of(path, granularity) == group


def test_an_adapter_or_module_it_was_not_trained_for_is_refused_by_name():
    composer = Mole(learned(Mole))
    with pytest.raises(LookupError, match="it knows a"):
        composed(composer, [[1.0]], [Adapter("new", {Q0: factors(2, 99, 6, 9)})])
    wider = replace(adapters()[0], factors={"model.layers.7.mlp.up_proj": factors(1, 3, 6, 8)})
    known = replace(composer.router, adapters=pool([wider]).adapters * 4)
    with pytest.raises(LookupError, match=r"no gate for 'model.layers.7'"):
        composed(Mole(known), [[1.0]], [wider])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"granularity": "row"}, "granularity must be one of matrix, layer, block, network, got 'row'"),
        ({"balance": -1.0}, "balance must be a finite number of at least 0"),
        ({"balanse": 1.0}, "has no setting balanse; it has granularity, balance"),
    ],
)
def test_settings_that_are_none_or_out_of_range_are_refused(settings: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        Mole.initial(pool(), 0, settings)


def test_it_cannot_be_merged():
    with pytest.raises(ValueError, match="gates the ranks by prompt"):
        compose(adapters(), composer=Mole(learned(Mole)))
