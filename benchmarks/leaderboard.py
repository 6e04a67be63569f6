"""The whole leaderboard from two folders, in one command: index, whatever is trained, answers, scores.

    python benchmarks/leaderboard.py TASKS ADAPTERS WORK
    python benchmarks/leaderboard.py TASKS ADAPTERS WORK --report

TASKS holds `<task>.train.jsonl`, `<task>.dev.jsonl` and `<task>.test.jsonl` files, ADAPTERS one adapter a task, named
as the task and with its card. What is made on the way stands in WORK, and what is there is not made again: stopped, it
goes on where it was; for other tasks, adapters or another dtype it asks for another WORK. After all methods on some
rows come the finalists under every protocol, and the finalists on all rows; answers are shared. The second command
makes report, README and documents anew from the results; it runs no model.

What can run side by side does, in `--jobs` processes: what is trained, then the answers to a plan, in shares of a few
lines. What they print goes to WORK/logs. The plan itself runs alone then, finds every answer there, takes the times and
writes the results, before the next plan begins. How long it all took, in however many sittings, stands in
leaderboard_run.json beside the results.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rich.console import Console

from loracompose.benchmarks.made_with import made_otherwise
from loracompose.durable import write_whole
from loracompose.marked import fill

HERE = Path(__file__).parent
ROOT = HERE.parent
RESULTS = HERE / "results"
PLANS = ("leaderboard", "finalists", "all_rows")  # FILE.toml here is what is asked, FILE.json in the results the answer
SCRIPT = [sys.executable]
COMMAND = [*SCRIPT, "-c", "from loracompose.cli import app; app()"]
STEPS = 96  # of 8 rows, of every router
RUN = "leaderboard_run.json"  # beside the results
GUIDE = ROOT / "docs" / "which_method.md"
SHARE = 3  # lines of a plan that one process answers: each pays for loading the model and for retrieval
POLL = 0.5  # seconds

# Asked at the posterior's weights and at equal ones; the others at equal ones alone.
ON_BOTH = ("ramole", "lora_flow", "mole", "smora")
ON_EQUAL = ("milora", "phatgoose", "cat", "xlora")


@dataclass(frozen=True, eq=False)
class Step:
    """One command.

    Attributes:
        name: of its log.
        command: its words.
    """

    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class Took:
    """How long a step ran, in seconds from its start to its end."""

    name: str
    seconds: float


Keep = Callable[[Took], None]


def learned(routers: Path, multi: Path, weights: Path) -> list[str]:
    """The lines of what was trained, for `loracompose eval run -x`."""
    lines = [f"adapter {word('path', multi)} label=multi_task", f"lorahub {word('weights', weights)}"]
    lines += [f"{name} {word('router', routers / name)}" for name in ON_BOTH]
    return lines + [f"{name} weighting=uniform {word('router', routers / name)}" for name in (*ON_BOTH, *ON_EQUAL)]


def word(key: str, file: Path) -> str:
    """A file in a line, whatever blanks its name has."""
    return shlex.quote(f"{key}={file}")


def indexed(work: Path, adapters: Path) -> list[Step]:
    """The index, if it is not there yet: what is trained needs it."""
    build = [*COMMAND, "index", "build", str(adapters), str(work / "index"), "--strict"]
    return [] if (work / "index").exists() else [Step("index", build)]


def trained(work: Path, tasks: Path, adapters: Path, dtype: str) -> list[Step]:
    """Whatever learns and is not there yet; none needs another."""
    data, index = (str(tasks), str(adapters)), ("--index", str(work / "index"))
    routers = [*SCRIPT, str(HERE / "routers.py"), *data, str(work / "routers"), *index, "--steps", str(STEPS)]
    steps = []
    if not (work / "multi_task").exists():
        steps.append(Step("multi_task", [*SCRIPT, str(HERE / "multi_task.py"), str(tasks), str(work / "multi_task")]))
    # It looks itself which tasks are not there yet.
    steps.append(Step("lorahub", [*SCRIPT, str(HERE / "lorahub_weights.py"), *data, str(work / "lorahub.json")]))
    for name in (*ON_BOTH, *ON_EQUAL):
        if not (work / "routers" / name).exists():
            steps.append(Step(name, [*routers, "--only", name]))
    return [Step(step.name, [*step.command, "--dtype", dtype]) for step in steps]


def finalists(routers: Path, multi: Path) -> list[str]:
    """Those of the learned lines that are asked under every protocol and on all rows."""
    flow = word("router", routers / "lora_flow")
    return [f"adapter {word('path', multi)} label=multi_task", f"lora_flow weighting=uniform {flow}"]


def more(plan: str, work: Path) -> list[str]:
    """The lines that a plan gets beside its own."""
    routers, multi = work / "routers", work / "multi_task"
    return learned(routers, multi, work / "lorahub.json") if plan == PLANS[0] else finalists(routers, multi)


def answering(work: Path, tasks: Path, dtype: str, plan: Path, output: Path, rows: int | None) -> list[str]:
    """The command that answers and scores a plan."""
    command = [*COMMAND, "eval", "run", str(tasks), "-i", str(work / "index"), "--dtype", dtype, "--plan", str(plan)]
    command += ["-o", str(output), "--cache", str(work / "answers.sqlite")]
    return command if rows is None else [*command, "-n", str(rows)]


def asked(plan: str, work: Path, tasks: Path, dtype: str, results: Path, rows: int | None) -> Step:
    """The step that scores a plan, and answers what no share of it has; times are taken with the first plan."""
    command = answering(work, tasks, dtype, HERE / f"{plan}.toml", results / f"{plan}.json", rows)
    timed = [] if plan == PLANS[0] else ["--timed-rows", "0"]
    return Step(plan, [*command, *timed, *(word for line in more(plan, work) for word in ("-x", line))])


def shares(plan: str, work: Path, tasks: Path, dtype: str, rows: int | None) -> list[Step]:
    """A plan in shares of a few lines, whose answers go to the same cache; those that are not answered yet.

    Their own plans are written to WORK, with their results beside them; a share whose plan is the same and that has
    results was answered before.
    """
    said = tomllib.loads((HERE / f"{plan}.toml").read_text(encoding="utf-8"))
    lines = [*said["methods"], *more(plan, work)]
    count = -(-len(lines) // SHARE)
    steps = []
    for place in range(count):
        name = f"{plan}-{place + 1}-of-{count}"
        file = work / "shares" / f"{name}.toml"
        # Every count-th line, for neighbours are alike: the slow ones would all be one's.
        content = {**said, "methods": lines[place::count], "rows": said["rows"] if rows is None else rows}
        text = "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in content.items())
        results = file.with_suffix(".json")
        if results.exists() and file.read_text(encoding="utf-8") == text:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        results.unlink(missing_ok=True)  # of another plan
        write_whole(file, text)
        command = answering(work, tasks, dtype, file, results, None)
        steps.append(Step(name, [*command, "--timed-rows", "0"]))
    return steps


def reported(results: Path, work: Path) -> list[Step]:
    """The commands that make everything anew that is made from the results."""
    first, *others = PLANS
    table = results / f"{first}.json"
    page = ["--html", str(work / f"{first}.html"), "--readme", str(ROOT / "README.md")]
    curves = ["--curves", str(RESULTS / "sensitivity.json"), "--guide", str(GUIDE)]
    report = [*COMMAND, "eval", "report"]
    protocols = ["--readme", str(ROOT / "docs" / "protocols.md")]
    return [
        Step("report", [*report, str(table), *page, *curves]),
        *(
            Step(f"report-{plan}", [*report, str(results / f"{plan}.json"), *protocols, "--block", plan])
            for plan in others
        ),
        Step("learned", [*SCRIPT, str(HERE / "learned_report.py"), str(table)]),
    ]


def told(record: Mapping[str, Any]) -> str:
    """How long a run took, for the page that says how to make it again."""
    sittings = record["sittings"]
    kinds: dict[str, float] = {}
    for step in (step for sitting in sittings for step in sitting["steps"]):
        kind = "answers" if "-of-" in step["name"] else "scores and times" if step["name"] in PLANS else "what learns"
        kinds["index" if step["name"] == "index" else kind] = kinds.get(kind, 0.0) + step["seconds"]
    minutes = sum(sitting["seconds"] for sitting in sittings) / 60
    parts = ", ".join(f"{kind} {seconds / 60:.0f}" for kind, seconds in kinds.items())
    machine = f"{sittings[-1]['jobs']} processes at once on {sittings[-1]['cores']} cores"
    names = {step["name"] for sitting in sittings for step in sitting["steps"]}
    scored = " and ".join(plan for plan in PLANS if plan in names) or "no plan yet"
    count = "one sitting" if len(sittings) == 1 else f"{len(sittings)} sittings"
    return (
        f"The first command took {minutes:.0f} minutes for {scored} in {count}, {machine}; minutes of its processes, "
        f"added up: {parts} ([{RUN}](../benchmarks/results/{RUN}))."
    )


def shown(step: Step) -> str:
    """A step as one would type it."""
    return " ".join(f'"{word}"' if " " in word else word for word in step.command)


def run(steps: Sequence[Step], keep: Keep = lambda took: None) -> None:
    """One after the other, their output on the terminal; the first that fails ends it with its status."""
    for step in steps:
        Console(soft_wrap=True).print(shown(step), markup=False, highlight=False)
        start = time.monotonic()
        if status := subprocess.run(step.command, check=False).returncode:
            raise SystemExit(status)
        keep(Took(step.name, time.monotonic() - start))


def run_beside(steps: Sequence[Step], jobs: int, logs: Path, keep: Keep = lambda took: None) -> None:
    """So many at once, their output in a file each; the first that fails ends all with its status."""
    out = Console(soft_wrap=True)
    logs.mkdir(parents=True, exist_ok=True)
    # Several threads of several processes would wait for one another.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    waiting, ended = list(steps), 0
    with running(environment, logs) as processes:
        while waiting or processes.current:
            while waiting and len(processes.current) < jobs:
                processes.start(waiting.pop(0))
            for step, seconds, status in processes.ended():
                ended += 1
                out.print(f"{ended} of {len(steps)}: {step.name}, {seconds:.0f} s", highlight=False)
                if status:
                    log = logs / f"{step.name}.txt"
                    out.print(f"{shown(step)}\nended with {status}; {log} ends with", markup=False, highlight=False)
                    out.print(log.read_text(encoding="utf-8")[-2000:], markup=False, highlight=False)
                    raise SystemExit(status)
                keep(Took(step.name, seconds))
            time.sleep(POLL)


class Processes:
    """Steps that run now, each with its start, its process and its log."""

    def __init__(self, environment: dict[str, str], logs: Path) -> None:
        self.current: dict[Step, tuple[float, subprocess.Popen[bytes], IO[bytes]]] = {}
        self._environment = environment
        self._logs = logs

    def start(self, step: Step) -> None:
        """Begin a step."""
        log = (self._logs / f"{step.name}.txt").open("wb")
        process = subprocess.Popen(step.command, env=self._environment, stdout=log, stderr=subprocess.STDOUT)
        self.current[step] = (time.monotonic(), process, log)

    def ended(self) -> Iterator[tuple[Step, float, int]]:
        """Those that have ended since, with their seconds and their status."""
        for step, (start, process, log) in list(self.current.items()):
            if (status := process.poll()) is not None:
                log.close()
                del self.current[step]
                yield step, time.monotonic() - start, status

    def stop(self) -> None:
        """End all that run."""
        for _, process, log in self.current.values():
            process.terminate()
            process.wait()
            log.close()


@contextmanager
def running(environment: dict[str, str], logs: Path) -> Iterator[Processes]:
    """Processes that do not outlive an error or an interrupt."""
    processes = Processes(environment, logs)
    try:
        yield processes
    finally:
        processes.stop()


def main() -> None:
    """Run what is missing, or the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("adapters", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("-n", "--rows", type=int, help="of a task; those of the plan if not given")
    parser.add_argument("-j", "--jobs", type=int, default=os.cpu_count() or 1, help="processes at once")
    parser.add_argument("--dtype", default="bfloat16", help="of the base model")
    parser.add_argument("--only", nargs="+", choices=PLANS, default=PLANS, help="plans; all if not given")
    parser.add_argument("--report", action="store_true", help="only from the results that are there")
    parser.add_argument("--list", action="store_true", help="show the commands and stop")
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {given.jobs}")
    given.work.mkdir(parents=True, exist_ok=True)
    stages = staged(given)
    if given.list:
        for step in [*reported(given.output, given.work)] if given.report else (s for stage in stages for s in stage):
            Console(soft_wrap=True).print(shown(step), markup=False, highlight=False)
    elif given.report:
        report(given.output, given.work)
    elif (other := made_otherwise(given.work, settings_of_work(given))) is not None:
        parser.error(f"{given.work} was made with {other}; give the same, or another WORK")
    else:
        carry_out(stages, given.jobs, given.work, given.output)


def settings_of_work(given: argparse.Namespace) -> dict[str, str | int]:
    """What decides the index and whatever is trained in WORK."""
    return {"dtype": given.dtype, "tasks": str(given.tasks.resolve()), "adapters": str(given.adapters.resolve())}


def staged(given: argparse.Namespace) -> list[list[Step]]:
    """What waits for what: the steps of a stage need nothing of one another."""
    stages = [
        indexed(given.work, given.adapters),
        trained(given.work, given.tasks, given.adapters, given.dtype),
    ]
    for plan in given.only:
        stages.append(shares(plan, given.work, given.tasks, given.dtype, given.rows))
        stages.append([asked(plan, given.work, given.tasks, given.dtype, given.output, given.rows)])
    return stages


def report(output: Path, work: Path) -> None:
    """Make everything anew that is made from the results."""
    run(reported(output, work))
    if (output / RUN).exists():
        record = json.loads((output / RUN).read_text(encoding="utf-8"))
        write_whole(GUIDE, fill(GUIDE.read_text(encoding="utf-8"), {"run": told(record)}))


def carry_out(stages: Sequence[Sequence[Step]], jobs: int, work: Path, output: Path) -> None:
    """Stage by stage; a step alone has all threads. How long all took goes to WORK, and to the output at last."""
    kept = work / RUN
    before = json.loads(kept.read_text(encoding="utf-8"))["sittings"] if kept.exists() else []
    now: dict[str, Any] = {"seconds": 0, "jobs": jobs, "cores": os.cpu_count(), "steps": []}
    start = time.monotonic()

    def save() -> None:
        now["seconds"] = round(time.monotonic() - start)
        write_whole(kept, json.dumps({"sittings": [*before, now]}, indent=1) + "\n")

    def keep(took: Took) -> None:
        now["steps"].append({"name": took.name, "seconds": round(took.seconds)})
        save()

    try:
        for stage in stages:
            if len(stage) == 1:
                run(stage, keep)
            else:
                run_beside(stage, jobs, work / "logs", keep)
    finally:  # an interrupt counts what its unfinished steps took: their answers are kept as well
        save()
    output.mkdir(parents=True, exist_ok=True)
    write_whole(output / RUN, kept.read_text(encoding="utf-8"))
    minutes = sum(sitting["seconds"] for sitting in [*before, now]) / 60
    Console().print(f"{minutes:.0f} minutes, {len(before) + 1} sittings, {jobs} at once", highlight=False)


if __name__ == "__main__":
    main()
