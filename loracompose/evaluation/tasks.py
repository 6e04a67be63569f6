"""Tasks: rows of prompt and response, read from JSONL and drawn evenly over the phrasings."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from loracompose.evaluation.metrics import check_metric

FIELDS = ("prompt", "response", "task", "cluster", "metric")


@dataclass(frozen=True)
class TaskRow:
    """One question with its answer.

    Attributes:
        prompt: what the model is asked.
        response: the reference answer.
        task: the task's name; an adapter of this name is the row's own.
        cluster: tasks of one kind share it.
        metric: key in METRICS.
        template: which phrasing of the task, None if unknown.
    """

    prompt: str
    response: str
    task: str
    cluster: str
    metric: str
    template: int | None = None

    @cached_property
    def id(self) -> str:
        """Identity by content, 16 hexadecimal digits."""
        content = json.dumps([self.task, self.prompt, self.response])
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def read_tasks(path: str | Path, split: str = "test") -> tuple[TaskRow, ...]:
    """The rows of a JSONL file, or of the files `*.SPLIT.jsonl` of a folder; a row that occurs twice counts once.

    Args:
        path: file or folder.
        split: which files of a folder.

    Raises:
        FileNotFoundError: nothing is there, or no file of this split.
        LookupError: a metric that does not exist.
        ValueError: a line that is no row; the message names it.
    """
    found = tuple(dict.fromkeys(row for file in _files(Path(path), split) for row in _read_file(file)))
    if not found:
        raise ValueError(f"{path} holds no row")
    _check_clusters(found)
    return found


def write_tasks(rows: Iterable[TaskRow], folder: str | Path, split: str) -> list[Path]:
    """One file `TASK.SPLIT.jsonl` per task.

    Raises:
        FileExistsError: one of the files is there already.
    """
    by_task: dict[str, list[TaskRow]] = {}
    for row in rows:
        by_task.setdefault(row.task, []).append(row)
    home = Path(folder)
    files = {task: home / f"{task}.{split}.jsonl" for task in by_task}
    if taken := [str(file) for file in files.values() if file.exists()]:
        raise FileExistsError(f"{', '.join(taken)} exists already; delete it or choose another folder")
    home.mkdir(parents=True, exist_ok=True)
    for task, file in files.items():
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in by_task[task]]
        file.write_text("".join(lines), encoding="utf-8")
    return list(files.values())


def draw(rows: Sequence[TaskRow], n: int | None, seed: int) -> tuple[TaskRow, ...]:
    """At most n rows a task, as evenly over the templates as they allow; all of them if n is None.

    Templates take turns in an order drawn for the task, and so do the rows of a template, so the rows for a smaller n
    are the first of those for a larger one: raising n keeps what was answered.
    """
    if n is not None and n < 1:
        raise ValueError(f"rows per task must be at least 1, got {n}")
    drawn: list[TaskRow] = []
    for task in sorted({row.task for row in rows}):
        mine = [row for row in rows if row.task == task]
        drawn += mine if n is None else _in_turns(mine, random.Random(f"{seed} {task}"))[:n]
    return tuple(drawn)


def rows_of(rows: Sequence[TaskRow], tasks: Collection[str] | None) -> tuple[TaskRow, ...]:
    """The rows of some tasks; all of them if None.

    Raises:
        LookupError: a task that has no row.
    """
    names = {row.task for row in rows}
    if tasks is not None and (unknown := sorted(set(tasks) - names)):
        raise LookupError(f"there is no task {', '.join(unknown)}; there are {', '.join(sorted(names))}")
    return tuple(row for row in rows if tasks is None or row.task in tasks)


def clusters(rows: Iterable[TaskRow]) -> dict[str, str]:
    """The cluster of every task."""
    return {row.task: row.cluster for row in rows}


def _in_turns(rows: Sequence[TaskRow], chance: random.Random) -> list[TaskRow]:
    templates = sorted({row.template for row in rows}, key=lambda t: (t is not None, t or 0))
    chance.shuffle(templates)
    groups = [sorted((row for row in rows if row.template == t), key=lambda row: row.id) for t in templates]
    for group in groups:
        chance.shuffle(group)
    longest = max(map(len, groups))
    return [group[i] for i in range(longest) for group in groups if i < len(group)]


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or folder {path}; make one with `loracompose eval make`")
    files = sorted(path.glob(f"*.{split}.jsonl"))
    if not files:
        there = sorted({file.name.split(".")[-2] for file in path.glob("*.*.jsonl")})
        raise FileNotFoundError(f"{path} has no *.{split}.jsonl; its splits are {', '.join(there) or 'none'}")
    return files


def _read_file(file: Path) -> Iterable[TaskRow]:
    with file.open(encoding="utf-8") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _row(line, f"{file}:{number}")


def _row(line: str, place: str) -> TaskRow:
    try:
        found: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error})") from error
    if not isinstance(found, dict) or not all(isinstance(found.get(field), str) for field in FIELDS):
        raise ValueError(f"{place}: a row has the texts {', '.join(FIELDS)}, got {line.strip():.200}")
    template = found.get("template")
    if template is not None and (not isinstance(template, int) or isinstance(template, bool)):
        raise ValueError(f"{place}: template must be an integer or null, got {template!r}")
    if not found["prompt"].strip() or not found["task"].strip():
        raise ValueError(f"{place}: prompt and task must not be empty")
    check_metric(found["metric"], place)
    prompt, response, task, cluster, metric = (found[field] for field in FIELDS)
    return TaskRow(prompt, response, task, cluster, metric, template)


def _check_clusters(rows: Sequence[TaskRow]) -> None:
    for field in ("cluster", "metric"):
        seen: dict[str, str] = {}
        for row in rows:
            value = getattr(row, field)
            if seen.setdefault(row.task, value) != value:
                raise ValueError(f"task {row.task!r} has the {field} {seen[row.task]!r} and {value!r}; give it one")
