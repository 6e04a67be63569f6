"""Every form of a delta gives the same numbers, in models, with padding and beams."""

from __future__ import annotations

from typing import Any, get_args
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from loracompose.composers import COMPOSERS
from loracompose.composers.base import Composer
from loracompose.composers.mixture import Mixture
from loracompose.runtime import assembly
from loracompose.runtime.attach import attach
from loracompose.runtime.plan import Wanted
from tests import laws, tiny
from tests.laws import BASES, BATCH, ROUNDING, ROWS
from tests.runtime.toy import random_delta

DEFAULTS = [pytest.param(ROWS[name].settings[0], id=name) for name in COMPOSERS]
STATIC = [pytest.param(ROWS[name].settings[0], id=name) for name, kind in COMPOSERS.items() if kind.scope == "static"]
EVERY: tuple[Wanted, ...] = get_args(Wanted)
ONE_BY_ONE = mock.patch.object(assembly, "share_input", lambda kinds: [(path,) for path in kinds])


def mixed(on: str, rows: int = len(BATCH), composer: Composer | None = None) -> Any:
    return laws.compose_rows(composer or Mixture(), laws.hostile_adapters(on), BATCH[:rows])


@pytest.mark.parametrize("composer", STATIC)
@pytest.mark.parametrize("on", BASES)
def test_a_mixed_batch_is_the_same_in_every_form(composer: Composer, on: str):
    deltas = mixed(on, composer=composer)
    with ONE_BY_ONE:
        want = laws.logits(laws.base(on), deltas, on, batch=14, form="shared")  # two rows a composition
    for form in ("auto", "shared", "gathered"):
        assert laws.distance(laws.logits(laws.base(on), deltas, on, batch=14, form=form), want) < ROUNDING[on], form
    assert laws.distance(tiny.logits(laws.base(on), on, batch=14, seq=6), want) > 1e-3


@pytest.mark.parametrize("composer", STATIC)
@pytest.mark.parametrize("on", BASES)
def test_rows_of_one_composition_are_the_same_in_every_form(composer: Composer, on: str):
    deltas = laws.compose_rows(composer, laws.hostile_adapters(on), [BATCH[3]] * 2)
    want = laws.logits(laws.base(on), deltas, on, form="shared")
    for form in EVERY:
        assert laws.distance(laws.logits(laws.base(on), deltas, on, form=form), want) < ROUNDING[on], form


@pytest.mark.parametrize("on", BASES)
def test_padded_prompts_and_beams_are_the_same_in_every_form(on: str):
    same = laws.compose_rows(Mixture(), laws.hostile_adapters(on), [BATCH[3]] * 5)
    for deltas, forms in ((mixed(on, 5), EVERY[:3]), (same, EVERY)):
        told = [beams(on, deltas, form) for form in forms]
        assert all(torch.equal(sequences, told[0][0]) for sequences, _ in told)
        assert all(laws.distance(scores, told[0][1]) < laws.GENERATED for _, scores in told)


def beams(on: str, deltas: Any, form: Wanted) -> tuple[Tensor, Tensor]:
    out = laws.generate(on, laws.padded(laws.prompts()[:5]), deltas, form=form, num_beams=3)
    return out.sequences, out.sequences_scores


@pytest.mark.parametrize("composer", DEFAULTS)
@pytest.mark.parametrize("on", BASES)
def test_modules_that_share_a_product_of_A_give_what_they_give_alone(composer: Composer, on: str):
    deltas = mixed(on, 4, composer)
    with mock.patch.object(assembly, "share_input", wraps=assembly.share_input) as shared:
        together = laws.logits(laws.base(on), deltas, on, batch=4)
    kinds = shared.call_args.args[0]
    groups = [group for group in assembly.share_input(kinds) if len(group) > 1]
    assert on == "gpt2" or groups  # GPT-2 has no siblings that read one input
    with ONE_BY_ONE:
        alone = laws.logits(laws.base(on), deltas, on, batch=4)
    assert laws.distance(together, alone) < ROUNDING[on]


@pytest.mark.parametrize("form", ["shared", "gathered"])
def test_a_pass_with_gradients_may_follow_one_in_inference_mode(form):
    module = nn.Linear(12, 9).double()
    deltas = {"0": random_delta(weights=torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1, 2, 0]]).double())}
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    with attach(nn.Sequential(module), deltas, form=form):
        with torch.inference_mode():
            first = module(x)
        second = module(x.requires_grad_())
        second.sum().backward()
    assert torch.allclose(first, second.detach(), rtol=0, atol=1e-12)  # another form where gradients flow
    assert x.grad is not None
