"""Requests that arrive one by one, answered batch by batch: one thread, one model, many compositions at once."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from traceback import clear_frames
from typing import Any

from transformers import LogitsProcessorList, StoppingCriteriaList

from loracompose.engine import Engine
from loracompose.prompts import Prompt
from loracompose.running import end_tokens
from loracompose.serving.rows import Row, Rows, SeedOnce, Written
from loracompose.trace import Generation


class BusyError(RuntimeError):
    """As many requests wait as may wait."""


@dataclass(frozen=True)
class Together:
    """What requests must have in common to run in one batch.

    Attributes:
        by_hand: whether sets are given, or retrieved.
        composer: name of one; the engine's if None.
        k: adapters to retrieve; the retriever's if None.
        where: metadata that an adapter must have.
        temperature: of sampling; 0 is greedy decoding.
        top_p: of sampling.
        n: answers to draw for each prompt.
        seed: of sampling; a request with a seed shares a batch with none.
    """

    by_hand: bool = False
    composer: str | None = None
    k: int | None = None
    where: tuple[tuple[str, Any], ...] = ()
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None

    def decoding(self) -> dict[str, Any]:
        """Arguments of the model's `generate`."""
        if self.temperature == 0:
            return {}
        # A seed of its own for every batch: one that a request asked for must not decide what the next ones draw.
        seed = secrets.randbits(63) if self.seed is None else self.seed
        return {
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "num_return_sequences": self.n,
            "logits_processor": LogitsProcessorList([SeedOnce(seed)]),
        }


@dataclass(frozen=True, eq=False)
class Job:
    """One request.

    Attributes:
        prompt: string or messages.
        limit: its own longest answer in tokens.
        together: what it must share with the others of its batch.
        adapters: its set if given by hand: name in the index -> weight.
        exclude: names not to retrieve.
        stops: texts that end its answers.
        prompt_tokens: how long the prompt is.
        tell: is called from the batcher's thread with every piece of text; for one answer alone.
        left: set it when nobody waits for the answer any more: the job then ends at its next token.
    """

    prompt: Prompt
    limit: int
    together: Together = field(default_factory=Together)
    adapters: Mapping[str, float] | None = None
    exclude: frozenset[str] = frozenset()
    stops: tuple[str, ...] = ()
    prompt_tokens: int = 1
    tell: Callable[[str], None] | None = None
    left: threading.Event = field(default_factory=threading.Event)


@dataclass(frozen=True)
class Answer:
    """What a job gets.

    Attributes:
        trace: how it was answered.
        rows: its answers.
    """

    trace: Generation
    rows: tuple[Written, ...]


@dataclass(frozen=True)
class Counts:
    """Since the start.

    Attributes:
        waiting: requests that wait now.
        batches: that ran.
        answered: requests answered.
        failed: requests that ended with an error.
        dropped: requests whose sender had gone before they ran.
    """

    waiting: int = 0
    batches: int = 0
    answered: int = 0
    failed: int = 0
    dropped: int = 0


Waiting = tuple[Job, "Future[Answer]"]


class Batcher:
    """Runs jobs on an engine in a thread of its own, as a context manager.

    While a batch runs, what arrives waits and forms the next one: the oldest job, and all that can run with it within
    the bounds. An idle batcher waits `window` seconds for company. A job that fails takes nobody with it: the others of
    its batch are run again without it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_batch: int = 16,
        max_tokens: int = 32_768,
        window: float = 0.005,
        max_waiting: int = 1024,
    ) -> None:
        """Prepare; nothing runs before the `with`.

        Args:
            engine: answers.
            max_batch: answers that are generated together at most.
            max_tokens: tokens of a batch at most, rows times (longest prompt + longest answer); a job beyond it runs
                alone.
            window: seconds that an idle batcher waits for company.
            max_waiting: requests that may wait; more are refused.

        Raises:
            ValueError: a number that is out of range.
        """
        bounds = {"max_batch": max_batch, "max_tokens": max_tokens, "max_waiting": max_waiting}
        for name, value in bounds.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= window < threading.TIMEOUT_MAX:
            raise ValueError(f"window must be at least 0 seconds, got {window}")
        self.max_batch = max_batch
        self._engine, self._max_tokens, self._window, self._max_waiting = engine, max_tokens, window, max_waiting
        self._positions = most_positions(engine)
        self._waiting: list[Waiting] = []
        self._changed = threading.Condition()
        self._closed = True
        self._batches = self._answered = self._failed = self._dropped = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Batcher:
        """Begin; nothing happens to one that has begun, which its first exit closes."""
        if self._closed:
            self._closed = False
            self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Refuse what is new, fail what waits, and let the batch that runs end."""
        with self._changed:
            self._closed = True
            left, self._waiting = self._waiting, []
            self._changed.notify_all()
        for _, future in left:
            if future.set_running_or_notify_cancel():
                future.set_exception(BusyError("the server is shutting down"))
        if self._thread is not None:
            self._thread.join()

    @property
    def counts(self) -> Counts:
        """What has happened up to now."""
        with self._changed:
            self._forget_gone()
            return Counts(len(self._waiting), self._batches, self._answered, self._failed, self._dropped)

    def submit(self, job: Job) -> Future[Answer]:
        """Queue a job; cancelling its future before it runs takes it out.

        Raises:
            BusyError: too many wait, or the batcher is closed.
        """
        future: Future[Answer] = Future()
        with self._changed:
            if self._closed:
                raise BusyError("the server is shutting down")
            if len(self._waiting) >= self._max_waiting:
                self._forget_gone()
            if len(self._waiting) >= self._max_waiting:
                raise BusyError(f"{self._max_waiting} requests wait already; try again later")
            self._waiting.append((job, future))
            self._changed.notify_all()
        return future

    def _forget_gone(self) -> None:
        before = len(self._waiting)
        self._waiting = [item for item in self._waiting if not item[1].cancelled()]
        self._dropped += before - len(self._waiting)

    def _run(self) -> None:
        idle = True
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    idle = True
                    self._changed.wait()
                if self._closed:
                    return
                if idle:
                    self._gather()
                batch = self._take()
            idle = False
            if batch:
                self._answer(batch)

    def _gather(self) -> None:
        """Wait for company, at most as long as the window, and no longer than it takes to fill a batch."""
        end = time.monotonic() + self._window
        while len(self._waiting) < self.max_batch and not self._closed:
            left = end - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _take(self) -> list[Waiting]:
        """The oldest job and those that may run with it."""
        self._forget_gone()
        chosen: list[Waiting] = []
        for item in self._waiting:
            if not chosen or self._fits([job for job, _ in chosen], item[0]):
                chosen.append(item)
            if chosen[0][0].together.seed is not None:
                break
        taken = {id(future) for _, future in chosen}
        self._waiting = [item for item in self._waiting if id(item[1]) not in taken]
        return chosen

    def _fits(self, batch: Sequence[Job], job: Job) -> bool:
        if job.together != batch[0].together:
            return False
        jobs = [*batch, job]
        rows = len(jobs) * job.together.n
        length = max(each.prompt_tokens for each in jobs) + max(each.limit for each in jobs)
        within = self._positions is None or length <= self._positions
        return rows <= self.max_batch and rows * length <= self._max_tokens and within

    def _answer(self, batch: Sequence[Waiting]) -> None:
        """Run a batch and tell everybody; one that fails is run again in halves."""
        live = [(job, future) for job, future in batch if future.running() or future.set_running_or_notify_cancel()]
        with self._changed:
            self._dropped += len(batch) - len(live)
        if not live:
            return
        rows = [self._rows(job) for job, _ in live]
        try:
            traces = generate(self._engine, [job for job, _ in live], [row for own in rows for row in own])
            answers = [
                Answer(trace, tuple(row.written() for row in own)) for trace, own in zip(traces, rows, strict=True)
            ]
        except BaseException as error:  # a panic of the tokenizer is no Exception, and nobody waits in this thread
            clear_frames(error.__traceback__)  # which hold the memory that the others are run again in
            failure = error if isinstance(error, Exception) else RuntimeError(repr(error))
        else:
            with self._changed:
                self._batches += 1
                self._answered += len(live)
            for (_, future), found in zip(live, answers, strict=True):
                future.set_result(found)
            return
        self._fail(live, rows, failure)

    def _rows(self, job: Job) -> list[Row]:
        tokenizer = self._engine.base.tokenizer
        return [Row(tokenizer, job.limit, job.stops, job.tell, job.left) for _ in range(job.together.n)]

    def _fail(self, live: Sequence[Waiting], rows: Sequence[Sequence[Row]], error: Exception) -> None:
        """Hand the error to a job that was alone or has been told of its answer; run the others again."""
        begun = [any(row.told for row in own) for own in rows]
        lost = [item for item, told in zip(live, begun, strict=True) if told or len(live) == 1]
        again = [item for item in live if item not in lost]
        with self._changed:
            self._failed += len(lost)
        for _, future in lost:
            future.set_exception(error)
        middle = (len(again) + 1) // 2
        for half in (again[:middle], again[middle:]):
            if half:
                self._answer(half)


def generate(engine: Engine, jobs: Sequence[Job], rows: Sequence[Row]) -> list[Generation]:
    """The traces of jobs that may run together, in one batch, their answers in the rows."""
    together = jobs[0].together
    given = together.decoding()
    if together.by_hand:
        given["adapters"] = [dict(job.adapters or {}) for job in jobs]
    else:
        given |= {"k": together.k, "where": dict(together.where) or None}
        given["exclude"] = [job.exclude for job in jobs] if any(job.exclude for job in jobs) else None
    # Where something else of the model's own ended a row, padding follows.
    ends = end_tokens(engine.base, given) | {int(engine.base.tokenizer.pad_token_id)}
    return engine.generate(
        [job.prompt for job in jobs],
        max_new_tokens=max(job.limit for job in jobs),
        batch_size=len(jobs),
        composer=together.composer,
        stopping_criteria=StoppingCriteriaList([Rows(rows, ends)]),
        **given,
    )


def most_positions(engine: Engine) -> int | None:
    """Tokens that the model can read in all, prompt and answer; None if it has no such bound."""
    found: int | None = getattr(engine.base.model.config.get_text_config(), "max_position_embeddings", None)
    return found
