"""Rows of several tasks: read, capped, encoded, and drawn so that every task is seen equally often."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from loracompose.training.batches import BUCKET
from loracompose.training.data import EncodedExample, Example, encode_example, read_examples

Rows = Path | str | Iterable[Mapping[str, Any]]
Split = Literal["train", "dev"]


@dataclass(frozen=True, eq=False)
class TaskMixture:
    """The rows that a router learns from.

    Attributes:
        examples: the rows, task by task, in the order that the seed drew them.
        encoded: their token ids.
        left_out: rows that were longer than allowed.
    """

    examples: tuple[Example, ...]
    encoded: tuple[EncodedExample, ...]
    left_out: int

    @cached_property
    def by_task(self) -> dict[str, list[int]]:
        """The rows of each task."""
        places: dict[str, list[int]] = {}
        for place, example in enumerate(self.examples):
            places.setdefault(example.task, []).append(place)
        return places

    @property
    def digest(self) -> str:
        """sha256 over the rows."""
        return hashlib.sha256(json.dumps([asdict(row) for row in self.examples]).encode()).hexdigest()

    def plan(self, batch_size: int, *, steps: int, seed: int) -> tuple[tuple[int, ...], ...]:
        """The rows of each step: tasks take turns, each goes through its rows again and again, in orders of the seed.

        Rows of `BUCKET` batches are sorted by length together: less padding, and every task still takes its turn.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = self._turns(generator)
        plan: list[tuple[int, ...]] = []
        while len(plan) < steps:
            bucket = sorted((next(drawn) for _ in range(BUCKET * batch_size)), key=lambda i: self.encoded[i].length)
            order = torch.randperm(BUCKET, generator=generator).tolist()
            plan.extend(tuple(bucket[place * batch_size : (place + 1) * batch_size]) for place in order)
        return tuple(plan[:steps])

    def _turns(self, generator: torch.Generator) -> Iterator[int]:
        tasks = list(self.by_task.values())
        left: list[list[int]] = [[] for _ in tasks]
        while True:
            for task in torch.randperm(len(tasks), generator=generator).tolist():
                if not left[task]:
                    rows = tasks[task]
                    left[task] = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
                yield left[task].pop()


def task_mixture(
    data: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split = "train",
    tasks: Collection[str] = (),
    per_task: int | None = None,
    max_length: int = 512,
    seed: int = 0,
) -> TaskMixture:
    """Read and encode a mixture over tasks.

    Args:
        data: a folder whose `*.SPLIT.jsonl` files hold one task each, a JSONL file, or rows
            {"prompt", "response", "task"}.
        tokenizer: of the base.
        split: which files of a folder.
        tasks: only these; all if none is named.
        per_task: at most so many rows of each task, drawn by the seed.
        max_length: rows with more tokens, prompt and response together, are left out (and counted).
        seed: of the draw.

    Raises:
        FileNotFoundError: the folder has no such file.
        LookupError: a task that the data does not have.
        ValueError: a bad row, or a task of which every row is too long.
    """
    found = _by_task(_read(data, split), tasks)
    generator = torch.Generator().manual_seed(seed)
    examples: list[Example] = []
    encoded: list[EncodedExample] = []
    left_out = 0
    for task in sorted(found):
        rows, before = found[task], len(examples)
        for place in torch.randperm(len(rows), generator=generator).tolist():
            if len(examples) - before == per_task:
                break
            code = encode_example(tokenizer, rows[place])
            if code.length > max_length:
                left_out += 1
                continue
            examples.append(rows[place])
            encoded.append(code)
        if len(examples) == before:
            raise ValueError(f"max_length is {max_length}, and all {len(rows)} rows of task {task!r} are longer")
    return TaskMixture(tuple(examples), tuple(encoded), left_out)


def _read(data: Rows, split: Split) -> tuple[Example, ...]:
    if not isinstance(data, str | Path) or not Path(data).is_dir():
        return read_examples(data)
    files = sorted(Path(data).glob(f"*.{split}.jsonl"))
    if not files:
        raise FileNotFoundError(f"{data} has no *.{split}.jsonl file")
    return tuple(example for file in files for example in read_examples(file))


def _by_task(examples: Iterable[Example], tasks: Collection[str]) -> dict[str, list[Example]]:
    found: dict[str, list[Example]] = {}
    for example in examples:
        found.setdefault(example.task, []).append(example)
    if missing := sorted(set(tasks) - set(found)):
        raise LookupError(f"the data has no task {', '.join(missing)}; it has {', '.join(sorted(found))}")
    return {task: rows for task, rows in found.items() if not tasks or task in tasks}
