"""Methods: what is put on the table. Each turns the rows of a protocol into prompts with their adapters."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from loracompose.composers import Composer
from loracompose.composers.mixture import Mixture
from loracompose.evaluation.found import Found, SetWeighting
from loracompose.evaluation.tasks import TaskRow
from loracompose.prompts import Prompt

Set: TypeAlias = Mapping[str | Path, float]
DECIMALS = 6  # of retrieved weights
LEAST = 1e-3
"""Members of less than this share of a row's weights are left out: far below what changes an answer, yet each would
make a set of adapters of its own, composed and answered anew."""


@dataclass(frozen=True, eq=False)
class Situation:
    """What methods may see of a protocol: never the answers.

    Attributes:
        rows: the rows asked.
        allowed: the adapters each row may use, sorted.
        pool: all adapters of the index.
        found: what was retrieved, the same for all methods.
        shots: rows with answers of another split, by task, for the prompt of the few-shot baseline.
        task_cosines: of each row with the task of each adapter of the pool, sorted by name, (batch, N); -inf where the
            adapter is hidden. None unless a method asks for them.
    """

    rows: Sequence[TaskRow]
    allowed: Sequence[Sequence[str]]
    pool: frozenset[str]
    found: Found
    shots: Mapping[str, Sequence[TaskRow]]
    task_cosines: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Question:
    """A prompt with the adapters that answer it and their weights; none is the base model."""

    prompt: Prompt
    adapters: Set = field(default_factory=dict)


class Method(Protocol):
    """A line of the table.

    Attributes:
        label: its name there.
        composer: composes the adapters of its questions.
    """

    @property
    def label(self) -> str: ...  # noqa: D102

    @property
    def composer(self) -> Composer: ...  # noqa: D102

    @property
    def k(self) -> int:
        """How many retrieved adapters it looks at."""
        ...

    def questions(self, situation: Situation) -> list[Question | None]:
        """One question per row; None where the method is not defined."""
        ...


@dataclass(frozen=True)
class Baseline:
    """What needs no retrieval; its adapters are summed by weight."""

    label: str
    k: int = field(default=1, init=False)

    @property
    def composer(self) -> Composer:
        """The exact weighted sum."""
        return Mixture()


@dataclass(frozen=True)
class Base(Baseline):
    """The base model alone."""

    label: str = "base"

    def questions(self, situation: Situation) -> list[Question | None]:
        """The prompts as they are."""
        return [Question(row.prompt) for row in situation.rows]


@dataclass(frozen=True)
class FewShot(Baseline):
    """The base model after a few solved rows of the same task, as turns of a chat; knows the task.

    Raises:
        ValueError: shots < 1.
    """

    label: str = "few_shot"
    shots: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.shots, int) or self.shots < 1:
            raise ValueError(f"few_shot: shots must be an integer of at least 1, got {self.shots!r}")

    def questions(self, situation: Situation) -> list[Question | None]:
        """Every prompt after its task's examples.

        Raises:
            LookupError: there are no examples of a task.
        """
        before = {task: self._turns(task, situation) for task in sorted({row.task for row in situation.rows})}
        return [Question([*before[row.task], {"role": "user", "content": row.prompt}]) for row in situation.rows]

    def _turns(self, task: str, situation: Situation) -> list[dict[str, str]]:
        examples = situation.shots.get(task, ())
        if len(examples) < self.shots:
            raise LookupError(
                f"few_shot needs {self.shots} solved rows of task {task!r}, there are {len(examples)}: put a "
                f"{task}.train.jsonl beside the test rows"
            )
        chosen = random.Random(f"{self.seed} {task}").sample(sorted(examples, key=lambda row: row.id), self.shots)
        return [
            {"role": role, "content": text}
            for row in chosen
            for role, text in (("user", row.prompt), ("assistant", row.response))
        ]


@dataclass(frozen=True)
class Oracle(Baseline):
    """The adapter of the row's own task, even where the protocol removes it: the reference, 100 when normalised."""

    label: str = "oracle"

    def questions(self, situation: Situation) -> list[Question | None]:
        """The own adapter at weight 1; not defined for tasks without an adapter."""
        return [Question(row.prompt, {row.task: 1.0}) if row.task in situation.pool else None for row in situation.rows]


@dataclass(frozen=True)
class RandomAdapter(Baseline):
    """One adapter drawn for each row among those it may use."""

    label: str = "random"
    seed: int = 0

    def questions(self, situation: Situation) -> list[Question | None]:
        """Drawn by the row's identity, so neither other rows nor their order matter."""
        return [
            Question(row.prompt, {random.Random(f"{self.seed} {row.id}").choice(names): 1.0} if names else {})
            for row, names in zip(situation.rows, situation.allowed, strict=True)
        ]


@dataclass(frozen=True)
class UniformAll(Baseline):
    """All adapters that a row may use, each at 1 / their number."""

    label: str = "uniform_all"

    def questions(self, situation: Situation) -> list[Question | None]:
        """The same set for every row of a mask."""
        return [
            Question(row.prompt, dict.fromkeys(names, 1 / len(names)) if names else {})
            for row, names in zip(situation.rows, situation.allowed, strict=True)
        ]


@dataclass(frozen=True)
class OneAdapter(Baseline):
    """One adapter for everything, such as one trained on all tasks; a folder outside the pool."""

    label: str = "adapter"
    path: Path = Path()

    def questions(self, situation: Situation) -> list[Question | None]:
        """It at weight 1, everywhere."""
        return [Question(row.prompt, {self.path: 1.0}) for row in situation.rows]


@dataclass(frozen=True)
class Composed:
    """A composer on the k best adapters retrieved.

    Attributes:
        label: its name in the table.
        composer: with its hyper-parameters and what it has learned.
        k: adapters of a row.
        weighting: how they are weighed.
        temperature: of the weighting.
    """

    label: str
    composer: Composer
    k: int = 3
    weighting: SetWeighting = "posterior"
    temperature: float | None = None

    def questions(self, situation: Situation) -> list[Question | None]:
        """Members of weight 0, or of less than `LEAST` of the largest, are left out; the others keep their sum.

        Where the protocol leaves nobody to any row, all go to the base model.
        """
        if not situation.found.best.cards:
            return [Question(row.prompt, {}) for row in situation.rows]
        weights = situation.found.weights(self.k, self.weighting, self.temperature).double()
        total = weights.sum(dim=1, keepdim=True)
        kept = weights * (weights > LEAST * weights.amax(dim=1, keepdim=True))
        rest = kept.sum(dim=1, keepdim=True)
        shared = kept * total / rest.masked_fill(rest == 0, 1.0)
        names = situation.found.best.names
        sets: list[dict[str | Path, float]] = [
            {name: w for name, w in zip(names, own, strict=True) if w} for own in shared.tolist()
        ]
        # The last bits of a weight depend on which prompts were embedded together; the answer must not.
        whole = [{name: round(w, DECIMALS) for name, w in own.items()} for own in sets]
        return [Question(row.prompt, own) for row, own in zip(situation.rows, whole, strict=True)]


BASELINES: Mapping[str, type[Any]] = {
    "base": Base,
    "few_shot": FewShot,
    "oracle": Oracle,
    "random": RandomAdapter,
    "uniform_all": UniformAll,
    "adapter": OneAdapter,
}
