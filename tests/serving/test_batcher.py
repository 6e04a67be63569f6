"""The batcher: what waits runs together if it may, a failure takes nobody with it, who has gone is not answered."""

from __future__ import annotations

import threading
import weakref
from concurrent.futures import CancelledError

import pytest

import loracompose.serving.batcher as module
from loracompose.serving.batcher import Batcher, BusyError, Job, Together
from loracompose.serving.rows import Row, cut
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
        self._generate = module.generate
        monkeypatch.setattr(module, "generate", self)

    def __call__(self, engine, jobs, rows):
        self.seen.append(list(jobs))
        if len(self.seen) == 1:
            self.began.set()
            assert self.go.wait(PATIENCE)
        return self._generate(engine, jobs, rows)

    def prompts(self):
        return [[job.prompt for job in jobs] for jobs in self.seen]


@pytest.fixture
def batches(monkeypatch, engine):
    return Batches(monkeypatch, engine)


def test_what_arrives_while_a_batch_runs_forms_the_next_with_what_it_may_run_with(engine, batches):
    greedy, sampled = Together(), Together(temperature=1.0)
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
    assert [answer.trace.prompt for answer in answers[1:]] == [f"{PROMPTS[1]} {i}" for i in range(6)]
    assert (counts.batches, counts.answered, counts.failed, counts.waiting) == (4, 7, 0, 0)


def test_answers_are_those_of_one_prompt_alone(engine):
    with Batcher(engine, window=0.2) as batcher:
        futures = [batcher.submit(Job(prompt, 3 + i)) for i, prompt in enumerate(PROMPTS)]
        found = [future.result(PATIENCE) for future in futures]
        assert batcher.counts.batches == 1
    for i, (prompt, own) in enumerate(zip(PROMPTS, found, strict=True)):
        (alone,) = engine.generate([prompt], max_new_tokens=3 + i)
        (row,) = own.rows
        assert (row.text, row.tokens) == (alone.text, alone.new_tokens[0])
        assert row.finish == "length"


def test_requests_with_a_seed_run_alone(engine, batches):
    seeded = Together(temperature=1.0, seed=1)
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
        assert good.result(PATIENCE).trace.adapters[0].name == "sql"
        assert other.result(PATIENCE).trace.adapters[0].name == "sums"
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
        assert stays.result(PATIENCE).trace.prompt == PROMPTS[2]
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
        assert waits.cancel()
        waits = batcher.submit(Job(PROMPTS[1], 2))  # who has gone takes no place
        closing = threading.Thread(target=batcher.__exit__, args=(None, None, None))
        closing.start()
        with pytest.raises(BusyError, match="shutting down"):
            waits.result(PATIENCE)
        batches.go.set()
        closing.join(PATIENCE)
        assert len(first.result(PATIENCE).rows) == 1  # what ran was let end
        with pytest.raises(BusyError, match="shutting down"):
            batcher.submit(Job(PROMPTS[2], 2))


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"max_tokens": 0}, {"window": -1}, {"max_waiting": 0}])
def test_numbers_out_of_range_are_refused(engine, bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be at least"):
        Batcher(engine, **bad)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"max_batch": 2}, [2, 2]),
        ({"max_tokens": 60}, [2, 2]),
        ({"max_tokens": 20}, [1, 1, 1, 1]),
        ({}, [4]),
    ],
)
def test_a_batch_keeps_within_its_answers_and_tokens(engine, more, expected, batches):
    with Batcher(engine, window=0, **more) as batcher:
        futures = [batcher.submit(Job(PROMPTS[0], 2))]
        assert batches.began.wait(PATIENCE)
        futures += [batcher.submit(Job(PROMPTS[0], 5, prompt_tokens=20 + i)) for i in range(4)]
        batches.go.set()
        for future in futures:
            future.result(PATIENCE)
    assert [len(jobs) for jobs in batches.seen[1:]] == expected


def test_a_batch_is_no_longer_than_the_model_reads_and_draws_count_as_answers(engine, batches):
    most = engine.base.model.config.max_position_embeddings
    sampled = Together(temperature=1.0, n=3)
    with Batcher(engine, window=0, max_batch=7, max_tokens=10**9) as batcher:
        futures = [batcher.submit(Job(PROMPTS[0], 2))]
        assert batches.began.wait(PATIENCE)
        futures += [batcher.submit(Job("long", 2, prompt_tokens=most - 10)), batcher.submit(Job("short", 11))]
        futures += [batcher.submit(Job(prompt, 2, sampled)) for prompt in PROMPTS[:3]]
        batches.go.set()
        found = [future.result(PATIENCE) for future in futures]
    assert batches.prompts()[1:] == [["long"], ["short"], PROMPTS[:2], [PROMPTS[2]]]
    assert [len(answer.rows) for answer in found] == [1, 1, 1, 3, 3, 3]


def test_of_a_batch_that_fails_who_was_told_of_an_answer_is_not_answered_twice(engine, monkeypatch):
    ran, generate = [], module.generate

    def breaks_once(engine, jobs, rows):
        ran.append(len(jobs))
        found = generate(engine, jobs, rows)
        if len(ran) == 1:
            raise RuntimeError("out of memory")
        return found

    monkeypatch.setattr(module, "generate", breaks_once)
    told: list[str] = []
    with Batcher(engine, window=0.2) as batcher:
        plain = batcher.submit(Job(PROMPTS[0], 3))
        streamed = batcher.submit(Job(PROMPTS[1], 3, tell=told.append))
        assert plain.result(PATIENCE).rows[0].tokens == 3
        with pytest.raises(RuntimeError, match="out of memory"):
            streamed.result(PATIENCE)
    assert ran == [2, 1]
    (alone,) = engine.generate([PROMPTS[1]], max_new_tokens=3)
    assert "".join(told) == alone.text


class Panic(BaseException):
    """As a tokenizer's own code raises it."""


@pytest.mark.parametrize("place", ["generate", "written"])
def test_whatever_is_raised_reaches_its_job_and_the_next_is_answered(engine, monkeypatch, place):
    where, right, calls = (module, module.generate, []) if place == "generate" else (Row, Row.written, [])

    def breaks_once(*given):
        calls.append(place)
        if len(calls) == 1:
            raise Panic("out of range")
        return right(*given)

    monkeypatch.setattr(where, place, breaks_once)
    with Batcher(engine, window=0) as batcher:
        with pytest.raises(RuntimeError, match="out of range"):
            batcher.submit(Job(PROMPTS[0], 2)).result(PATIENCE)
        assert batcher.submit(Job(PROMPTS[1], 2)).result(PATIENCE).rows[0].tokens == 2
        assert (batcher.counts.answered, batcher.counts.failed) == (1, 1)


def test_the_memory_of_a_batch_that_failed_is_free_when_it_is_run_again(engine, monkeypatch):
    held, right = [], module.generate

    class Large:
        pass

    def fills_up(engine, jobs, rows):
        large = Large()
        alive = sum(each() is not None for each in held)
        held.append(weakref.ref(large))
        if len(jobs) > 1:
            raise MemoryError
        assert alive == 0
        return right(engine, jobs, rows)

    monkeypatch.setattr(module, "generate", fills_up)
    with Batcher(engine, window=0.2) as batcher:
        futures = [batcher.submit(Job(prompt, 2)) for prompt in PROMPTS]
        assert [future.result(PATIENCE).rows[0].tokens for future in futures] == [2] * 4
    assert len(held) == 7


def test_a_batcher_that_has_begun_begins_once(engine):
    with Batcher(engine, window=0) as batcher:
        before = threading.active_count()
        with batcher:
            assert threading.active_count() == before
        with pytest.raises(BusyError, match="shutting down"):
            batcher.submit(Job(PROMPTS[0], 2))


def test_who_leaves_ends_a_row_and_not_the_batch(engine):
    told: list[str] = []
    leaves = Job(PROMPTS[0], 12, tell=lambda piece: (told.append(piece), leaves.left.set()))
    with Batcher(engine, window=0.2) as batcher:
        gone, stays = batcher.submit(leaves), batcher.submit(Job(PROMPTS[1], 12))
        assert stays.result(PATIENCE).rows[0].tokens == 12
        assert gone.result(PATIENCE).rows[0].tokens == 1
    assert len(told) == 1


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", [], "one two three"),
        ("one two three", ["two"], "one "),
        ("one two three", ["three", "two"], "one "),
        ("one two three", ["four"], "one two three"),
        ("two", ["two"], ""),
        ("a#b##c", ["##"], "a#b"),
        ("größer als 9 € und 🙂", ["und"], "größer als 9 € "),
        ("größer als 9 € und 🙂", [], "größer als 9 € und 🙂"),
        ("ends in half 🙂", ["🙂"], "ends in half "),
    ],
)
def test_an_answer_ends_at_the_first_stop_and_its_pieces_are_told_once(text, stops, expected):
    told: list[str] = []
    row = Row(Bytes(), 100, stops, told.append)
    for token in text.encode():
        row.take(token, frozenset())
    found = row.written()
    assert (found.text, "".join(told)) == (expected, expected)
    assert found.finish == ("stop" if expected != text else "length")
    assert cut(text, stops) == (expected, expected != text)
    assert "" not in told
    if not stops:
        assert len(told) == len(text)  # nothing is held back but a character's own bytes


def test_a_row_ends_at_an_end_token_at_its_limit_and_takes_nothing_after():
    for limit, tokens, finish in ((9, 2, "stop"), (2, 2, "length"), (3, 2, "stop")):
        row = Row(Bytes(), limit, ["zz"])
        for token in b"ab\0cd":
            row.take(token, frozenset({0}))
        assert row.done
        assert (row.written().text, row.written().tokens, row.written().finish) == ("ab", tokens, finish)
    unread = Row(Bytes(), 5)
    for token in "9 €".encode()[:-1]:
        unread.take(token, frozenset())
    assert unread.written().text == "9 \ufffd"  # as the tokenizer writes what the model left unfinished
