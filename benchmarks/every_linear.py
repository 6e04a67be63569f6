"""Train adapters that adapt every linear module, for what cannot be seen in a pool that adapts attention alone.

    python benchmarks/every_linear.py TASKS OUTPUT

TASKS holds `<task>.train.jsonl` files. In a pool of attention adapters one gate for each part of a block and one for
each block are the same gate, so whether MoLE's layer granularity differs from its block granularity needs these. What
is in OUTPUT is not trained again. `benchmarks/response_loss.py --pool OUTPUT` says what to do with them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from loracompose.models import DEFAULT_BASE
from loracompose.training.adapter import train_adapter
from loracompose.training.recipe import Recipe

TASKS = ("clinc_domain", "snips_intent", "sst2", "subj", "trec")  # short ones: a step of theirs costs least
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    """Train what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, default=72)
    parser.add_argument("--base", default=DEFAULT_BASE)
    parser.add_argument("--dtype", default="auto", help="of the frozen base")
    given = parser.parse_args()
    for task in TASKS:
        if (given.output / task).exists():
            continue
        recipe = Recipe(
            rank=8,
            target_modules=MODULES,
            steps=given.steps,
            batch_size=8,
            max_length=96,
            schedule="linear",
            dtype=given.dtype,
        )
        train_adapter(given.tasks / f"{task}.train.jsonl", given.output / task, base=given.base, recipe=recipe)


if __name__ == "__main__":
    main()
