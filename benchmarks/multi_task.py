"""Train one adapter on all tasks together: the baseline that every composition of separate adapters is held against.

    python benchmarks/multi_task.py TASKS OUTPUT --per-task 60

TASKS holds `<task>.train.jsonl` files; the same number of rows of every task is drawn, evenly over its phrasings. Then

    loracompose eval run TASKS -i INDEX -x "adapter path=OUTPUT label=multi_task" -o results.json

`--list` prints what it would train on and stops.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from loracompose.evaluation.tasks import draw, read_tasks
from loracompose.models import DEFAULT_BASE, load_tokenizer
from loracompose.training.adapter import CardText, train_adapter
from loracompose.training.data import encode_examples, read_examples
from loracompose.training.recipe import Recipe

MOST = 200  # rows a task; a pool of separate adapters had more each, and none of them saw the other tasks


def main() -> None:
    """Say how much there is to learn, then train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--per-task", type=int, default=MOST)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="auto", help="of the frozen base")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    if not 1 <= given.per_task <= MOST:
        parser.error(f"--per-task must be between 1 and {MOST}, got {given.per_task}")

    rows = draw(read_tasks(given.tasks, "train"), given.per_task, given.seed)
    pairs = [{"prompt": row.prompt, "response": row.response} for row in rows]
    encoded = encode_examples(load_tokenizer(given.base), read_examples(pairs), given.max_length)
    tokens = sum(example.length for example in encoded)
    out = Console()
    out.print(f"{len(encoded)} of {len(rows)} rows of {len({row.task for row in rows})} tasks, {tokens:,} tokens")
    if given.list:
        return
    recipe = Recipe(
        rank=given.rank,
        batch_size=given.batch_size,
        max_length=given.max_length,
        seed=given.seed,
        schedule="linear",
        dtype=given.dtype,
    )
    report = train_adapter(
        pairs,
        given.output,
        base=given.base,
        recipe=recipe,
        card=CardText(description=f"all tasks together, {given.per_task} rows of each", tags=("multi-task",)),
    )
    out.print(f"{report.output}: {report.steps} steps, {report.seconds:.0f} s, last loss {report.losses[-1]:.3f}")


if __name__ == "__main__":
    main()
