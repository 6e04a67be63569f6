"""From questions to answers: what is kept is looked up, the rest is generated batch by batch and kept at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from loracompose.composers.base import Composer
from loracompose.composers.fusion import Fusion
from loracompose.composers.linear import Linear
from loracompose.composers.mixture import Mixture
from loracompose.composers.recall import row_wise
from loracompose.composers.selection import Selection
from loracompose.engine import Engine
from loracompose.evaluation.cache import Answer, AnswerCache, base_identity, question_key
from loracompose.evaluation.methods import Question
from loracompose.evaluation.tasks import TaskRow
from loracompose.prompts import prompt_lengths
from loracompose.trace import Generation

SLACK = 8  # tokens that an answer may have beyond the longest reference of its task: too long is never cut to right
TIMED_TOKENS = 16
ADDING = (Selection, Mixture, Linear, Fusion)


@dataclass(frozen=True, eq=False)
class Job:
    """One question to answer: its key in the cache, the longest answer in tokens, and who the adapters were."""

    key: str
    question: Question
    budget: int
    fingerprints: frozenset[str]


class RowBudget(StoppingCriteria):  # type: ignore[misc]
    """Ends each row of a batch after a number of new tokens of its own, so rows of different tasks may share it."""

    def __init__(self, budgets: Sequence[int]) -> None:
        self._budgets = torch.tensor(budgets)
        self._prompt: int | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Which rows have used up their budget, (batch,)."""
        if self._prompt is None:  # first asked after the first new token
            self._prompt = input_ids.shape[1] - 1
        budgets = self._budgets.to(input_ids.device)
        return (input_ids.shape[1] - self._prompt) >= budgets


@dataclass(frozen=True, eq=False)
class Answerer:
    """An engine with the answers it gave before.

    Attributes:
        engine: with an index.
        cache: of answers.
        batch_size: questions that run together.
        base: identity of the base model.
    """

    engine: Engine
    cache: AnswerCache
    batch_size: int
    base: str

    @classmethod
    def over(cls, engine: Engine, cache: AnswerCache, batch_size: int) -> Answerer:
        """The answerer of an engine."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        return cls(engine, cache, batch_size, base_identity(engine.base))

    def jobs(
        self,
        rows: Sequence[TaskRow],
        questions: Sequence[Question | None],
        composer: Composer,
        budgets: Mapping[str, int],
        mixed: bool,
    ) -> list[Job | None]:
        """The jobs of a method, one a row; None where it asks nothing.

        Args:
            rows: the rows of the protocol.
            questions: of the method, one a row.
            composer: of the method.
            budgets: longest answer of each task in tokens.
            mixed: whether batches mix all tasks; kept apart from those that do not, or nothing would be measured.
        """
        jobs: list[Job | None] = []
        for row, question in zip(rows, questions, strict=True):
            if question is None:
                jobs.append(None)
                continue
            budget = budgets[row.task]
            decoding = {"max_new_tokens": budget, "do_sample": False, "mixed": mixed}
            asked, name = plainly(question, composer)
            members = [(self._fingerprint(ref), weight) for ref, weight in asked.adapters.items()]
            key = question_key(self.base, asked.prompt, members, name, decoding)
            jobs.append(Job(key, asked, budget, frozenset(fingerprint for fingerprint, _ in members)))
        return jobs

    def missing(self, jobs: Sequence[Job | None]) -> list[Job]:
        """The jobs without an answer, each key once."""
        distinct = {job.key: job for job in jobs if job is not None}
        return [job for job in distinct.values() if self.cache.get(job.key) is None]

    def answer(self, jobs: Sequence[Job], composer: Composer, mixed: bool, done: Callable[[int], None]) -> None:
        """Generate and keep the answers of jobs, batch by batch.

        Args:
            jobs: without an answer yet.
            composer: of all of them.
            mixed: whether batches follow the order given, or rows that are alike run together.
            done: told the number of answers after each batch.

        Raises:
            RuntimeError: an adapter is no longer what it was when the jobs were made; nothing of its batch is kept.
        """
        if not jobs:
            return
        lengths = prompt_lengths(self.engine.base.tokenizer, [job.question.prompt for job in jobs])
        for batch in batches(jobs, lengths, self.batch_size, mixed, by_set=row_wise(composer)):
            generations = self.engine.generate(
                [job.question.prompt for job in batch],
                adapters=[dict(job.question.adapters) for job in batch],
                composer=composer,
                max_new_tokens=max(job.budget for job in batch),
                batch_size=len(batch),
                stopping_criteria=StoppingCriteriaList([RowBudget([job.budget for job in batch])]),
            )
            answers: dict[str, Answer] = {}
            for job, generation in zip(batch, generations, strict=True):
                check_unchanged(job, generation)
                answers[job.key] = self._answer(generation)
            self.cache.put(answers)
            done(len(batch))

    def seconds(self, jobs: Sequence[Job | None], composer: Composer, rows: int) -> float | None:
        """Seconds a prompt to answer one batch of rows spread evenly over all, the faster of two times.

        Adapters have been read and sets composed before, as for prompts of a kind that was asked already; what a new
        set costs is measured by `loracompose bench composing`. Every answer has `TIMED_TOKENS` tokens, so a method
        that talks more does not look slower. Nothing is kept.

        Args:
            jobs: of a method.
            composer: of the method.
            rows: of the batch; None comes back if it is 0.
        """
        asked = [job for job in jobs if job is not None]
        count = min(rows, len(asked))
        if count < 1:
            return None
        # The first ones would be of one task, and so mostly of one adapter: no mixed batch.
        batch = [asked[place * len(asked) // count] for place in range(count)]
        times = []
        for _ in range(2):  # the first also reads adapters, composes and warms up
            start = time.perf_counter()
            self.engine.generate(
                [job.question.prompt for job in batch],
                adapters=[dict(job.question.adapters) for job in batch],
                composer=composer,
                batch_size=len(batch),
                max_new_tokens=TIMED_TOKENS,
                min_new_tokens=TIMED_TOKENS,
            )
            times.append((time.perf_counter() - start) / len(batch))
        return min(times)

    def _answer(self, generation: Generation) -> Answer:
        width = torch.empty((), dtype=self.engine.base.dtype).element_size()
        composer = generation.composer if generation.adapters else ""
        return Answer(generation.text.strip(), generation.added_parameters * width, composer)

    def _fingerprint(self, ref: str | Path) -> str:
        if isinstance(ref, Path):
            return self.engine.store.get(ref).fingerprint
        index = self.engine.index
        if index is None:
            raise ValueError("an evaluation needs an engine with an index: Engine.from_pretrained(..., index=...)")
        return index.card(ref).fingerprint


def plainly(question: Question, composer: Composer) -> tuple[Question, str]:
    """A question as simple as it comes to, and under whose name its answer is kept.

    A selection is its winner at full strength, however it was weighed; which of equals wins is left to the composer.
    And one adapter at weight 1 is that adapter for every composer that only adds: the oracle's question where
    retrieval is right and sure. A rank that is given may be less than the adapter's, and makes another one of it.
    """
    asked = question
    if isinstance(composer, Selection) and question.adapters:
        best = max(question.adapters.values())
        winners = [ref for ref, weight in question.adapters.items() if weight == best]
        asked = Question(question.prompt, {winners[0]: 1.0}) if len(winners) == 1 else question
    cuts = isinstance(composer, Linear) and composer.rank is not None
    alone = isinstance(composer, ADDING) and not cuts and list(asked.adapters.values()) == [1.0]
    return asked, repr(Mixture() if alone else composer)


def check_unchanged(job: Job, generation: Generation) -> None:
    """Refuse an answer of other adapters than the job's key names.

    Raises:
        RuntimeError: an adapter was changed while the evaluation ran.
    """
    for use in generation.adapters:
        if use.fingerprint not in job.fingerprints:
            raise RuntimeError(
                f"adapter {use.name!r} is now {use.fingerprint[:12]}, and was another when this evaluation began: "
                "somebody changed it in the index; run the evaluation again"
            )


def batches(
    jobs: Sequence[Job], lengths: Sequence[int], size: int, mixed: bool, by_set: bool = False
) -> Iterator[list[Job]]:
    """The jobs in batches: as they come, or rows alike in budget and in length together, which wastes least.

    A row that has ended is computed until its whole batch has, so budgets of one batch differ less than twofold.

    Args:
        jobs: to answer.
        lengths: of their prompts in tokens: the shorter ones of a batch are padded to the longest.
        size: most jobs of a batch.
        mixed: whether batches follow the order given.
        by_set: rows of one set of adapters together first, for a composer that keeps what it makes of a set: what is
            kept is bounded, and a set that comes again later might have to be made again.
    """
    if mixed:
        yield from (list(jobs[start : start + size]) for start in range(0, len(jobs), size))
        return

    def likeness(place: int) -> tuple[Any, ...]:
        members, length = sorted(map(str, jobs[place].question.adapters)), lengths[place]
        return (members, length, jobs[place].key) if by_set else (length, members, jobs[place].key)

    groups: dict[int, list[int]] = {}
    for place, job in enumerate(jobs):
        groups.setdefault(job.budget.bit_length(), []).append(place)
    for _, places in sorted(groups.items()):
        ordered = [jobs[place] for place in sorted(places, key=likeness)]
        yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def token_budgets(engine: Engine, rows: Sequence[TaskRow], limit: int) -> dict[str, int]:
    """The longest answer of each task in tokens: its longest reference and `SLACK`, at most `limit`.

    An answer cut there is longer than every reference of its task, or as long as the limit. So cutting never makes an
    exact match of one that is none, as long as no reference is longer than the limit; and whatever talks on is
    compared with references by its beginning alone.

    Args:
        engine: whose tokenizer counts.
        rows: all rows of the tasks, drawn or not, so that budgets do not depend on how many are drawn.
        limit: largest budget.
    """
    if limit < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {limit}")
    longest: dict[str, int] = {}
    for row in rows:
        length = len(engine.base.tokenizer(row.response, add_special_tokens=False)["input_ids"])
        longest[row.task] = max(longest.get(row.task, 0), length)
    return {task: min(limit, length + SLACK) for task, length in longest.items()}
