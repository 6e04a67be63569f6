"""Profiles and questions for a measurement of retrieval, from a folder in one of two forms.

- `profiles.jsonl` and `dev.jsonl`, with "adapter" and "prompt": LoraRetriever's benchmark.
- `<task>.train.jsonl` and `<task>.test.jsonl`, with "task", "prompt" and perhaps "template": every task is an adapter,
  and its profile is drawn from the rows to train on. Templates that these lack are phrasings unseen.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class RetrievalData:
    """`profiles`: example prompts by adapter; `prompts` to search with, the adapter of each, and which are unseen."""

    profiles: Mapping[str, tuple[str, ...]]
    prompts: tuple[str, ...]
    own: NDArray[np.int64]
    unseen: NDArray[np.bool_]

    @property
    def parts(self) -> dict[str, NDArray[np.bool_]]:
        """The rows by what is told apart: all of them, and seen and unseen phrasings where there are both."""
        everything = np.ones(len(self.prompts), dtype=np.bool_)
        return {"all": everything} | ({"seen": ~self.unseen, "unseen": self.unseen} if self.unseen.any() else {})


def read_retrieval_data(folder: Path, *, examples: int = 20, seed: int = 0) -> RetrievalData:
    """Read either form.

    Args:
        folder: the files.
        examples: prompts of a profile that is drawn.
        seed: of the drawing.

    Raises:
        FileNotFoundError: the folder has neither form.
        ValueError: a row lacks a field, or belongs to no adapter.
    """
    if (folder / "profiles.jsonl").is_file():
        profiles: dict[str, tuple[str, ...]] = {}
        for row in read_rows(folder / "profiles.jsonl", "adapter"):
            profiles[row["adapter"]] = (*profiles.get(row["adapter"], ()), row["prompt"])
        rows = read_rows(folder / "dev.jsonl", "adapter")
        return _data(profiles, [(row["adapter"], row["prompt"], False) for row in rows], folder)
    profiles, asked = {}, []
    for file in sorted(folder.glob("*.train.jsonl")):
        task, rows = file.name.removesuffix(".train.jsonl"), read_rows(file, "task")
        distinct = sorted({row["prompt"] for row in rows})
        profiles[task] = tuple(random.Random(f"{seed} {task}").sample(distinct, min(examples, len(distinct))))
        known = {row.get("template") for row in rows}
        test = read_rows(folder / f"{task}.test.jsonl", "task")
        asked += [(task, row["prompt"], row.get("template") not in known) for row in test]
    if not profiles:
        raise FileNotFoundError(
            f"{folder} has neither profiles.jsonl with dev.jsonl nor <task>.train.jsonl with <task>.test.jsonl"
        )
    return _data(profiles, asked, folder)


def with_profiles(data: RetrievalData, profiles: Mapping[str, tuple[str, ...]]) -> RetrievalData:
    """The same prompts, to be found by other examples of the same adapters.

    Raises:
        ValueError: the adapters are not the same.
    """
    if set(profiles) != set(data.profiles):
        raise ValueError(f"profiles of {sorted(profiles)} cannot stand for those of {sorted(data.profiles)}")
    return replace(data, profiles={name: tuple(profiles[name]) for name in data.profiles})


def read_rows(file: Path, owner: str) -> list[dict[str, Any]]:
    """The rows of a JSONL file.

    Raises:
        ValueError: a line is no JSON object with a "prompt" and its owner.
    """
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}:{number} is not JSON: {error}") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in (owner, "prompt")):
            raise ValueError(f'{file}:{number} must be an object with the strings "{owner}" and "prompt"')
        rows.append(row)
    return rows


def _data(profiles: Mapping[str, tuple[str, ...]], asked: list[tuple[str, str, bool]], folder: Path) -> RetrievalData:
    place = {name: row for row, name in enumerate(profiles)}
    unknown = {name for name, _, _ in asked} - set(place)
    if unknown or not asked:
        raise ValueError(f"{folder}: {len(asked)} rows to ask; no profiles for {sorted(unknown)}")
    names, prompts, unseen = zip(*asked, strict=True)
    return RetrievalData(profiles, tuple(prompts), np.array([place[name] for name in names]), np.array(unseen))


def read_arguments(description: str | None) -> argparse.Namespace:
    """The command line of a script that measures on both collections: flan48, tasks, pool, --work and --output."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("flan48", type=Path, help="folder with profiles.jsonl and dev.jsonl")
    parser.add_argument("tasks", type=Path, help="folder of TASK.test.jsonl")
    parser.add_argument("pool", type=Path, help="folder of adapters, with cards, of the tasks")
    parser.add_argument("--work", type=Path, required=True, help="folder for what a stopped run goes on with")
    parser.add_argument("-o", "--output", type=Path, required=True, help="JSON file to write")
    return parser.parse_args()
