from __future__ import annotations

import importlib.util
import threading
import time
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from loracompose.composers.lorahub import LoraHub
from loracompose.composition.bank import gather_banks
from loracompose.runtime.attach import attach, model_lock
from loracompose.training import lorahub
from loracompose.training.data import Example, encode_example
from loracompose.training.lorahub import fit_lorahub, mean_loss, minimise
from tests import laws
from tests.training.tiny_base import tokenizer

EXAMPLES = [Example("say a", "a a a"), Example("say b twice, please", "b b"), Example("c?", "cc")]


def pool(on: str = "llama"):
    return [laws.random_adapter(f"a{i}", on, seed=i + 1, rank=i + 1) for i in range(3)]


def loss_at(learned: LoraHub | None, adapters, on: str = "llama") -> float:
    encoded = [encode_example(tokenizer(), example) for example in EXAMPLES]
    weights = torch.full((1, len(adapters)), 0.0 if learned is None else 1.0, dtype=torch.float64)
    with torch.no_grad(), attach(laws.base(on), (learned or LoraHub()).compose(gather_banks(adapters), weights)):
        return mean_loss(laws.base(on), [encoded[:1], encoded[1:]], pad_id=0)


@pytest.mark.parametrize("on", ["llama", "t5"])
@pytest.mark.parametrize("exact_sum", [False, True])
def test_fitted_weights_make_the_responses_likelier_than_the_base_model_does(on: str, exact_sum: bool):
    adapters = pool(on)
    fitted = fit_lorahub(
        laws.base(on), tokenizer(), adapters, EXAMPLES, budget=12, l1=0.0, exact_sum=exact_sum, batch_size=2
    )
    assert fitted.exact_sum == exact_sum
    assert {key for key, _ in fitted.learned} == {adapter.fingerprint for adapter in adapters}
    assert loss_at(fitted, adapters, on) < loss_at(None, adapters, on) - 1e-3


def test_a_seed_gives_the_same_weights_in_any_order_of_adapters_and_touches_no_global_random_state():
    adapters, state, torch_state = pool(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    one, other = (
        fit_lorahub(laws.base("llama"), tokenizer(), given, EXAMPLES, budget=12, l1=0.0, seed=3)
        for given in (adapters, adapters[::-1])
    )
    assert one == other
    assert any(weight for _, weight in one.learned)
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), torch_state)


def test_the_penalty_keeps_weights_at_zero_when_they_do_not_pay():
    fitted = fit_lorahub(laws.base("llama"), tokenizer(), pool(), EXAMPLES, budget=6, l1=1e6)
    assert [weight for _, weight in fitted.learned] == [0.0, 0.0, 0.0]


def bowl(calls: list[Sequence[float]], centre: float):
    def objective(weights: Sequence[float]) -> float:
        calls.append(weights)
        return sum((w - centre) ** 2 for w in weights)

    return objective


def test_the_search_begins_at_zero_stays_in_its_budget_and_box_and_reports_its_progress():
    calls, progress = [], []
    best = minimise(bowl(calls, 0.4), 3, budget=40, bounds=1.5, seed=0, progress=lambda *p: progress.append(p))
    assert calls[0] == [0.0, 0.0, 0.0]
    assert len(calls) == 40
    assert best == pytest.approx([0.4] * 3, abs=0.05)
    assert [step for step, _ in progress] == list(range(2, 41))
    assert [low for _, low in progress] == sorted((low for _, low in progress), reverse=True)
    calls.clear()
    best = minimise(bowl(calls, 9.0), 3, budget=40, bounds=1.5, seed=0)
    assert best == pytest.approx([1.5] * 3, abs=0.1)
    assert max(max(map(abs, point)) for point in calls) <= 1.5


def test_the_best_point_tried_is_returned_even_if_it_is_the_first():
    assert minimise(bowl([], 0.0), 4, budget=10, bounds=1.5, seed=1) == [0.0] * 4


def test_an_error_in_the_objective_ends_the_thread_of_the_solver():
    calls: list[int] = []

    def fails(weights: Sequence[float]) -> float:
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of memory")
        return 1.0

    before = threading.active_count()
    with pytest.raises(RuntimeError, match="out of memory") as error:
        minimise(fails, 3, budget=40, bounds=1.5, seed=0)
    deadline = time.monotonic() + 5
    while threading.active_count() > before and time.monotonic() < deadline:
        threading.Event().wait(0.01)
    assert threading.active_count() == before
    assert error.tb is not None  # the traceback is alive, and does not keep the solver


def test_it_waits_for_the_model_where_somebody_else_has_it(monkeypatch: pytest.MonkeyPatch):
    model, asked, evaluated = laws.base("llama"), threading.Event(), threading.Event()

    def watched(objective, *given, **options):
        def first_asked(weights: Sequence[float]) -> float:
            asked.set()
            return objective(weights)

        return minimise(first_asked, *given, **options)

    def noted(*given) -> float:
        evaluated.set()
        return mean_loss(*given)

    monkeypatch.setattr(lorahub, "minimise", watched)
    monkeypatch.setattr(lorahub, "mean_loss", noted)
    fit = threading.Thread(target=fit_lorahub, args=(model, tokenizer(), pool(), EXAMPLES), kwargs={"budget": 6})
    with model_lock(model):
        fit.start()
        assert asked.wait(60)
        assert not evaluated.wait(0.5)
        assert not any(module._forward_hooks for module in model.modules())
    fit.join(60)
    assert evaluated.is_set()
    assert not model_lock(model).locked()


def test_without_nevergrad_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "loracompose\[lorahub\]"'):
        fit_lorahub(laws.base("llama"), tokenizer(), pool(), EXAMPLES, budget=2)


def test_what_cannot_be_fitted_is_refused():
    model, adapters = laws.base("llama"), pool()
    with pytest.raises(ValueError, match="got 0 and 3"):
        fit_lorahub(model, tokenizer(), [], EXAMPLES)
    with pytest.raises(ValueError, match="got 3 and 0"):
        fit_lorahub(model, tokenizer(), adapters, [])
    with pytest.raises(ValueError, match="stands twice"):
        fit_lorahub(model, tokenizer(), [*adapters, adapters[0]], EXAMPLES)
    with pytest.raises(ValueError, match="budget must be at least 1"):
        fit_lorahub(model, tokenizer(), adapters, EXAMPLES, budget=0)
    model.train()
    try:
        with pytest.raises(ValueError, match="training mode"):
            fit_lorahub(model, tokenizer(), adapters, EXAMPLES)
    finally:
        model.eval()
