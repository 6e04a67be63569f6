"""LoraHub in a table: weights searched for every task on a few of its solved rows, in each pool that it may use."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loracompose.composers import Composer
from loracompose.composers.lorahub import LoraHub
from loracompose.composition.settings import is_finite
from loracompose.durable import write_whole
from loracompose.evaluation.methods import Question, Situation


@dataclass(frozen=True)
class Searched:
    """(Σ_i w_i B_i)(Σ_i w_i A_i) over all adapters that a row may use, at the weights found for its task.

    It knows the task of a row, and a few of the task's answers, as `few_shot` does.

    Source: LoraHub, arXiv:2307.13269.

    Attributes:
        label: its name in the table.
        weights: the file that `benchmarks/lorahub_weights.py` writes.
    """

    weights: Path
    label: str = "lorahub"

    @property
    def composer(self) -> Composer:
        """LoraHub, at the weights of the question."""
        return LoraHub()

    @property
    def k(self) -> int:
        """Nothing is retrieved."""
        return 1

    def questions(self, situation: Situation) -> list[Question | None]:
        """All adapters that were given a weight other than 0.

        Raises:
            LookupError: nothing was searched for a task in the pool that a row may use.
        """
        found: list[Question | None] = []
        for row, names in zip(situation.rows, situation.allowed, strict=True):
            weights = self._known.get((row.task, frozenset(names)))
            if weights is None:
                raise LookupError(
                    f"{self.weights} has no weights for task {row.task!r} in a pool of {len(names)} adapters: search "
                    "them with benchmarks/lorahub_weights.py, and leave the method out of protocols that it lacks"
                )
            found.append(Question(row.prompt, {name: w for name, w in weights.items() if w}))
        return found

    @cached_property
    def _known(self) -> Mapping[tuple[str, frozenset[str]], Mapping[str, float]]:
        return {(search.task, frozenset(search.weights)): search.weights for search in read_searches(self.weights)}


@dataclass(frozen=True)
class Search:
    """What was found for one task: the weight of every adapter of the pool it was searched in."""

    task: str
    weights: Mapping[str, float]


def write_searches(searches: Sequence[Search], file: Path) -> None:
    """Write what was found; the file appears complete."""
    content = [{"task": search.task, "weights": dict(search.weights)} for search in searches]
    write_whole(file, json.dumps(content, indent=1) + "\n")


def read_searches(file: Path) -> list[Search]:
    """What `write_searches` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing: search the weights with benchmarks/lorahub_weights.py")
    try:
        return [_search(entry) for entry in json.loads(file.read_text(encoding="utf-8"))]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f'{file} must be a JSON list of {{"task": ..., "weights": {{adapter: number}}}} ({error}): make it anew '
            "with benchmarks/lorahub_weights.py"
        ) from error


def _search(entry: Mapping[str, Any]) -> Search:
    weights = {str(name): float(weight) for name, weight in entry["weights"].items()}
    if wrong := [name for name, weight in weights.items() if not is_finite(weight)]:
        raise ValueError(f"the weight of {wrong[0]!r} for task {entry['task']!r} is {weights[wrong[0]]}")
    return Search(str(entry["task"]), weights)
