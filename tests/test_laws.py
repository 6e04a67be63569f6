"""Every composer in COMPOSERS keeps every law that applies to it, and fails where its row names a negative control."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loracompose.adapters.checkpoint import load_adapter
from loracompose.adapters.lora import Adapter
from loracompose.composers import COMPOSERS
from loracompose.composers.base import Composer
from loracompose.composers.mixture import Mixture
from loracompose.runtime.attach import attach
from tests import laws, tiny
from tests.laws import BASES, BATCH, ROUNDING, ROWS, Case, Row

SETTINGS = [
    pytest.param(setting, id=repr(setting)) for name in COMPOSERS if name in ROWS for setting in ROWS[name].settings
]
DEFAULTS = [pytest.param(ROWS[name].settings[0], id=name) for name in COMPOSERS if name in ROWS]


def test_every_composer_has_a_row_that_begins_with_its_default_setting():
    assert set(ROWS) == set(COMPOSERS)
    for name, row in ROWS.items():
        router = getattr(row.settings[0], "router", None)  # a composer that learns has no default for it
        assert row.settings[0] == (COMPOSERS[name]() if router is None else COMPOSERS[name](router))
        assert {type(setting) for setting in row.settings} == {COMPOSERS[name]}


@pytest.mark.parametrize("name", COMPOSERS)
def test_every_law_of_a_row_has_a_setting_or_a_reason(name: str):
    row = ROWS[name]
    for law in ("weighted_sum", "no_weighted_sum"):
        if getattr(row, law) is None and not (law == "no_weighted_sum" and row.weighted_sum is None):
            assert row.does_not_apply.get(law), f"{name}: neither a setting nor a reason for {law}"
    assert not COMPOSERS[name].exact or row.weighted_sum is not None


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("composer", DEFAULTS)
@pytest.mark.parametrize("on", BASES)
def test_hooks_are_gone_and_weights_are_bit_equal_after_success_and_after_an_exception(composer: Composer, on: str):
    model = laws.base(on)
    deltas = laws.compose_rows(composer, laws.hostile_adapters(on), BATCH[:2])
    before, plain = {k: v.clone() for k, v in model.state_dict().items()}, tiny.logits(model, on, batch=2, seq=6)
    targets = [model.get_submodule(path) for path in deltas]
    assert hooks_of(model) == 0

    with attach(model, deltas):
        assert all(len(target._forward_hooks) == 1 for target in targets)
        changed = tiny.logits(model, on, batch=2, seq=6)
    with pytest.raises(RuntimeError, match="inside"), attach(model, deltas):
        raise RuntimeError("inside")
    with pytest.raises(ValueError, match="multiple"), attach(model, deltas):
        tiny.logits(model, on, batch=3, seq=6)  # raised by a hook while the model runs

    assert not torch.equal(changed, plain)
    assert not any(target._forward_hooks or target._forward_pre_hooks for target in targets)
    assert hooks_of(model) == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(tiny.logits(model, on, batch=2, seq=6), plain)


@pytest.mark.parametrize("composer", SETTINGS)
@pytest.mark.parametrize("on", BASES)
def test_zero_weights_are_the_base_to_the_last_bit(composer: Composer, on: str):
    adapters, model = laws.hostile_adapters(on), laws.base(on)
    plain = tiny.logits(model, on, batch=2, seq=6)
    nothing = laws.compose_rows(composer, adapters, [[0.0] * 6, [0.0] * 6])
    assert torch.equal(laws.logits(model, nothing, on), plain)
    beside = laws.compose_rows(composer, adapters, [[0.0] * 6, BATCH[0]])
    got = laws.logits(model, beside, on)
    assert torch.equal(got[0], plain[0])
    assert not torch.equal(got[1], plain[1])


@pytest.mark.parametrize("on", BASES)
def test_every_embedding_of_the_hostile_adapters_changes_the_logits_by_itself(on: str):
    words, plain = laws.hostile_adapters(on)[-1], tiny.logits(laws.base(on), on, batch=2, seq=6)
    embeddings = {path: f for path, f in words.factors.items() if f.kind == "embedding"}
    assert len(embeddings) == (2 if on == "t5" else 1)  # one each of encoder and decoder
    for path, factors in embeddings.items():
        alone = replace(words, factors={path: factors}, known_fingerprint=None)
        assert laws.distance(laws.composed_logits(Mixture(), [alone], [1.0], on), plain) > 1e-3


@pytest.mark.parametrize("composer", SETTINGS)
@pytest.mark.parametrize("order", [(5, 4, 3, 2, 1, 0), (4, 2, 0, 5, 1, 3)], ids=str)
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_the_order_of_the_adapters_is_irrelevant(composer: Composer, order: tuple[int, ...], on: str):
    assert laws.order_error(composer, order, on) < ROUNDING[on]


@pytest.mark.parametrize("composer", SETTINGS)
def test_a_batch_equals_its_prompts_one_by_one(composer: Composer):
    batch_equals_rows(composer, "llama", rows=len(BATCH))


@pytest.mark.parametrize("composer", DEFAULTS)
@pytest.mark.parametrize("on", ["gpt2", "t5"])
def test_a_batch_equals_its_prompts_one_by_one_on_other_architectures(composer: Composer, on: str):
    batch_equals_rows(composer, on, rows=4)


def batch_equals_rows(composer: Composer, on: str, *, rows: int) -> None:
    adapters, prompts = laws.hostile_adapters(on), laws.prompts()[:rows]
    batch = laws.compose_rows(composer, adapters, BATCH[:rows])
    greedy = laws.generate(on, laws.padded(prompts), batch)
    beams = laws.generate(on, laws.padded(prompts), batch, num_beams=3, num_return_sequences=2)
    for i, prompt in enumerate(prompts):
        alone = laws.compose_rows(composer, adapters, BATCH[i : i + 1])
        one = laws.generate(on, laws.padded([prompt]), alone)
        assert torch.equal(greedy.sequences[i, -laws.NEW :], one.sequences[0, -laws.NEW :])
        assert laws.distance(thought(greedy)[i], thought(one)[0]) < laws.GENERATED
        two = laws.generate(on, laws.padded([prompt]), alone, num_beams=3, num_return_sequences=2)
        assert torch.equal(beams.sequences[2 * i : 2 * i + 2, -laws.NEW :], two.sequences[:, -laws.NEW :])
        assert laws.distance(beams.sequences_scores[2 * i : 2 * i + 2], two.sequences_scores) < laws.GENERATED


def thought(generated: Any) -> Tensor:
    """Logits of every new token, (batch, new, vocabulary)."""
    return torch.stack(generated.logits, dim=1)


@pytest.mark.parametrize("composer", SETTINGS)
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_a_member_of_weight_0_has_no_effect_even_if_100_times_larger(composer: Composer, on: str):
    assert laws.stranger_error(composer, on) < ROUNDING[on]


@pytest.mark.parametrize("composer", DEFAULTS)
@pytest.mark.parametrize("on", ["llama", "gpt2"])
def test_gauge_invariance_holds_where_declared_and_fails_where_denied(composer: Composer, on: str):
    error = laws.gauge_error(composer, on)
    assert error < ROUNDING[on] if composer.gauge_invariant else error > 1e-3


@pytest.mark.parametrize("composer", SETTINGS)
@pytest.mark.parametrize("on", BASES)
def test_prefill_and_decoding_with_the_cache_equal_one_full_pass(composer: Composer, on: str):
    assert laws.cache_error(composer, on) < ROUNDING[on]


@pytest.fixture(scope="module")
def through_peft(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Adapter, nn.Module]]:
    """One adapter per base, as we load it and as PEFT runs it."""
    found = {}
    for on in BASES:
        settings = {"base": on, "dtype": torch.float64, "target_modules": tiny.ALL_TARGETS[on]}
        folder, _ = tiny.peft_adapter(tmp_path_factory.mktemp(on), **settings)
        found[on] = load_adapter(folder), tiny.peft_load(folder, base=on, dtype=torch.float64)
    return found


@pytest.mark.parametrize("on", BASES)
@pytest.mark.parametrize("name", COMPOSERS)
def test_one_adapter_of_weight_1_is_that_adapter_through_peft(name: str, on: str, through_peft: Any):
    assert laws.identity_error(ROWS[name].identity, on, *through_peft[on]) < ROUNDING[on]


@pytest.mark.parametrize("name", COMPOSERS)
def test_at_a_tight_setting_one_adapter_is_not_itself(name: str, through_peft: Any):
    assert laws.identity_error(ROWS[name].no_identity, "llama", *through_peft["llama"]) > 1e-3


def cases(law: str) -> list[Any]:
    return [pytest.param(getattr(row, law), id=name) for name, row in ROWS.items() if getattr(row, law) is not None]


@pytest.mark.parametrize("case", cases("weighted_sum"))
@pytest.mark.parametrize("on", BASES)
def test_a_roomy_budget_equals_the_exact_weighted_sum(case: Case, on: str):
    assert laws.weighted_sum_error(case, on) < ROUNDING[on]


@pytest.mark.parametrize("case", cases("no_weighted_sum"))
def test_a_tight_budget_does_not_equal_the_weighted_sum(case: Case):
    assert laws.weighted_sum_error(case) > 1e-3


def test_a_composer_without_a_row_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(ROWS, "mixture")
    with pytest.raises(AssertionError):
        test_every_composer_has_a_row_that_begins_with_its_default_setting()


def test_a_row_without_setting_and_reason_would_be_noticed(monkeypatch: pytest.MonkeyPatch):
    bare = Row(ROWS["selection"].settings, ROWS["selection"].identity, ROWS["selection"].no_identity)
    monkeypatch.setitem(ROWS, "selection", bare)
    with pytest.raises(AssertionError, match="neither a setting nor a reason"):
        test_every_law_of_a_row_has_a_setting_or_a_reason("selection")
