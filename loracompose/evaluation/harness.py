"""Harness: tasks x protocols x methods, answered through one engine, resumable at any point."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loracompose import __version__
from loracompose.composers import Composer
from loracompose.engine import Engine
from loracompose.evaluation.answering import Answerer, Job, token_budgets
from loracompose.evaluation.cache import Answer, AnswerCache
from loracompose.evaluation.found import Found, cosines_of
from loracompose.evaluation.lorauter import Lorauter, task_cosines
from loracompose.evaluation.methods import Method, Situation
from loracompose.evaluation.metrics import METRICS
from loracompose.evaluation.protocols import Protocol
from loracompose.evaluation.results import MethodResult, ProtocolResult, Results, RowRecord
from loracompose.evaluation.tasks import TaskRow, clusters, rows_of
from loracompose.retrieval.index import AdapterIndex

PACKAGE = Path(__file__).parent.parent
PACKAGES = ("torch", "transformers", "peft", "numpy", "sacrebleu", "rouge-score", "sentence-transformers")


@dataclass(frozen=True)
class Plan:
    """What to evaluate.

    Attributes:
        methods: lines of the table.
        protocols: ways to ask.
        tasks: names of those to ask; None asks all. The others still say which adapters share a cluster.
        n: rows a task; None takes all.
        seed: of the rows drawn.
        unseen_template: the phrasing that no adapter saw.
        max_new_tokens: no answer is longer, however long its references.
        batch_size: questions that run together.
        timed_rows: rows of the batch that each method is timed on; 0 leaves times out.
    """

    methods: tuple[Method, ...]
    protocols: tuple[Protocol, ...]
    tasks: tuple[str, ...] | None = None
    n: int | None = 5
    seed: int = 0
    unseen_template: int | None = 5
    max_new_tokens: int = 128
    batch_size: int = 32
    timed_rows: int = 8


@dataclass(frozen=True, eq=False)
class Round:
    """One protocol, ready to run: its situation, and the jobs of each method."""

    protocol: Protocol
    situation: Situation
    jobs: tuple[list[Job | None], ...]


def evaluate(
    engine: Engine,
    rows: Sequence[TaskRow],
    plan: Plan,
    cache: AnswerCache,
    shots: Sequence[TaskRow] = (),
    progress: bool = False,
    validation: Sequence[TaskRow] = (),
) -> Results:
    """Ask every method the rows of every protocol and score the answers.

    Retrieval runs once a protocol, so all methods get equal sets. Answers go to the cache batch by batch: stopped at
    any point and called again, it generates only what is missing.

    Args:
        engine: with an index; its own composer and weighting are not used.
        rows: the test rows of all tasks.
        plan: what to evaluate.
        cache: where answers are kept.
        shots: solved rows of another split, for few-shot prompts.
        progress: show a progress bar over answers.
        validation: rows of a third split, for methods that know tasks by them.

    Raises:
        ValueError: the engine has no index, or the plan cannot be carried out.
        LookupError: a method lacks what it needs.
    """
    if engine.index is None:
        raise ValueError("an evaluation needs an engine with an index: Engine.from_pretrained(..., index=...)")
    answerer = Answerer.over(engine, cache, plan.batch_size)
    budgets = token_budgets(engine, rows, plan.max_new_tokens)
    rounds = [
        _prepare(engine.index, rows, protocol, plan, answerer, budgets, shots, validation)
        for protocol in plan.protocols
    ]
    _run(rounds, plan.methods, answerer, progress)
    protocols = tuple(_score(made, plan, answerer) for made in rounds)
    return Results(_settings(engine, plan), _pool(engine.index), versions(), protocols)


def _prepare(
    index: AdapterIndex,
    rows: Sequence[TaskRow],
    protocol: Protocol,
    plan: Plan,
    answerer: Answerer,
    budgets: Mapping[str, int],
    shots: Sequence[TaskRow],
    validation: Sequence[TaskRow],
) -> Round:
    asked = protocol.rows(rows_of(rows, plan.tasks), plan.n, plan.seed, plan.unseen_template)
    names = frozenset(card.name for card in index.cards)
    excluded = protocol.excluded(asked, clusters(rows), names)
    found = _search(index, asked, excluded, max(method.k for method in plan.methods))
    examples: dict[str, list[TaskRow]] = {}
    for row in shots:
        examples.setdefault(row.task, []).append(row)
    allowed = [sorted(names - hidden) for hidden in excluded]
    asks = validation and any(isinstance(method, Lorauter) for method in plan.methods)
    cosines = task_cosines(index, [row.prompt for row in asked], excluded, validation) if asks else None
    situation = Situation(asked, allowed, names, found, examples, cosines)
    jobs = tuple(
        answerer.jobs(asked, method.questions(situation), method.composer, budgets, protocol.shuffled)
        for method in plan.methods
    )
    return Round(protocol, situation, jobs)


def _search(index: AdapterIndex, rows: Sequence[TaskRow], excluded: Sequence[frozenset[str]], k: int) -> Found:
    prompts = [row.prompt for row in rows]
    start = time.perf_counter()
    best = index.search(prompts, k, exclude=excluded)
    seconds = (time.perf_counter() - start) / len(prompts)
    return Found(best, cosines_of(index, prompts, excluded, best), seconds)


def _run(rounds: Sequence[Round], methods: Sequence[Method], answerer: Answerer, progress: bool) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not progress, transient=True) as bar:
        missing = {job.key for made in rounds for jobs in made.jobs for job in answerer.missing(jobs)}
        shown = bar.add_task("answers", total=len(missing))
        for made in rounds:
            for method, jobs in zip(methods, made.jobs, strict=True):
                bar.update(shown, description=f"{made.protocol.name}: {method.label}")
                left = answerer.missing(jobs)  # asked anew: the protocol before may have answered some
                answerer.answer(left, method.composer, made.protocol.shuffled, partial(bar.advance, shown))


def _score(made: Round, plan: Plan, answerer: Answerer) -> ProtocolResult:
    rows = made.situation.rows
    found = made.situation.found
    return ProtocolResult(
        made.protocol.name,
        tuple(RowRecord(row.id, row.task, row.cluster, row.metric, row.template) for row in rows),
        tuple(found.top()),
        tuple(found.place([row.task for row in rows])),
        round(1000 * found.seconds, 2),
        tuple(_method(m, jobs, rows, answerer, plan) for m, jobs in zip(plan.methods, made.jobs, strict=True)),
    )


def _method(
    method: Method, jobs: Sequence[Job | None], rows: Sequence[TaskRow], answerer: Answerer, plan: Plan
) -> MethodResult:
    answers = [None if job is None else _kept(answerer.cache, job) for job in jobs]
    scores = tuple(
        None if answer is None else round(METRICS[row.metric](answer.text, row.response), 2)
        for row, answer in zip(rows, answers, strict=True)
    )
    given = [answer for answer in answers if answer is not None]
    count = max(1, len(given))
    composer = repr(method.composer) if any(answer.composer for answer in given) else ""
    seconds = answerer.seconds(jobs, method.composer, plan.timed_rows)
    ms = None if seconds is None else round(1000 * seconds, 1)
    added = sum(answer.added_bytes for answer in given) / count + _learned_bytes(method.composer)
    return MethodResult(method.label, composer, scores, ms, round(added))


def _kept(cache: AnswerCache, job: Job) -> Answer:
    answer = cache.get(job.key)
    if answer is None:
        raise LookupError(f"the answer {job.key} is gone from {cache.path}; somebody changed it during the run")
    return answer


def _learned_bytes(composer: Composer) -> int:
    router = getattr(composer, "router", None)
    return 0 if router is None else sum(tensor.nbytes for tensor in router.tensors.values())


def _settings(engine: Engine, plan: Plan) -> dict[str, Any]:
    return {
        "base": engine.base.name,
        "dtype": str(engine.base.dtype).removeprefix("torch."),
        "device": engine.base.device.type,
        "rows_per_task": plan.n,
        "seed": plan.seed,
        "unseen_template": plan.unseen_template,
        "max_new_tokens": plan.max_new_tokens,
        "batch_size": plan.batch_size,
        "timed_rows": plan.timed_rows,
    }


def _pool(index: AdapterIndex) -> dict[str, str]:
    return {card.name: card.fingerprint for card in index.cards}


def versions() -> dict[str, str]:
    """Versions of what computes, and a digest of the code here; packages that are not installed are left out."""
    found = {"loracompose": __version__, "source": source_digest(), "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # an extra that this run did not need
            continue
    return found


def source_digest() -> str:
    """Twelve hexadecimal digits over the code of this package: a version stays while the code under it changes."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE.rglob("*.py")):
        digest.update(f"{file.relative_to(PACKAGE).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]
