"""The commands make, run and report, from public data and the shipped pool to a report."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loracompose.cli import app
from loracompose.cli.evaluating import METHODS, read_plan
from loracompose.engine import Engine
from loracompose.evaluation.results import write_results
from loracompose.evaluation.specification import parse_methods
from loracompose.evaluation.summary import BLOCK, as_json, summarise
from loracompose.marked import marks
from tests.evaluation.material import made_results

ROOT = Path(__file__).parent.parent.parent
SMOKE = ROOT / "benchmarks" / "smoke_tasks.jsonl"


def run(*arguments, status=0):
    result = CliRunner().invoke(app, ["eval", *(str(argument) for argument in arguments)])
    assert result.exit_code == status, result.output + result.stderr
    return result


def test_tasks_are_made_from_generators_and_from_a_dataset(tmp_path):
    pytest.importorskip("reasoning_gym")
    made = json.loads(
        run("make", tmp_path, "--reasoning-gym", "leg_counting, spell_backward", "-n", 3, "--json").stdout
    )
    assert made["rows"] == 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["leg_counting.test.jsonl", "spell_backward.test.jsonl"]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "a", "label": "b"}\n')
    source = ("--dataset", tmp_path / "data", "--source-split", "train", "--task", "mood", "--prompt", "Mood: {text}")
    run("make", tmp_path, *source)
    assert json.loads((tmp_path / "mood.test.jsonl").read_text())["prompt"] == "Mood: a"


def test_nowhere_and_two_places_to_make_tasks_from_are_refused(tmp_path):
    assert "say where tasks come from" in run("make", tmp_path, status=2).stderr
    assert "needs --task" in run("make", tmp_path, "--dataset", "x", status=2).stderr


@pytest.mark.parametrize(
    "option", ["--config", "--source-split", "--task", "--cluster", "--metric", "--prompt", "--response"]
)
def test_an_option_of_a_dataset_is_refused_with_a_generator(tmp_path, option):
    asked = run("make", tmp_path, "--reasoning-gym", "leg_counting", option, "x", status=2)
    assert f"{option}: only of --dataset" in " ".join(asked.stderr.split())
    assert not list(tmp_path.iterdir())


def test_curves_without_a_guide_are_refused(tmp_path):
    assert "--curves go into the document of --guide" in run("report", "x.json", "--curves", "y.json", status=2).stderr


def test_the_committed_plan_and_the_defaults_can_be_read():
    plan = read_plan(ROOT / "benchmarks" / "leaderboard.toml")
    assert {"base", "oracle", "mixture weighting=lorauter", "lego"} <= {m.label for m in parse_methods(plan["methods"])}
    parse_methods(METHODS)
    finalists = read_plan(ROOT / "benchmarks" / "finalists.toml")
    assert {m.label for m in parse_methods(finalists["methods"])} <= {m.label for m in parse_methods(plan["methods"])}
    assert finalists["max_new_tokens"] == plan["max_new_tokens"]  # or no answer would be shared


@pytest.mark.parametrize(("text", "message"), [("rows = ", "is no TOML"), ("row = 3", "has the key 'row'")])
def test_a_plan_that_cannot_be_read_is_refused(tmp_path, text, message):
    (tmp_path / "plan.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_plan(tmp_path / "plan.toml")


def test_a_report_writes_the_page_and_the_table_of_the_document(tmp_path):
    results = made_results()
    write_results(results, tmp_path / "r.json", as_json([summarise(found) for found in results.protocols]))
    readme = tmp_path / "README.md"
    begin, end = marks(BLOCK)
    readme.write_text(f"before\n{begin}\n{end}\nafter\n")
    shown = run("report", tmp_path / "r.json", "--html", tmp_path / "r.html", "--readme", readme).stdout
    assert "lego k=5" in shown
    assert "| `lego k=5` |" in readme.read_text()
    begin, end = marks("finalists")
    readme.write_text(f"before\n{begin}\n{end}\nafter\n")
    run("report", tmp_path / "r.json", "--readme", readme, "--block", "finalists")
    assert "| `lego k=5` |" in readme.read_text()
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")


@pytest.mark.real
def test_the_smoke_set_runs_from_index_to_report_and_resumes(tmp_path, monkeypatch):
    CliRunner().invoke(app, ["index", "build", str(ROOT / "index" / "pool"), str(tmp_path / "index")])
    protocols = ("-p", "in-domain", "-p", "masked", "--timed-rows", 0, "--json")
    command = ("run", SMOKE, "-i", tmp_path / "index", "-o", tmp_path / "r.json", "-n", 2, "-x", "mixture", *protocols)
    generate, calls = Engine.generate, []

    def interrupted(self, *args, **kwargs):
        calls.append(kwargs["composer"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Engine, "generate", interrupted)
    stopped = run(*command, status=130)
    assert re.search(r"interrupted: [1-9]\d* answers are kept", stopped.stderr)
    found = json.loads(run(*command).stdout)
    score = {line["label"]: line["score"]["value"] for line in found["in-domain"]["methods"]}
    assert score["base"] < 50 < score["mixture"] <= 100  # the base talks, the adapters answer
    done = len(calls)
    run(*command)
    assert len(calls) == done  # nothing was left to generate
    run("report", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert "<code>mixture</code>" in (tmp_path / "r.html").read_text()
