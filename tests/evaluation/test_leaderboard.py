"""benchmarks/leaderboard.py: one command asks for everything that there is, and trains what is not there yet."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import sys
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

from loracompose.cli.evaluating import read_plan
from loracompose.composers import COMPOSERS
from loracompose.evaluation.protocols import PROTOCOLS, get_protocol
from loracompose.evaluation.specification import BASELINES
from loracompose.marked import fill

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def leaderboard():
    source = importlib.util.spec_from_file_location("leaderboard", BENCHMARKS / "leaderboard.py")
    module = importlib.util.module_from_spec(source)
    sys.modules[source.name] = module  # where dataclasses look for their module
    source.loader.exec_module(module)
    yield module
    del sys.modules[source.name]


def lines(leaderboard):
    plan = tomllib.loads((BENCHMARKS / "leaderboard.toml").read_text())
    return [*plan["methods"], *leaderboard.learned(Path("routers"), Path("multi"), Path("weights"))], plan


def whole(leaderboard, plan, work=Path("work"), rows=None):
    return leaderboard.asked(plan, work, Path("tasks"), "bfloat16", Path("results"), rows)


def test_every_composer_and_every_baseline_is_asked(leaderboard):
    asked, plan = lines(leaderboard)
    assert {line.split()[0] for line in asked} == {*COMPOSERS, *BASELINES, "lorauter"}
    assert len(set(asked)) == len(asked)
    assert plan["rows"] == 25
    assert [get_protocol(name).name for name in plan["protocols"]] == ["in-domain", "masked"]


def test_every_method_that_learns_is_asked_with_its_router_and_no_other(leaderboard):
    asked, _ = lines(leaderboard)
    with_router = {line.split()[0] for line in asked if "router=" in line}
    assert with_router == {name for name, kind in COMPOSERS.items() if hasattr(kind, "initial")}


def test_folders_with_blanks_in_their_names_are_one_word_of_a_line(leaderboard):
    folder = Path("my work")
    for line in leaderboard.more(leaderboard.PLANS[0], folder):
        (file,) = (word for word in shlex.split(line) if "my work" in word)
        assert Path(file.partition("=")[2]).parts[0] == "my work"


def test_the_finalists_are_asked_under_every_protocol_and_on_all_rows_from_the_same_answers(leaderboard):
    first, finalists, all_rows = (whole(leaderboard, plan).command for plan in leaderboard.PLANS)
    plans = [Path(command[command.index("--plan") + 1]) for command in (first, finalists, all_rows)]
    _, under_every, on_all = (tomllib.loads(plan.read_text()) for plan in plans)
    assert {get_protocol(name).name for name in under_every["protocols"]} == set(PROTOCOLS)
    assert on_all["rows"] == 0
    methods = lines(leaderboard)[1]["methods"]
    learned = {word for word in first if "router=" in word or "path=" in word}
    for plan, command in ((under_every, finalists), (on_all, all_rows)):
        assert set(plan["methods"]) <= set(methods)
        assert {word for word in command if "router=" in word or "path=" in word} <= learned
        assert command[command.index("--cache") + 1] == first[first.index("--cache") + 1]
    for plan in leaderboard.PLANS:
        few = whole(leaderboard, plan, rows=1).command
        assert few[few.index("-n") + 1] == "1"


def test_the_shares_of_a_plan_are_its_lines_each_once_and_otherwise_the_plan(leaderboard, tmp_path):
    for plan in leaderboard.PLANS:
        command = whole(leaderboard, plan, work=tmp_path).command
        said = tomllib.loads((BENCHMARKS / f"{plan}.toml").read_text())
        added = [word for before, word in pairwise(command) if before == "-x"]
        steps = leaderboard.shares(plan, tmp_path, Path("tasks"), "bfloat16", None)
        files = [Path(step.command[step.command.index("--plan") + 1]) for step in steps]
        shares = [read_plan(file) for file in files]
        assert sorted(line for share in shares for line in share["methods"]) == sorted([*said["methods"], *added])
        assert all(1 <= len(share["methods"]) <= leaderboard.SHARE for share in shares)
        assert all({**share, "methods": said["methods"]} == said for share in shares)
        commands = [command, *(step.command for step in steps)]
        assert {words[words.index("--cache") + 1] for words in commands} == {str(tmp_path / "answers.sqlite")}
        outputs = {words[words.index("-o") + 1] for words in commands}
        assert len(outputs) == len(steps) + 1  # no share writes over the results


def test_a_share_that_was_answered_is_not_asked_again_unless_its_plan_is_another(leaderboard, tmp_path):
    def names(rows=None):
        return [step.name for step in leaderboard.shares("finalists", tmp_path, Path("tasks"), "bfloat16", rows)]

    every = names()
    assert names() == every
    (tmp_path / "shares" / f"{every[1]}.json").write_text("{}")
    assert names() == [every[0], *every[2:]]
    assert names(rows=1) == every
    assert names() == every  # whose answers may be other rows'


def test_everything_that_is_made_from_results_is_made_by_the_report(leaderboard):
    commands = [step.command for step in leaderboard.reported(Path("results"), Path("work"))]
    made = {word for command in commands for word in command if word.endswith((".md", ".html"))}
    assert {Path(file).name for file in made} == {"README.md", "which_method.md", "protocols.md", "leaderboard.html"}
    assert commands[-1][1].endswith("learned_report.py")
    read = {Path(word).name for command in commands for word in command if word.endswith(".json")}
    assert read == {"leaderboard.json", "finalists.json", "all_rows.json", "sensitivity.json"}


def test_what_stands_in_the_folder_is_not_made_again(leaderboard, tmp_path):
    def names():
        return [step.name for step in leaderboard.trained(tmp_path, Path("tasks"), Path("adapters"), "bfloat16")]

    routers = [*leaderboard.ON_BOTH, *leaderboard.ON_EQUAL]
    assert [step.name for step in leaderboard.indexed(tmp_path, Path("adapters"))] == ["index"]
    assert names() == ["multi_task", "lorahub", *routers]
    for made in ("index", "multi_task", "routers/mole"):
        (tmp_path / made).mkdir(parents=True)
    assert leaderboard.indexed(tmp_path, Path("adapters")) == []
    routers.remove("mole")
    assert names() == ["lorahub", *routers]  # LoraHub's looks itself, task by task


def test_the_first_command_that_fails_ends_the_run_with_its_status(leaderboard, tmp_path):
    fails = leaderboard.Step("fails", [sys.executable, "-c", "raise SystemExit(3)"])
    writes = leaderboard.Step("writes", [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w').close()"])
    with pytest.raises(SystemExit) as ended:
        leaderboard.run([fails, writes])
    assert ended.value.code == 3
    assert not (tmp_path / "ran").exists()
    took = []
    leaderboard.run([writes], took.append)
    assert [one.name for one in took] == ["writes"]
    assert (tmp_path / "ran").exists()


def test_steps_side_by_side_share_the_cores_and_each_has_its_log(leaderboard, tmp_path, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    says = "import os, sys; print(sys.argv[1], os.environ['OMP_NUM_THREADS'])"
    steps = [leaderboard.Step(name, [sys.executable, "-c", says, name]) for name in "abc"]
    took = []
    leaderboard.run_beside(steps, 2, tmp_path, took.append)
    assert {one.name for one in took} == set("abc")
    assert all(one.seconds > 0 for one in took)
    assert [(tmp_path / f"{name}.txt").read_text() for name in "abc"] == ["a 4\n", "b 4\n", "c 4\n"]


def test_a_step_that_fails_ends_those_beside_it_and_shows_its_log(leaderboard, tmp_path, capsys):
    fails = leaderboard.Step("fails", [sys.executable, "-c", "raise SystemExit('no such adapter')"])
    lives = "import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(600)"
    beside = leaderboard.Step("beside", [sys.executable, "-c", f"import os; os.chdir({str(tmp_path)!r}); {lives}"])
    with pytest.raises(SystemExit) as ended:
        leaderboard.run_beside([beside, fails], 2, tmp_path)
    assert ended.value.code == 1
    assert "no such adapter" in capsys.readouterr().out
    if (tmp_path / "pid").exists():  # it may have been ended before it began
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "pid").read_text()), 0)


def test_how_long_a_run_took_is_kept_over_its_sittings(leaderboard, tmp_path):
    work = tmp_path / "work"
    work.mkdir()
    index, learns, asked = (leaderboard.Step(name, [sys.executable, "-c", ""]) for name in ("index", "mole", "asked"))
    fails = leaderboard.Step("fails", [sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit):
        leaderboard.carry_out([[index], [fails]], 2, work, tmp_path)
    assert not (tmp_path / leaderboard.RUN).exists()  # nothing to tell before all is there
    leaderboard.carry_out([[], [learns, index], [asked]], 2, work, tmp_path)
    first, second = json.loads((tmp_path / leaderboard.RUN).read_text())["sittings"]
    assert [step["name"] for step in first["steps"]] == ["index"]
    assert sorted(step["name"] for step in second["steps"]) == ["asked", "index", "mole"]
    assert second["jobs"] == 2


def test_every_plan_is_answered_in_shares_and_scored_before_the_next_begins(leaderboard, tmp_path):
    given = argparse.Namespace(
        work=tmp_path, tasks=Path("tasks"), adapters=Path("adapters"), dtype="bfloat16", output=tmp_path, rows=None
    )
    given.only = leaderboard.PLANS
    index, trained, *plans = leaderboard.staged(given)
    assert [step.name for step in index] == ["index"]
    assert "multi_task" in [step.name for step in trained]
    assert [stage[0].name for stage in plans[1::2]] == list(leaderboard.PLANS)
    assert all(
        step.name.startswith(one.name) for many, (one,) in zip(plans[::2], plans[1::2], strict=True) for step in many
    )
    given.only = ["finalists"]
    assert [len(stage) for stage in leaderboard.staged(given)[3:]] == [1]


def test_what_was_trained_in_another_dtype_or_from_other_folders_is_not_taken(leaderboard, tmp_path, monkeypatch):
    def ended(*changed):
        given = ["leaderboard.py", "tasks", "adapters", str(tmp_path / "work"), *changed]
        monkeypatch.setattr("sys.argv", given)
        try:
            leaderboard.main()
        except SystemExit as refused:
            return refused.code
        return 0

    ran = []
    monkeypatch.setattr(leaderboard, "carry_out", lambda *args: ran.append(args))
    assert (ended(), ended("--dtype", "float32"), ended(), len(ran)) == (0, 2, 0, 2)
    assert ended("--dtype", "float32", "--list") == 0  # only shows


def test_the_page_says_how_long_the_run_took(leaderboard):
    record = json.loads((leaderboard.RESULTS / leaderboard.RUN).read_text())
    page = leaderboard.GUIDE.read_text()
    assert fill(page, {"run": leaderboard.told(record)}) == page
    steps = [{"name": "index", "seconds": 60}, {"name": "finalists-1-of-4", "seconds": 120}]
    sitting = {"seconds": 90, "jobs": 3, "cores": 4, "steps": steps}
    told = leaderboard.told({"sittings": [sitting, {**sitting, "steps": []}]})
    assert "took 3 minutes for no plan yet in 2 sittings, 3 processes at once on 4 cores" in told
    assert "added up: index 1, answers 2 (" in told
    steps.extend({"name": plan, "seconds": 60} for plan in ("leaderboard", "all_rows"))
    assert " for leaderboard and all_rows in one sitting" in leaderboard.told({"sittings": [sitting]})
