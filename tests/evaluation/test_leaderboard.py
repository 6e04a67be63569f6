"""benchmarks/leaderboard.py: one command asks for everything that there is, and trains what is not there yet."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from pathlib import Path

import pytest

from loracompose.composers import COMPOSERS
from loracompose.evaluation.protocols import get_protocol
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
