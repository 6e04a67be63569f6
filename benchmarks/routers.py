"""Train the routers of every method that learns, at shares of one budget of tokens that are printed first.

    python benchmarks/routers.py TASKS ADAPTERS index/routers --index INDEX

TASKS holds `<task>.train.jsonl` and `<task>.dev.jsonl` files with "prompt", "response" and "task"; ADAPTERS one adapter
per task, named as the task; INDEX is an index of them, built beside the output if it is not given. A router that is
already in the output is not trained again, and one that was interrupted continues where it stopped. `--list` prints
the shares and stops; `--steps 3` makes a smoke test of it.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from loracompose import AdapterIndex
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.training.router import RouterReport, train_router
from loracompose.training.router_recipe import RouterRecipe
from loracompose.training.task_mixture import TaskMixture, task_mixture

BATCH, MAX_LENGTH = 8, 112
BUDGET = 2_500_000  # tokens, prompts and responses together
SEEN = 0.4  # the part of the tasks that RAMoLE is trained on; the others are for its zero-shot test


@dataclass(frozen=True)
class Run:
    """One router.

    Attributes:
        name: its folder.
        method: the composer.
        share: of the budget.
        settings: of the method.
        recipe: fields of the recipe that are not those of every run.
        unseen: whether some tasks and their adapters are kept from it.
        capped: so many rows in all, shared by the tasks, repeated as often as the share pays; None takes every row.
    """

    name: str
    method: str
    share: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    recipe: Mapping[str, Any] = field(default_factory=dict)
    unseen: bool = False
    capped: int | None = None


# Seen in training is what is retrieved at inference, now and then without the best, as for a new kind of prompt.
RETRIEVED: Mapping[str, Any] = {"members": "retrieved", "k": 3, "hide_own": 0.25}
RUNS = (
    Run("ramole", "ramole", 0.2, recipe={"members": "all", "adapter_dropout": 0.5}, unseen=True),
    Run("lora_flow", "lora_flow", 0.12, recipe={**RETRIEVED, "weight_decay": 0.1}, capped=840),
    Run("mole", "mole", 0.14, recipe=RETRIEVED),
    Run("milora", "milora", 0.14, recipe=RETRIEVED),
    Run("smora", "smora", 0.14, {"form": "pool"}, recipe=RETRIEVED),
    Run("phatgoose", "phatgoose", 0.08, recipe={"members": "own", "learning_rate": 5e-3, "schedule": "constant"}),
    Run("cat", "cat", 0.08, recipe={**RETRIEVED, "learning_rate": 5e-2}),
    Run("xlora", "xlora", 0.1, recipe=RETRIEVED),
)


@dataclass(frozen=True)
class Plan:
    """A run with what it comes to."""

    run: Run
    recipe: RouterRecipe
    tasks: tuple[str, ...]
    tokens: int


def recipe_of(run: Run, tasks: Sequence[str], seed: int, steps: int) -> RouterRecipe:
    """The recipe of a run of so many steps: 10 % of them to warm up, four measurements of the dev loss."""
    common = RouterRecipe(
        steps=steps,
        batch_size=BATCH,
        warmup=math.ceil(steps / 10),
        max_length=MAX_LENGTH,
        tasks=tuple(tasks),
        # no row twice, unless the method is to learn from few
        per_task=math.ceil((run.capped or steps * BATCH) / len(tasks)),
        dev_per_task=4,
        eval_every=math.ceil(steps / 4),
        seed=seed,
    )
    return replace(common, **run.recipe)


def planned(run: Run, budget: int, tasks: Sequence[str], rows: TaskMixture, seed: int, steps: int | None) -> Plan:
    """As many steps as the share of the budget pays for."""
    mean = sum(
        sum(rows.encoded[i].length for i in places) / len(places)
        for task, places in rows.by_task.items()
        if task in tasks
    ) / len(tasks)
    count = steps or max(1, round(run.share * budget / (BATCH * mean)))
    return Plan(run, recipe_of(run, tasks, seed, count), tuple(tasks), round(count * BATCH * mean))


def seen_tasks(tasks: Sequence[str], seed: int) -> list[str]:
    """The tasks that RAMoLE may see."""
    return sorted(random.Random(seed).sample(sorted(tasks), round(SEEN * len(tasks))))


def show(plans: Sequence[Plan], budget: int) -> None:
    """The runs and their shares."""
    table = Table("router", "steps", "tokens", "share", "tasks", "members", title=f"{budget:,} tokens")
    for plan in plans:
        share = f"{plan.tokens / budget:.1%}"
        table.add_row(
            plan.run.name,
            str(plan.recipe.steps),
            f"{plan.tokens:,}",
            share,
            str(len(plan.tasks)),
            plan.recipe.members,
        )
    total = sum(plan.tokens for plan in plans)
    table.add_row("all", "", f"{total:,}", f"{total / budget:.1%}", "", "")
    Console().print(table)


def train(plan: Plan, data: Path, adapters: Path, index: AdapterIndex, output: Path, base: BaseModel) -> RouterReport:
    """Train one router, or go on with it."""
    pool: Any = [adapters / task for task in plan.tasks] if plan.run.unseen else index
    return train_router(
        plan.run.method,
        data,
        pool,
        output / plan.run.name,
        base=base,
        settings=plan.run.settings,
        recipe=plan.recipe,
        dev=data,
    )


def main() -> None:
    """Print the shares, then train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--index", type=Path)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--only", nargs="*", choices=[run.name for run in RUNS], default=[run.name for run in RUNS])
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the frozen base")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()

    base = load_base(given.base, dtype=given.dtype)
    tasks = sorted(config.parent.name for config in given.adapters.glob("*/adapter_config.json"))
    rows = task_mixture(given.data, base.tokenizer, tasks=tasks, per_task=200, max_length=MAX_LENGTH, seed=given.seed)
    plans = [
        planned(
            run, given.budget, seen_tasks(tasks, given.seed) if run.unseen else tasks, rows, given.seed, given.steps
        )
        for run in RUNS
        if run.name in given.only
    ]
    show(plans, given.budget)
    if given.list:
        return
    given.output.mkdir(parents=True, exist_ok=True)
    with opened(given.index, given.adapters, given.output) as index:
        results = Table("router", "steps", "s/step", "seconds", "parameters", "first loss", "dev loss")
        for plan in plans:
            if (given.output / plan.run.name).exists():
                continue
            report = train(plan, given.data, given.adapters, index, given.output, base)
            dev_loss = "" if report.dev_loss is None else f"{report.dev_loss:.3f}"
            per_step, first = f"{report.seconds / report.steps:.2f}", f"{report.losses[0]:.3f}"
            numbers = (str(report.steps), per_step, f"{report.seconds:.0f}", f"{report.parameters:,}")
            results.add_row(plan.run.name, *numbers, first, dev_loss)
    Console().print(results)


def opened(index: Path | None, adapters: Path, output: Path) -> AdapterIndex:
    """The index given, or one of the adapters beside the output."""
    if index is not None:
        return AdapterIndex.open(index)
    target = output.with_name(f"{output.name}.index")
    return AdapterIndex.open(target) if target.exists() else AdapterIndex.build(adapters, target)


if __name__ == "__main__":
    main()
