"""The batcher: what waits runs together if it may, a failure takes nobody with it, who has gone is not answered."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError

import pytest

import loracompose.serving.batcher as module
from loracompose.serving.batcher import Batcher, BusyError, Job, Together
from loracompose.serving.steps import cut, cut_pieces
from tests.engines import build_engine

PATIENCE = 20.0
PROMPTS = ["the french for a dog", "count every user in one query", "is it a positive review", "add two and six"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with build_engine(tmp_path_factory.mktemp("batcher")) as engine:
        yield engine


class Batches:
    """What ran together; the first batch waits until it is let go."""

    def __init__(self, monkeypatch, engine):
        self.seen: list[list[Job]] = []
        self.began, self.go = threading.Event(), threading.Event()
        self._answer = module.answer
        monkeypatch.setattr(module, "answer", self)

    def __call__(self, engine, jobs):
        self.seen.append(list(jobs))
        if len(self.seen) == 1:
            self.began.set()
            assert self.go.wait(PATIENCE)
        return self._answer(engine, jobs)

    def prompts(self):
        return [[job.prompt for job in jobs] for jobs in self.seen]


@pytest.fixture
def batches(monkeypatch, engine):
    return Batches(monkeypatch, engine)


def test_what_arrives_while_a_batch_runs_forms_the_next_with_what_it_may_run_with(engine, batches):
    greedy, sampled = Together(), Together(decoding=(("do_sample", True),))
    with Batcher(engine, max_batch=3, window=0) as batcher:
        futures = [batcher.submit(Job(PROMPTS[0], 2))]
        assert batches.began.wait(PATIENCE)
        for i, together in enumerate((greedy, sampled, greedy, greedy, greedy, sampled)):
            futures.append(batcher.submit(Job(f"{PROMPTS[1]} {i}", 2, together)))
        assert batcher.counts.waiting == 6
        batches.go.set()
        answers = [future.result(PATIENCE) for future in futures]
        counts = batcher.counts
    names = [[prompt.removeprefix(PROMPTS[1] + " ") for prompt in own] for own in batches.prompts()[1:]]
    assert names == [["0", "2", "3"], ["1", "5"], ["4"]]
    assert [answer.prompt for answer in answers[1:]] == [f"{PROMPTS[1]} {i}" for i in range(6)]
    assert (counts.batches, counts.answered, counts.failed, counts.waiting) == (4, 7, 0, 0)


def test_answers_are_those_of_one_prompt_alone(engine):
    with Batcher(engine, window=0.2) as batcher:
        futures = [batcher.submit(Job(prompt, 3 + i)) for i, prompt in enumerate(PROMPTS)]
        found = [future.result(PATIENCE) for future in futures]
        assert batcher.counts.batches == 1
    for i, (prompt, own) in enumerate(zip(PROMPTS, found, strict=True)):
        (alone,) = engine.generate([prompt], max_new_tokens=3 + i)
        assert own.text == alone.text
        assert own.new_tokens == alone.new_tokens


def test_requests_with_a_seed_run_alone(engine, batches):
    seeded = Together(decoding=(("do_sample", True),), seed=1)
    with Batcher(engine, window=0) as batcher:
        futures = [batcher.submit(Job(PROMPTS[0], 2))]
        assert batches.began.wait(PATIENCE)
        futures += [batcher.submit(Job(prompt, 2, seeded)) for prompt in PROMPTS[:2]]
        batches.go.set()
        for future in futures:
            future.result(PATIENCE)
    assert [len(jobs) for jobs in batches.seen] == [1, 1, 1]


def test_a_failure_takes_nobody_with_it(engine):
    jobs = [Job(PROMPTS[0], 2, Together(by_hand=True), {name: 1.0}) for name in ("sql", "gone", "sums")]
    with Batcher(engine, window=0.2) as batcher:
        good, bad, other = [batcher.submit(job) for job in jobs]
        assert good.result(PATIENCE).adapters[0].name == "sql"
        assert other.result(PATIENCE).adapters[0].name == "sums"
        with pytest.raises(LookupError, match="no adapter 'gone'"):
            bad.result(PATIENCE)
        assert (batcher.counts.answered, batcher.counts.failed) == (2, 1)


def test_who_has_gone_is_not_answered(engine, batches):
    with Batcher(engine, window=0) as batcher:
        first = batcher.submit(Job(PROMPTS[0], 2))
        assert batches.began.wait(PATIENCE)
        gone, stays = (batcher.submit(Job(prompt, 2)) for prompt in PROMPTS[1:3])
        assert gone.cancel()
        batches.go.set()
        first.result(PATIENCE)
        assert stays.result(PATIENCE).prompt == PROMPTS[2]
        assert batcher.counts.dropped == 1
        with pytest.raises(CancelledError):
            gone.result(PATIENCE)
    assert batches.prompts() == [[PROMPTS[0]], [PROMPTS[2]]]


def test_more_than_may_wait_are_refused_and_closing_fails_who_waits(engine, batches):
    with Batcher(engine, window=0, max_waiting=1) as batcher:
        first = batcher.submit(Job(PROMPTS[0], 2))
        assert batches.began.wait(PATIENCE)
        waits = batcher.submit(Job(PROMPTS[1], 2))
        with pytest.raises(BusyError, match="1 requests wait already"):
            batcher.submit(Job(PROMPTS[2], 2))
        closing = threading.Thread(target=batcher.__exit__, args=(None, None, None))
        closing.start()
        with pytest.raises(BusyError, match="shutting down"):
            waits.result(PATIENCE)
        batches.go.set()
        closing.join(PATIENCE)
        assert first.result(PATIENCE).text is not None  # what ran was let end
        with pytest.raises(BusyError, match="shutting down"):
            batcher.submit(Job(PROMPTS[2], 2))


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"window": -1}, {"max_waiting": 0}])
def test_numbers_out_of_range_are_refused(engine, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least"):
        Batcher(engine, **bad)


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [], ("one two three", False)),
        ("one two three", ["two"], ("one ", True)),
        ("one two three", ["three", "two"], ("one ", True)),
        ("one two three", ["four"], ("one two three", False)),
        ("two", ["two"], ("", True)),
        ("a#b##c", ["##"], ("a#b", True)),
    ],
)
def test_a_text_is_cut_at_the_first_stop_whatever_pieces_it_comes_in(text, stops, expected):
    assert cut(text, stops) == expected
    for size in range(1, len(text) + 1):
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        assert "".join(cut_pieces(pieces, stops)) == expected[0]
        if not stops:
            assert list(cut_pieces(pieces, stops)) == pieces  # nothing is held back
