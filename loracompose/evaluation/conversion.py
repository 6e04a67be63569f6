"""Benchmarks made from public data: rows of a Hugging Face dataset through prompt templates, or reasoning-gym's tasks.

Both libraries come with the extra `eval-data`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loracompose.evaluation.metrics import check_metric
from loracompose.evaluation.tasks import TaskRow

SPLITS = ("test", "train", "dev")
SEEDS_APART = 1_000_003  # reasoning-gym draws by seed: no two splits may draw the same
APART = 1000  # rows of the splits before it that a split shares nothing with, however few are asked for


@dataclass(frozen=True)
class Recipe:
    """How records become rows.

    Attributes:
        task: name of the task.
        cluster: tasks of one kind share it.
        metric: key in METRICS.
        prompts: templates with fields in braces, `Review: {text}`; record i is phrased by template i modulo their
            number, which makes the phrasings equally frequent.
        response: template of the answer, `{label}`; the number of a class stands for its name.

    Raises:
        LookupError: no metric of that name.
        ValueError: no prompt template, or one of them cannot be read.
    """

    task: str
    cluster: str
    metric: str
    prompts: tuple[str, ...]
    response: str

    def __post_init__(self) -> None:
        check_metric(self.metric, f"task {self.task!r}")
        if not self.prompts:
            raise ValueError(f"task {self.task!r} needs at least one prompt template, such as 'Review: {{text}}'")
        for template in (*self.prompts, self.response):
            _fields(template)


def convert(
    records: Iterable[Mapping[str, Any]], recipe: Recipe, class_names: Mapping[str, Sequence[str]] | None = None
) -> tuple[TaskRow, ...]:
    """Rows from records.

    Args:
        records: mappings from field to value.
        recipe: how.
        class_names: of the fields that hold numbers of classes.

    Raises:
        LookupError: a template names a field that the records do not have.
        ValueError: a class number without a name, as the hidden labels of some test splits have.
    """
    names = class_names or {}
    rows = []
    for number, record in enumerate(records):
        said = {key: _named(key, value, names.get(key), number) for key, value in record.items()}
        template = number % len(recipe.prompts)
        prompt, response = (_fill(text, said) for text in (recipe.prompts[template], recipe.response))
        rows.append(TaskRow(prompt, response.strip(), recipe.task, recipe.cluster, recipe.metric, template))
    return tuple(rows)


def from_dataset(name: str, recipe: Recipe, split: str, n: int, seed: int, config: str | None = None) -> list[TaskRow]:
    """N rows of a split of a Hugging Face dataset, drawn by seed.

    Args:
        name: on the Hub, or a folder of data files.
        recipe: how records become rows.
        split: as the dataset calls it.
        n: rows; all if there are fewer.
        seed: of the draw.
        config: of the dataset, if it has several.

    Raises:
        ModuleNotFoundError: the package `datasets` is missing.
    """
    try:
        from datasets import load_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing("--dataset", "datasets")) from error
    records = load_dataset(name, config, split=split).shuffle(seed=seed)
    names = {key: feature.names for key, feature in records.features.items() if hasattr(feature, "names")}
    return list(convert(records.select(range(min(n, len(records)))), recipe, names))


def from_reasoning_gym(name: str, split: str, n: int, seed: int) -> list[TaskRow]:
    """N rows of a reasoning-gym generator; its category is the cluster, exact match the metric.

    Each row is drawn from the seed and its number alone, those of another split from other seeds. A row of "train" is
    not kept if it also is one of the test rows, and one of "dev" if it is one of either: of as many as are asked for
    here, and at least `APART`.

    Raises:
        ValueError: there is no such split.
        ModuleNotFoundError: the package is missing.
        LookupError: it has no generator of that name.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    gym = _reasoning_gym()
    if name not in gym.factory.DATASETS:
        raise LookupError(f"reasoning-gym has no {name!r}; there are {', '.join(sorted(gym.factory.DATASETS))}")
    kind = gym.factory.DATASETS[name][0]
    cluster = kind.__module__.split(".")[1]

    def drawn(place: int, size: int) -> list[TaskRow]:
        items = gym.create_dataset(name, size=size, seed=seed + place * SEEDS_APART)
        return [TaskRow(item["question"].strip(), str(item["answer"]), name, cluster, "exact_match") for item in items]

    place = SPLITS.index(split)
    others = {row.prompt for earlier in range(place) for row in drawn(earlier, max(n, APART))}
    return [row for row in drawn(place, n) if row.prompt not in others]


def _reasoning_gym() -> Any:
    try:
        import reasoning_gym
        import reasoning_gym.factory
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(_missing("--reasoning-gym", "reasoning-gym")) from error
    return reasoning_gym


def _named(key: str, value: Any, names: Sequence[str] | None, number: int) -> Any:
    if names is None:
        return value
    if not isinstance(value, int) or not 0 <= value < len(names):
        raise ValueError(f"record {number}: {key} is {value!r}, not the number of a class; take a split with labels")
    return names[value]


def _fill(template: str, record: Mapping[str, Any]) -> str:
    missing = [name for name in _fields(template) if name not in record]
    if missing:
        raise LookupError(f"{template!r}: the records have no field {missing[0]!r}; they have {', '.join(record)}")
    return template.format_map(record)


def _fields(template: str) -> list[str]:
    """Names in braces; {{ and }} are braces themselves."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise ValueError(f"{template!r} is no template ({error}); write fields in braces, '{{text}}'") from error
    if wrong := [name for name in names if not name.isidentifier()]:
        raise ValueError(f"{template!r}: {{{wrong[0]}}} is no name of a field")
    return names


def _missing(option: str, package: str) -> str:
    return f"{option} needs the package {package}: pip install 'loracompose[eval-data]'"
