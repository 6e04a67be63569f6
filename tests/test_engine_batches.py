"""The engine over many prompts: batches, budgets, the next batch prepared ahead, compositions kept."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

import loracompose.engine as module
from loracompose import load_adapter
from loracompose.composers import Lego
from tests.engines import build_engine

LENGTHS = [3, 30, 8, 8, 21, 8, 5, 30, 2]
PROMPTS = ["x" * length for length in LENGTHS]
NAMES = ["french", "sql", "mood", "sums"]
SETS = [[NAMES[i % 4], NAMES[(i + 1) % 4]] for i in range(len(PROMPTS))]
SHORT = {"adapters": SETS, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return build_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def shapes(engine, monkeypatch):
    """(rows, padded length) of every call of the model's generate."""
    seen = []
    generate = engine.base.model.generate

    def counted(**kwargs):
        seen.append(tuple(kwargs["input_ids"].shape))
        return generate(**kwargs)

    monkeypatch.setattr(engine.base.model, "generate", counted)
    return seen


def texts(answers):
    return [answer.text for answer in answers]


@pytest.mark.parametrize("composer", ["mixture", "lego"])
@pytest.mark.parametrize("how", [{"batch_size": 2}, {"batch_tokens": 60}, {"batch_size": 2, "overlap": True}])
def test_neither_batches_nor_overlap_change_an_answer_or_its_place(engine, how, composer):
    want = engine.generate(PROMPTS, composer=composer, **SHORT)
    got = engine.generate(PROMPTS, composer=composer, **SHORT, **how)
    assert texts(got) == texts(want)
    assert [answer.prompt for answer in got] == PROMPTS


def test_prompts_of_like_length_share_a_batch(engine, shapes):
    engine.generate(PROMPTS, **SHORT, batch_size=3)
    assert shapes == [(3, 30), (3, 8), (3, 5)]


def test_one_batch_keeps_the_order_given(engine, monkeypatch):
    seen = []
    decode = module.answer
    monkeypatch.setattr(module, "answer", lambda base, r, s: seen.append(list(r.prompts)) or decode(base, r, s))
    engine.generate(PROMPTS, **SHORT, batch_size=len(PROMPTS))
    assert seen == [PROMPTS]


def test_a_budget_of_tokens_bounds_rows_times_prompt_and_answer(engine, shapes):
    engine.generate(PROMPTS, **SHORT, batch_tokens=70)
    assert all(rows * (length + 4) <= 70 for rows, length in shapes)
    assert sum(rows for rows, _ in shapes) == len(PROMPTS)
    del shapes[:]
    engine.generate(PROMPTS, **SHORT, batch_tokens=70, num_beams=2)
    assert all(2 * rows * (length + 4) <= 70 for rows, length in shapes)
    with pytest.raises(ValueError, match="prompt 7 is empty"):
        engine.generate([*PROMPTS[:7], "", "x"], **SHORT, batch_size=2)


def test_what_is_sampled_is_decided_by_the_seed_with_overlap_and_without(engine):
    def sample(seed, **how):
        torch.manual_seed(seed)
        return texts(engine.generate(PROMPTS, **SHORT, batch_size=2, do_sample=True, composer="dare", **how))

    assert sample(1) == sample(1, overlap=True)
    assert sample(1) != sample(2)


def test_the_next_batch_is_prepared_while_one_generates(engine, monkeypatch):
    prepared = threading.Semaphore(0)
    prepare, answer = module.prepare, module.answer

    def preparing(*args):
        request = prepare(*args)
        prepared.release()
        return request

    def answering(base, request, settings):
        if request.prompts[0] != PROMPTS[1]:  # the first batch holds the longest
            return answer(base, request, settings)
        assert prepared.acquire(timeout=20), "its own"
        assert prepared.acquire(timeout=20), "the next one was not prepared while the first generated"
        return answer(base, request, settings)

    monkeypatch.setattr(module, "prepare", preparing)
    monkeypatch.setattr(module, "answer", answering)
    assert len(engine.generate(PROMPTS, **SHORT, batch_size=5, overlap=True)) == len(PROMPTS)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_in_a_later_batch_reaches_the_caller_and_leaves_nothing_behind(engine, overlap):
    sets = [*SETS[:-1], ["nobody"]]
    with pytest.raises(LookupError, match="nobody"):
        engine.generate(PROMPTS, adapters=sets, max_new_tokens=2, batch_size=2, overlap=overlap)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]
    assert not any(part._forward_hooks for part in engine.base.model.modules())


def test_an_interruption_stops_the_thread_and_frees_the_model(engine, monkeypatch):
    def interrupted(**kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(engine.base.model, "generate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS, **SHORT, batch_size=2, overlap=True)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]
    assert len(engine.generate(PROMPTS, **SHORT)) == len(PROMPTS)


def test_all_prompts_are_searched_in_one_call(engine, monkeypatch):
    calls = []
    search = type(engine.index).search
    monkeypatch.setattr(
        type(engine.index),
        "search",
        lambda self, texts, *a, **k: calls.append(len(texts)) or search(self, texts, *a, **k),
    )
    engine.generate(["say bonjour", "add two and nine", "mood: dull"], max_new_tokens=1, batch_size=1)
    assert calls == [3]


def test_a_composition_is_kept_and_the_trace_says_so(tmp_path):
    engine = build_engine(tmp_path, composer="lego")
    first = engine.generate(PROMPTS[:3], adapters=[["sql", "mood"], ["sql", "mood"], []], max_new_tokens=4)
    again = engine.generate(PROMPTS[:3], adapters=[{"mood": 0.5, "sql": 0.5}, ["sql"], []], max_new_tokens=4)
    assert [answer.from_cache for answer in first] == [False, False, False]
    assert [answer.from_cache for answer in again] == [True, False, False]
    assert texts(again)[0] == texts(first)[0]
    assert (engine.cache.stats.misses, engine.cache.stats.hits) == (2, 1)
    assert again[0].as_dict()["from_cache"] is True
    assert engine.generate(PROMPTS[:1], adapters=[["sql", "mood"]], composer=Lego(k=1), max_new_tokens=1)[0] is not None
    assert engine.cache.stats.misses == 3
    engine.close()
    assert engine.cache.stats.entries == 0


def test_an_engine_without_room_composes_anew_to_the_same_answers(tmp_path):
    engine = build_engine(tmp_path, composer="ties", cache_bytes=0, store_bytes=1)
    first, again = (engine.generate(PROMPTS[:2], adapters=SETS[:2], max_new_tokens=4) for _ in range(2))
    assert texts(first) == texts(again)
    assert not any(answer.from_cache for answer in again)
    assert engine.cache.stats.bytes == engine.store.stats.bytes == 0


def test_an_adapter_object_is_not_taken_for_another_of_its_fingerprint(tmp_path):
    engine = build_engine(tmp_path, composer="lego")
    mood = load_adapter(engine.index.path("mood"))
    turned = replace(mood, factors={m: replace(f, B=-f.B) for m, f in mood.factors.items()}, known_fingerprint="x")
    sets = [[replace(mood, known_fingerprint="x")], [turned]]
    a, b = (engine.generate(["x y"], adapters=[one], max_new_tokens=8)[0] for one in sets)
    assert a.text != b.text
    assert engine.cache.stats.misses == 0


def test_retrieved_weights_are_rounded_for_composers_whose_work_is_kept_and_the_trace_has_those(tmp_path):
    engine = build_engine(tmp_path)
    engine.retriever = replace(engine.retriever, weighting="softmax", temperature=0.5)
    plain, kept = (engine.generate(["say sum"], composer=c, max_new_tokens=1)[0] for c in ("mixture", "lego"))
    steps = [use.weight * 256 for use in kept.adapters]
    assert max(abs(use.weight - own.weight) for use, own in zip(kept.adapters, plain.adapters, strict=True)) < 1 / 128
    assert sum(use.weight for use in kept.adapters) == pytest.approx(1)
    assert [use.weight for use in plain.adapters] != [use.weight for use in kept.adapters]
    assert len({round(step / min(s for s in steps if s), 6) for step in steps}) > 1
