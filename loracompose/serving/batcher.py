"""Requests that arrive one by one, answered batch by batch: one thread, one model, many compositions at once."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from transformers import LogitsProcessorList, StoppingCriteriaList

from loracompose.engine import Engine
from loracompose.prompts import Prompt
from loracompose.serving.steps import RowLimits, SeedOnce
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
        decoding: arguments of the model's `generate`.
        seed: of sampling; a request with a seed shares a batch with none.
    """

    by_hand: bool = False
    composer: str | None = None
    k: int | None = None
    where: tuple[tuple[str, Any], ...] = ()
    decoding: tuple[tuple[str, Any], ...] = ()
    seed: int | None = None


@dataclass(frozen=True)
class Job:
    """One request.

    Attributes:
        prompt: string or messages.
        max_new_tokens: its own longest answer.
        together: what it must share with the others of its batch.
        adapters: its set if given by hand: name in the index -> weight.
        exclude: names not to retrieve.
    """

    prompt: Prompt
    max_new_tokens: int
    together: Together = field(default_factory=Together)
    adapters: Mapping[str, float] | None = None
    exclude: frozenset[str] = frozenset()


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


class Batcher:
    """Runs jobs on an engine in a thread of its own, as a context manager.

    While a batch runs, what arrives waits and forms the next one: the oldest job, and all that can run with it, up to
    `max_batch`. An idle batcher waits `window` seconds for company. A job that fails takes nobody with it: the others
    of its batch are then answered one by one.
    """

    def __init__(self, engine: Engine, *, max_batch: int = 16, window: float = 0.005, max_waiting: int = 1024) -> None:
        """Prepare; nothing runs before the `with`.

        Args:
            engine: answers.
            max_batch: requests that run together at most.
            window: seconds that an idle batcher waits for company.
            max_waiting: requests that may wait; more are refused.

        Raises:
            ValueError: a number that is out of range.
        """
        for name, value, least in (("max_batch", max_batch, 1), ("window", window, 0), ("max_waiting", max_waiting, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self._engine, self._max_batch, self._window, self._max_waiting = engine, max_batch, window, max_waiting
        self._waiting: list[tuple[Job, Future[Generation]]] = []
        self._changed = threading.Condition()
        self._closed = True
        self._batches = self._answered = self._failed = self._dropped = 0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Batcher:
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
            return Counts(self._count(), self._batches, self._answered, self._failed, self._dropped)

    def submit(self, job: Job) -> Future[Generation]:
        """Queue a job; cancelling its future before it runs takes it out.

        Raises:
            BusyError: too many wait, or the batcher is closed.
        """
        future: Future[Generation] = Future()
        with self._changed:
            if self._closed:
                raise BusyError("the server is shutting down")
            if self._count() >= self._max_waiting:
                raise BusyError(f"{self._max_waiting} requests wait already; try again later")
            self._waiting.append((job, future))
            self._changed.notify_all()
        return future

    def _count(self) -> int:
        return sum(not future.cancelled() for _, future in self._waiting)

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
        while len(self._waiting) < self._max_batch and not self._closed:
            left = end - time.monotonic()
            if left <= 0 or not self._changed.wait(left):
                return

    def _take(self) -> list[tuple[Job, Future[Generation]]]:
        """The oldest job and those that may run with it; jobs that were cancelled are dropped."""
        gone = [item for item in self._waiting if item[1].cancelled()]
        self._dropped += len(gone)
        self._waiting = [item for item in self._waiting if not item[1].cancelled()]
        if not self._waiting:
            return []
        wanted = self._waiting[0][0].together
        alone = wanted.seed is not None
        fits = [item for item in self._waiting if item[0].together == wanted][: 1 if alone else self._max_batch]
        chosen = {id(future) for _, future in fits}
        self._waiting = [item for item in self._waiting if id(item[1]) not in chosen]
        return fits

    def _answer(self, batch: Sequence[tuple[Job, Future[Generation]]]) -> None:
        """Run a batch and tell everybody; one that fails is run again job by job."""
        live = [(job, future) for job, future in batch if future.running() or future.set_running_or_notify_cancel()]
        with self._changed:
            self._dropped += len(batch) - len(live)
        if not live:
            return
        try:
            answers = answer(self._engine, [job for job, _ in live])
        except Exception as error:
            if len(live) > 1:
                for item in live:
                    self._answer([item])
                return
            with self._changed:
                self._failed += 1
            live[0][1].set_exception(error)
            return
        with self._changed:
            self._batches += 1
            self._answered += len(live)
        for (_, future), found in zip(live, answers, strict=True):
            future.set_result(found)


def answer(engine: Engine, jobs: Sequence[Job]) -> list[Generation]:
    """The answers to jobs that may run together, in one batch."""
    together = jobs[0].together
    limits = RowLimits([job.max_new_tokens for job in jobs])
    given = decoding_of(together)
    if together.by_hand:
        given["adapters"] = [dict(job.adapters or {}) for job in jobs]
    else:
        given |= {"k": together.k, "where": dict(together.where) or None}
        given["exclude"] = [job.exclude for job in jobs] if any(job.exclude for job in jobs) else None
    return engine.generate(
        [job.prompt for job in jobs],
        max_new_tokens=max(job.max_new_tokens for job in jobs),
        batch_size=len(jobs),
        composer=together.composer,
        stopping_criteria=StoppingCriteriaList([limits]),
        **given,
    )


def decoding_of(together: Together) -> dict[str, Any]:
    """Arguments of the model's `generate`."""
    given = {name: list(value) if isinstance(value, tuple) else value for name, value in together.decoding}
    if together.seed is not None:
        given["logits_processor"] = LogitsProcessorList([SeedOnce(together.seed)])
    return given
