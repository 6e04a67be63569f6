"""benchmarks/leaderboard.py: one command asks for everything that there is, and trains what is not there yet."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

from loracompose.composers import COMPOSERS
from loracompose.evaluation.protocols import PROTOCOLS, get_protocol
from loracompose.evaluation.specification import BASELINES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def leaderboard():
    source = importlib.util.spec_from_file_location("leaderboard", BENCHMARKS / "leaderboard.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def lines(leaderboard):
    plan = tomllib.loads((BENCHMARKS / "leaderboard.toml").read_text())
    return [*plan["methods"], *leaderboard.learned(Path("routers"), Path("multi"), Path("weights"))], plan


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


def test_the_finalists_are_asked_under_every_protocol_and_on_all_rows_from_the_same_answers(leaderboard):
    first, finalists, all_rows = leaderboard.asked(Path("work"), Path("tasks"), "bfloat16", Path("results"), None)
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
    few = leaderboard.asked(Path("work"), Path("tasks"), "bfloat16", Path("results"), 1)
    assert all(command[command.index("-n") + 1] == "1" for command in few)


def test_everything_that_is_made_from_results_is_made_by_the_report(leaderboard):
    commands = leaderboard.reported(Path("results"), Path("work"))
    made = {word for command in commands for word in command if word.endswith((".md", ".html"))}
    assert {Path(file).name for file in made} == {"README.md", "which_method.md", "protocols.md", "leaderboard.html"}
    assert commands[-1][1].endswith("learned_report.py")
    read = {Path(word).name for command in commands for word in command if word.endswith(".json")}
    assert read == {"leaderboard.json", "finalists.json", "all_rows.json", "sensitivity.json"}


def test_what_stands_in_the_folder_is_not_made_again(leaderboard, tmp_path):
    first = leaderboard.made(tmp_path, Path("tasks"), Path("adapters"), "bfloat16")
    assert [Path(command[1]).name for command in first] == ["-c", "multi_task.py", "routers.py", "lorahub_weights.py"]
    (tmp_path / "index").mkdir()
    (tmp_path / "multi_task").mkdir()
    again = leaderboard.made(tmp_path, Path("tasks"), Path("adapters"), "bfloat16")
    assert again == first[2:]  # which look themselves, router by router and task by task


def test_the_first_command_that_fails_ends_the_run_with_its_status(leaderboard, tmp_path):
    fails = [sys.executable, "-c", "raise SystemExit(3)"]
    writes = [sys.executable, "-c", f"open({str(tmp_path / 'ran')!r}, 'w').close()"]
    with pytest.raises(SystemExit) as ended:
        leaderboard.run([fails, writes], only_list=False)
    assert ended.value.code == 3
    assert not (tmp_path / "ran").exists()
    leaderboard.run([writes], only_list=True)
    assert not (tmp_path / "ran").exists()
    leaderboard.run([writes], only_list=False)
    assert (tmp_path / "ran").exists()
