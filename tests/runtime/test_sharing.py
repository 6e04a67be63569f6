from __future__ import annotations

import gc
import weakref
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.attach import attach
from loracompose.runtime.sharing import OpenProduct, SharedInput, share_input
from tests.runtime.toy import Recorder, random_delta

WIDTHS = {"q_proj": 9, "k_proj": 4, "v_proj": 4}


class Attention(nn.Module):
    """Three projections, called in the order and with the inputs that a test says."""

    def __init__(self) -> None:
        super().__init__()
        for seed, (name, width) in enumerate(WIDTHS.items()):
            torch.manual_seed(seed)
            setattr(self, name, nn.Linear(12, width, bias=False, dtype=torch.float64))

    def forward(self, calls: list[tuple[str, Tensor]]) -> list[Tensor]:
        return [getattr(self, name)(x) for name, x in calls]


def deltas(*names: str, gated: bool = False) -> dict[str, LowRankDelta]:
    found = {}
    for seed, name in enumerate(names or WIDTHS):
        weights = torch.tensor([[1, 0, 2, 0, -1], [0, 3, 0, 0.5, 0]], dtype=torch.float64)
        delta = random_delta(12, WIDTHS[name], weights=weights, seed=seed)
        found[name] = LowRankDelta(delta.A, delta.B, weights, Recorder() if gated else None)
    return found


def inputs(seed: int, seq: int = 3) -> Tensor:
    return torch.randn(2, seq, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected(model: Attention, on: dict[str, LowRankDelta], calls: list[tuple[str, Tensor]]) -> list[Tensor]:
    return [out + (on[name](x) if name in on else 0) for (name, x), out in zip(calls, model(calls), strict=True)]


x, y = inputs(1), inputs(2)
CALLS = {
    "the usual order": [("q_proj", x), ("k_proj", x), ("v_proj", x)],
    "another order": [("v_proj", x), ("q_proj", x), ("k_proj", x)],
    "another tensor last": [("q_proj", x), ("k_proj", x), ("v_proj", y)],
    "another tensor first": [("q_proj", y), ("k_proj", x), ("v_proj", x)],
    "an equal tensor": [("q_proj", x), ("k_proj", x.clone()), ("v_proj", x)],
    "a module twice": [("q_proj", x), ("q_proj", x), ("k_proj", y), ("v_proj", y)],
    "one alone": [("k_proj", x)],
    "two inputs by turns": [("q_proj", x), ("k_proj", y), ("v_proj", x), ("q_proj", y), ("v_proj", y)],
}


@pytest.mark.parametrize("gated", [False, True], ids=["static", "gated"])
@pytest.mark.parametrize("names", [(), ("q_proj", "v_proj"), ("k_proj",)], ids=str)
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_every_module_gains_its_own_product_of_its_own_input(
    calls: list[tuple[str, Tensor]], names: tuple[str, ...], gated: bool
):
    model, on = Attention(), deltas(*names, gated=gated)
    want = expected(model, on, calls)
    with torch.no_grad(), attach(model, on):
        for _ in range(2):
            for got, wanted in zip(model(calls), want, strict=True):
                assert torch.allclose(got, wanted, atol=1e-12)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_buffer_that_is_filled_anew_is_multiplied_anew(mode: Any):
    model, on = Attention(), deltas()
    with mode(), attach(model, on):
        buffer = inputs(1)
        for seed in (1, 2, 3):
            buffer.copy_(inputs(seed))
            names = ("q_proj", "k_proj", "v_proj")[: 4 - seed]  # not all of them take their part
            want = expected(Attention(), on, [(name, buffer) for name in names])
            for got, wanted in zip(model([(name, buffer) for name in names]), want, strict=True):
                assert torch.allclose(got, wanted, atol=1e-12)


def test_a_module_that_runs_again_on_a_buffer_filled_anew_is_not_given_what_it_was_given():
    """Inference tensors do not count their changes."""
    model, on = Attention(), deltas()
    with torch.inference_mode(), attach(model, on):
        buffer = inputs(1)
        model.q_proj(buffer)
        model.k_proj(buffer)
        buffer.copy_(inputs(2))
        got = model.k_proj(buffer)
        want = expected(Attention(), on, [("k_proj", buffer)])[0]
    assert torch.allclose(got, want, atol=1e-12)


def test_a_tensor_changed_between_two_modules_is_multiplied_again():
    model, on, changed = Attention(), deltas(), inputs(1)
    with torch.no_grad(), attach(model, on):
        model.q_proj(changed)
        changed.add_(1)
        got = model.v_proj(changed)
    assert torch.allclose(got, expected(model, on, [("v_proj", changed)])[0], atol=1e-12)


@pytest.mark.parametrize("gated", [False, True], ids=["static", "gated"])
def test_one_product_serves_the_modules_that_read_one_tensor(gated: bool):
    model, calls = Attention(), CALLS["the usual order"]
    computed = []
    true = OpenProduct.keep

    def keep(self: OpenProduct, owner: object, waiting: Any, x: Tensor, product: Any) -> None:
        computed.append(sorted(waiting))
        true(self, owner, waiting, x, product)

    with torch.no_grad(), mock.patch.object(OpenProduct, "keep", keep), attach(model, deltas(gated=gated)):
        model(calls)
        model(calls)
    assert computed == [["k_proj", "v_proj"]] * 2


def test_modules_that_read_different_tensors_stop_sharing():
    calls, compute = CALLS["another tensor last"], mock.Mock(side_effect=lambda x: x)
    slot = OpenProduct()
    shared = SharedInput(WIDTHS, slot, compute)
    for _ in range(3):
        for name, tensor in calls:
            assert shared.product(name, tensor) is None or tensor is x
    assert compute.call_count == 1


@pytest.mark.parametrize("fails", [False, True], ids=["after success", "after an exception"])
def test_nothing_of_a_pass_is_held_after_it(fails: bool):
    model, passing = Attention(), inputs(1)
    gone = weakref.ref(passing)
    with torch.no_grad(), attach(model, deltas()) as attached:
        calls: list[Any] = [("q_proj", passing), *([("nothing", passing)] if fails else [])]
        try:
            model(calls)
        except AttributeError:
            assert fails
        assert attached.product._x is None
        del passing, calls
        gc.collect()
        assert gone() is None


def test_siblings_of_one_width_are_candidates_and_the_last_projection_is_not():
    layer, cross = "model.layers.0.", "decoder.block.1.layer.1.EncDecAttention."
    paths = [layer + f"self_attn.{p}_proj" for p in "vkqo"] + [layer + f"mlp.{p}_proj" for p in ("up", "down", "gate")]
    paths += [cross + p for p in "qkvo"] + ["model.layers.1.self_attn.q_proj", "lm_head"]
    groups = share_input(dict.fromkeys(paths, 12) | {layer + "self_attn.k_proj": 13})
    short = [tuple(path.removeprefix(layer).removeprefix(cross) for path in group) for group in groups]
    assert ("self_attn.q_proj", "self_attn.v_proj") in short
    assert ("mlp.gate_proj", "mlp.up_proj") in short
    assert ("k", "v") in short
    alone = {name for group in short if len(group) == 1 for name in group}
    assert alone == {
        "self_attn.k_proj",  # of another width
        "self_attn.o_proj",
        "mlp.down_proj",
        "model.layers.1.self_attn.q_proj",
        "q",  # reads the decoder, its keys and values the encoder
        "o",
        "lm_head",
    }
