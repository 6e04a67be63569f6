"""The whole leaderboard from two folders, in one command: index, whatever is trained, answers, scores.

    python benchmarks/leaderboard.py TASKS ADAPTERS WORK
    python benchmarks/leaderboard.py TASKS ADAPTERS WORK --report

TASKS holds `<task>.train.jsonl`, `<task>.dev.jsonl` and `<task>.test.jsonl` files, ADAPTERS one adapter a task, named
as the task and with its card. What is made on the way stands in WORK, and what is there is not made again: stopped, it
goes on where it was; take another WORK when tasks or adapters change. The second command makes report, README and
documents anew from the results; it runs no model.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PLAN = HERE / "leaderboard.toml"
SCRIPT = [sys.executable]
COMMAND = [*SCRIPT, "-c", "from loracompose.cli import app; app()"]
STEPS = 96  # of 8 rows, of every router

# Asked at the posterior's weights and at equal ones; the others at equal ones alone.
ON_BOTH = ("ramole", "lora_flow", "mole", "smora")
ON_EQUAL = ("milora", "phatgoose", "cat", "xlora")


def learned(routers: Path, multi: Path, weights: Path) -> list[str]:
    """The lines of what was trained, for `loracompose eval run -x`."""
    lines = [f"adapter path={multi} label=multi_task", f"lorahub weights={weights}"]
    lines += [f"{name} router={routers / name}" for name in ON_BOTH]
    return lines + [f"{name} weighting=uniform router={routers / name}" for name in (*ON_BOTH, *ON_EQUAL)]


def made(work: Path, tasks: Path, adapters: Path, dtype: str) -> list[list[str]]:
    """The commands whose output is not there yet."""
    commands = []
    if not (work / "index").exists():
        commands.append([*COMMAND, "index", "build", str(adapters), str(work / "index"), "--strict"])
    if not (work / "multi_task").exists():
        commands.append([*SCRIPT, str(HERE / "multi_task.py"), str(tasks), str(work / "multi_task"), "--dtype", dtype])
    data, index = (str(tasks), str(adapters)), ("--index", str(work / "index"))
    routers = [*SCRIPT, str(HERE / "routers.py"), *data, str(work / "routers"), *index, "--steps", str(STEPS)]
    weights = [*SCRIPT, str(HERE / "lorahub_weights.py"), *data, str(work / "lorahub.json")]
    return [*commands, *([*command, "--dtype", dtype] for command in (routers, weights))]  # only what is not there


def asked(work: Path, tasks: Path, dtype: str, output: Path, rows: int | None) -> list[str]:
    """The command that answers and scores."""
    command = [*COMMAND, "eval", "run", str(tasks)]
    command += ["-i", str(work / "index"), "--plan", str(PLAN), "--dtype", dtype, "-o", str(output)]
    command += ["--cache", str(work / "answers.sqlite")]
    if rows is not None:
        command += ["-n", str(rows)]
    for line in learned(work / "routers", work / "multi_task", work / "lorahub.json"):
        command += ["-x", line]
    return command


def reported(output: Path, work: Path) -> list[list[str]]:
    """The commands that make everything anew that is made from the results."""
    report = [*COMMAND, "eval", "report", str(output)]
    curves = ["--curves", str(RESULTS / "sensitivity.json"), "--guide", str(ROOT / "docs" / "which_method.md")]
    return [
        [*report, "--html", str(work / "leaderboard.html"), "--readme", str(ROOT / "README.md"), *curves],
        [*SCRIPT, str(HERE / "learned_report.py"), str(output)],
    ]


def main() -> None:
    """Run what is missing, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "leaderboard.json")
    parser.add_argument("-n", "--rows", type=int, help="of a task; those of the plan if not given")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model")
    parser.add_argument("--report", action="store_true", help="only from the results that are there")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    commands = reported(given.output, given.work)
    if not given.report:
        answers = asked(given.work, given.tasks, given.dtype, given.output, given.rows)
        commands = [*made(given.work, given.tasks, given.adapters, given.dtype), answers]
    run(commands, only_list=given.list)


def run(commands: Sequence[Sequence[str]], *, only_list: bool) -> None:
    """One after the other; the first that fails ends it."""
    out = Console(soft_wrap=True)
    for command in commands:
        out.print(" ".join(f'"{word}"' if " " in word else word for word in command), markup=False, highlight=False)
        if not only_list and (status := subprocess.run(command, check=False).returncode):
            raise SystemExit(status)


if __name__ == "__main__":
    main()
