"""LoraHub's weights of every task, searched without gradients on five of its training rows, for the leaderboard.

    python benchmarks/lorahub_weights.py TASKS ADAPTERS lorahub.json

Once in the whole pool and once without the task's own adapter, in as many steps as the paper takes. Then

    loracompose eval run TASKS -i INDEX -x "lorahub weights=lorahub.json" -o results.json

TASKS holds `<task>.train.jsonl` files, ADAPTERS one adapter a task, named as the task. What is in the output is not
searched again: delete it when an adapter changes.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

from loracompose import load_adapter
from loracompose.adapters.lora import Adapter
from loracompose.evaluation.searched import Search, read_searches, write_searches
from loracompose.evaluation.tasks import draw, read_tasks
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.training.data import Example
from loracompose.training.lorahub import fit_lorahub

EXAMPLES, STEPS = 5, 40  # as in the paper


def searched(base: BaseModel, task: str, pool: Sequence[Adapter], examples: Sequence[Example], seed: int) -> Search:
    """The weights of one task in one pool."""
    fitted = fit_lorahub(base.model, base.tokenizer, pool, examples, budget=STEPS, seed=seed)
    weights = dict(fitted.learned or ())
    return Search(task, {adapter.name: weights[adapter.fingerprint] for adapter in pool})


def main() -> None:
    """Search what is not there yet, and write after each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--dtype", default="auto", help="of the base")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    names = sorted(config.parent.name for config in given.adapters.glob("*/adapter_config.json"))
    pool = [load_adapter(given.adapters / name) for name in names]
    rows = draw(read_tasks(given.tasks, "train"), EXAMPLES, given.seed)
    found = read_searches(given.output) if given.output.exists() else []
    known = {(search.task, frozenset(search.weights)) for search in found}
    base = load_base(given.base, dtype=given.dtype)
    with Progress() as bar:
        shown = bar.add_task("tasks", total=len(names))
        for task in names:
            examples = [Example(row.prompt, row.response, task) for row in rows if row.task == task]
            for own in (pool, [adapter for adapter in pool if adapter.name != task]):
                if (task, frozenset(adapter.name for adapter in own)) not in known:
                    found.append(searched(base, task, own, examples, given.seed))
            write_searches(found, given.output)
            bar.advance(shown)


if __name__ == "__main__":
    main()
