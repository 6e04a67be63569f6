"""The guide says what the results say: who is best, who cannot be told from it, and what a decision gains."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loracompose.cli import app
from loracompose.composers import COMPOSERS
from loracompose.evaluation.guide import (
    QUESTIONS,
    choice,
    guide,
    methods,
    questions,
    sensitivity,
    traits,
    verdict,
)
from loracompose.evaluation.results import read_results, write_results
from loracompose.evaluation.sensitivity import Curve, read_curves, write_curves
from loracompose.evaluation.statistics import Estimate
from loracompose.evaluation.summary import interval, summarise
from loracompose.marked import fill
from tests.evaluation.material import made_results

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "which_method.md"
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module")
def results():
    """Four tasks of six rows; `scored` gives methods their scores by hand."""
    return made_results(("base", "oracle", "selection", "mixture", "lora_flow"))


def scored(results, **by_label):
    """The first protocol with the scores of some methods changed: a constant, or one value for each row in turn."""
    protocol = results.protocols[0]

    def spread(value):
        values = value if isinstance(value, list) else [value]
        return tuple(float(values[i % len(values)]) for i in range(len(protocol.rows)))

    return summarise(
        replace(
            protocol,
            methods=tuple(
                replace(m, scores=spread(by_label[m.label])) if m.label in by_label else m for m in protocol.methods
            ),
        )
    )


NOISE = [40.0, 60.0, 60.0, 40.0]


def test_references_with_settings_are_references_and_alone_they_are_no_choice():
    only = summarise(made_results(("base", "oracle", "few_shot shots=5", "random seed=1")).protocols[0])
    assert choice(only).endswith("nothing but references was asked.")
    assert "`mixture`" in choice(summarise(made_results(("base", "oracle", "mixture", "random seed=1")).protocols[0]))


def test_the_best_is_named_with_those_that_cannot_be_told_from_it_and_the_cheapest_of_them(results):
    summary = scored(results, base=10, oracle=90, selection=[39.0, 61.0, 61.0, 39.0], mixture=NOISE, lora_flow=20)
    said = choice(summary)
    best = max(("mixture", "selection"), key=lambda label: summary.scores.score(label).value)
    other = {"mixture": "selection", "selection": "mixture"}[best]
    assert f"best is `{best}`, {interval(summary.scores.score(best))}" in said
    assert f"not told apart from it: `{other}`;" in said
    assert "lora_flow" not in said
    costs = {line.label: line.added_bytes for line in summary.lines}
    assert f"of these `{min((best, other), key=lambda label: (costs[label], label))}` costs least" in said
    assert said.startswith(f"- **{summary.name}** (the whole pool): ")
    assert said.endswith(f"{interval(summary.scores.score('oracle'))}.")


def test_one_that_is_ahead_of_all_stands_alone_and_the_best_that_exports_is_named_beside_it(results):
    summary = scored(results, base=10, oracle=90, selection=30, mixture=40, lora_flow=50)
    said = choice(summary)
    assert "best is `lora_flow`" in said
    assert "every other method is behind it" in said
    assert "the best that exports is `mixture`" in said


def test_what_was_trained_on_rows_of_every_task_is_not_recommended_for_tasks_that_nobody_trained_for():
    summary = summarise(made_results(("base", "oracle", "selection", "multi_task")).protocols[0])
    assert "`selection`" in choice(summary)
    assert "multi_task" not in choice(summary)


def test_references_are_never_recommended(results):
    said = choice(scored(results, base=99, oracle=100, selection=30, mixture=40, lora_flow=20))
    assert "best is `mixture`" in said
    assert "not told apart" not in said


def test_a_decision_is_the_paired_difference_of_two_methods_under_every_protocol(results):
    high = scored(results, base=10, selection=30, mixture=40, lora_flow=5)
    low = scored(results, base=10, selection=30, mixture=20, lora_flow=5)
    table = questions([high, low])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    assert rows[0] == [QUESTIONS[0][0], "+20.0 [+20.0, +20.0]", "+20.0 [+20.0, +20.0]", "helps"]
    assert rows[1] == [QUESTIONS[1][0], "+10.0 [+10.0, +10.0]", "-10.0 [-10.0, -10.0]", "depends"]
    assert len(rows) == 3  # of the other questions a method was not asked


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ([(2, 1, 3), (0, -1, 1)], "helps"),
        ([(-2, -3, -1), (0, -1, 1)], "hurts"),
        ([(2, 1, 3), (-2, -3, -1)], "depends"),
        ([(2, -1, 5), (0, -1, 1)], "undecided"),
        ([(0.01, 0.01, 0.02)], "undecided"),  # certain, and nothing
        ([(2, float("nan"), float("nan"))], "undecided"),
    ],
)
def test_a_verdict_needs_an_interval_that_leaves_out_zero(gains, says):
    assert verdict([Estimate(*gain) for gain in gains]) == says


def test_every_method_stands_in_the_table_with_its_scores_its_mark_and_what_it_is(results):
    summary = scored(results, base=10, oracle=90, selection=30, mixture=40, lora_flow=NOISE)
    table = methods([summary])
    rows = {line.split("`")[1]: [c.strip() for c in line.strip("|").split("|")] for line in table.splitlines()[2:]}
    assert set(rows) == {line.label for line in summary.lines}
    assert rows["mixture"][1] == "40.0 [40.0, 40.0] ▲"
    assert rows["base"][1] == "10.0 [10.0, 10.0] ▼"
    assert rows["selection"][1] == "30.0 [30.0, 30.0]"
    assert (rows["mixture"][-2:], rows["lora_flow"][-2:]) == (["yes", "no"], ["no", "yes"])


def test_traits_are_those_of_the_composers():
    for name, composer in COMPOSERS.items():
        found = traits(f"{name} weighting=uniform k=5")
        assert found.exports == (composer.scope == "static")
        assert found.learns == hasattr(composer, "initial")
    assert traits("uniform_all").exports
    assert traits("base").exports is traits("few_shot shots=5").exports is None


def test_a_curve_is_shown_with_its_points_and_the_difference_of_its_best_to_its_worst():
    tasks = ("a",) * 8 + ("b",) * 8
    curve = Curve("k", "masked", "mixture", (1, 3), tasks, ((10.0,) * 16, (30.0,) * 16))
    table = sensitivity([curve])
    assert table.splitlines()[-1] == "| k | masked | `mixture` | 1: 10.0 · 3: 30.0 | +20.0 [+20.0, +20.0] |"
    assert sensitivity([replace(curve, scores=((10.0,) * 16,) * 2)]).endswith("| the same |")
    assert sensitivity([]) == "Not measured yet."


def test_the_command_fills_the_guide(results, tmp_path):
    write_results(results, tmp_path / "results.json", {})
    page, text = tmp_path / "page.md", PAGE.read_text(encoding="utf-8")
    page.write_text(text, encoding="utf-8")
    curve = Curve("k", "masked", "x", (1,), ("a", "a"), ((1.0, 2.0),))
    write_curves([curve], tmp_path / "curves.json", {})
    asked = ["eval", "report", str(tmp_path / "results.json"), "--guide", str(page)]
    ran = CliRunner().invoke(app, [*asked, "--curves", str(tmp_path / "curves.json")])
    assert ran.exit_code == 0, ran.output
    assert page.read_text(encoding="utf-8") == fill(text, guide(results, [curve]))


def test_the_page_which_method_is_made_from_the_results():
    files = sorted(RESULTS.glob("sensitivity*.json"))
    curves = [curve for file in files for curve in read_curves(file)[1]]
    page = PAGE.read_text(encoding="utf-8")
    assert fill(page, guide(read_results(RESULTS / "leaderboard.json"), curves)) == page


def test_the_prose_of_the_page_has_no_score_typed_by_hand():
    page = PAGE.read_text(encoding="utf-8")
    prose = re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", "", page, flags=re.DOTALL)
    assert re.findall(r"\d+\.\d", prose) == []
