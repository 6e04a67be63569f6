"""The whole leaderboard from two folders, in one command: index, whatever is trained, answers, scores.

    python benchmarks/leaderboard.py TASKS ADAPTERS WORK
    python benchmarks/leaderboard.py TASKS ADAPTERS WORK --report

TASKS holds `<task>.train.jsonl`, `<task>.dev.jsonl` and `<task>.test.jsonl` files, ADAPTERS one adapter a task, named
as the task and with its card. What is made on the way stands in WORK, and what is there is not made again: stopped, it
goes on where it was; take another WORK when tasks or adapters change. After all methods on some rows come the finalists
under every protocol, and the finalists on all rows; answers are shared. The second command makes report, README and
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
PLANS = ("leaderboard", "finalists", "all_rows")  # FILE.toml here is what is asked, FILE.json in the results the answer
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


def finalists(routers: Path, multi: Path) -> list[str]:
    """Those of the learned lines that are asked under every protocol and on all rows."""
    return [f"adapter path={multi} label=multi_task", f"lora_flow weighting=uniform router={routers / 'lora_flow'}"]


def asked(work: Path, tasks: Path, dtype: str, results: Path, rows: int | None) -> list[list[str]]:
    """The commands that answer and score, a plan each."""
    routers, multi = work / "routers", work / "multi_task"
    few = finalists(routers, multi)
    more = dict(zip(PLANS, (learned(routers, multi, work / "lorahub.json"), few, few), strict=True))
    commands = []
    for plan in PLANS:
        command = [*COMMAND, "eval", "run", str(tasks), "-i", str(work / "index"), "--dtype", dtype]
        command += ["--plan", str(HERE / f"{plan}.toml"), "-o", str(results / f"{plan}.json")]
        command += ["--cache", str(work / "answers.sqlite")]
        if plan != PLANS[0]:
            command += ["--timed-rows", "0"]
        if rows is not None:
            command += ["-n", str(rows)]
        commands.append([*command, *(word for line in more[plan] for word in ("-x", line))])
    return commands


def reported(results: Path, work: Path) -> list[list[str]]:
    """The commands that make everything anew that is made from the results."""
    first, *others = PLANS
    table = results / f"{first}.json"
    page = ["--html", str(work / f"{first}.html"), "--readme", str(ROOT / "README.md")]
    curves = ["--curves", str(RESULTS / "sensitivity.json"), "--guide", str(ROOT / "docs" / "which_method.md")]
    report = [*COMMAND, "eval", "report"]
    return [
        [*report, str(table), *page, *curves],
        *(
            [*report, str(results / f"{plan}.json"), "--readme", str(ROOT / "docs" / "protocols.md"), "--block", plan]
            for plan in others
        ),
        [*SCRIPT, str(HERE / "learned_report.py"), str(table)],
    ]


def main() -> None:
    """Run what is missing, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("-n", "--rows", type=int, help="of a task; those of the plan if not given")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model")
    parser.add_argument("--report", action="store_true", help="only from the results that are there")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    commands = reported(given.output, given.work)
    if not given.report:
        made_first = made(given.work, given.tasks, given.adapters, given.dtype)
        commands = [*made_first, *asked(given.work, given.tasks, given.dtype, given.output, given.rows)]
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
