"""What is shown is what was found: every method, every number, in the table, the document and the report."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loracompose.evaluation import figures
from loracompose.evaluation.report import html, write_report
from loracompose.evaluation.results import read_results, to_json, write_results
from loracompose.evaluation.summary import BLOCK, as_json, markdown, summarise
from loracompose.marked import fill
from tests.evaluation.material import CLUSTERS, made_results

ROOT = Path(__file__).parent.parent.parent
METHODS = ("base", "oracle", "mixture", "lego k=5")


@pytest.fixture(scope="module")
def results():
    return made_results(METHODS)


@pytest.fixture(scope="module")
def summaries(results):
    return [summarise(protocol) for protocol in results.protocols]


def test_results_are_read_back_as_they_were_written(results, summaries, tmp_path):
    file = tmp_path / "deep" / "results.json"
    write_results(results, file, as_json(summaries))
    assert read_results(file) == results
    assert [path.name for path in file.parent.iterdir()] == ["results.json"]
    content = json.loads(file.read_text())
    shown = {line["label"]: line["score"]["value"] for line in content["summary"]["in-domain"]["methods"]}
    assert shown == {line.label: round(line.score.value, 2) for line in summaries[0].lines}


def test_json_has_one_line_for_what_is_plain_and_is_json():
    value = {"a": [1, 2], "b": {"c": {"d": None}, "e": [{"f": 1}, {"f": [True]}]}, "g": {}, "h": []}
    assert json.loads(to_json(value)) == value
    assert ' "a": [1, 2],' in to_json(value).splitlines()


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 1}', '{"format": 99}'])
def test_what_is_no_results_is_refused_by_file(tmp_path, text):
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"results\.json.*run it again"):
        read_results(file)
    with pytest.raises(FileNotFoundError, match="eval run"):
        read_results(tmp_path / "none.json")


def test_the_best_method_stands_first_and_the_lines_say_what_the_scores_say(results, summaries):
    assert [line.label for line in summaries[0].lines] == ["lego k=5", "mixture", "oracle", "base"]
    for protocol, summary in zip(results.protocols, summaries, strict=True):
        for method in protocol.methods:
            line = next(line for line in summary.lines if line.label == method.label)
            tasks = {task: [] for task in CLUSTERS}
            for row, score in zip(protocol.rows, method.scores, strict=True):
                tasks[row.task].append(score)
            assert line.score.value == pytest.approx(np.mean([np.mean(own) for own in tasks.values()]))
            assert line.score.low < line.score.value < line.score.high
            assert (line.ms, line.added_bytes) == (method.ms, method.added_bytes)


def test_errors_of_retrieval_are_told_from_those_of_composition(results):
    protocol = results.protocols[0]
    place = tuple(1 if row.task == "sql" else 2 for row in protocol.rows)
    line = summarise(replace(protocol, place=place)).lines[0]
    own = dict(zip((r.id for r in protocol.rows), protocol.methods[METHODS.index(line.label)].scores, strict=True))
    assert line.hit == pytest.approx(np.mean([own[r.id] for r in protocol.rows if r.task == "sql"]))
    assert line.miss == pytest.approx(np.mean([own[r.id] for r in protocol.rows if r.task != "sql"]))
    assert summarise(protocol).lines[0].miss is None
    assert summarise(protocol).found_first == 100.0


def test_the_table_has_every_method_and_protocol_with_its_numbers(results, summaries):
    table = markdown(results, summaries)
    for label in METHODS:
        (line,) = [text for text in table.splitlines() if text.startswith(f"| `{label}` |")]
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        for at, summary in ((1, summaries[0]), (3, summaries[1])):
            found = next(found for found in summary.lines if found.label == label)
            assert cells[at] == f"{found.score.value:.1f} [{found.score.low:.1f}, {found.score.high:.1f}]"
            assert cells[at + 1] == f"{found.normalised.value:.0f}"
    assert "in-domain score | % of oracle | masked score | % of oracle |" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_the_report_is_one_file_with_every_method_protocol_and_figure(results, tmp_path):
    write_report(results, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    body = page[page.index("<body>") :]
    for label in METHODS:
        assert body.count(f"<code>{label}</code>") == 3  # two protocols and the list of methods
    assert page.count("<img ") == page.count("data:image/svg+xml;base64,") == 5 * 2
    for protocol in ("in-domain", "masked"):
        assert f'id="{protocol}"' in page
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)  # nothing is fetched
    assert "<script" not in page


def test_what_was_not_timed_is_shown_without_times(results, tmp_path):
    first = results.protocols[0]
    untimed = replace(first, methods=tuple(replace(method, ms=None) for method in first.methods))
    page = html(replace(results, protocols=(untimed,)))
    assert page.count("<img ") == 4
    partly = summarise(replace(first, methods=(first.methods[0], *untimed.methods[1:])))
    assert figures.quality_and_cost(partly).startswith("<?xml")


def test_what_comes_from_results_is_escaped(results):
    first = results.protocols[0]
    hostile = replace(first, name="<b>", methods=(replace(first.methods[0], composer="<script>"), *first.methods[1:]))
    assert "<script>" not in html(replace(results, protocols=(hostile,)))


def test_a_run_with_one_row_a_task_is_shown_without_intervals(tmp_path):
    small = made_results(METHODS, n=1)
    summary = summarise(small.protocols[0])
    assert math.isnan(summary.lines[0].score.low)
    assert "[" not in markdown(small, [summary]).split("\n\n")[1]
    write_results(small, tmp_path / "small.json", as_json([summary]))  # JSON has no nan
    write_report(small, tmp_path / "small.html")


def test_the_same_results_draw_the_same_figure(summaries):
    assert figures.leaderboard(summaries[0]) == figures.leaderboard(summaries[0])


@pytest.mark.parametrize(
    ("name", "document", "block"),
    [
        ("leaderboard", "README.md", BLOCK),
        ("finalists", "docs/protocols.md", "finalists"),
        ("shipped_routers", "docs/learned_methods.md", "shipped"),
    ],
)
def test_a_table_of_results_in_a_document_is_made_from_its_results(name, document, block):
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    text = (ROOT / document).read_text(encoding="utf-8")
    results = read_results(file)
    summaries = [summarise(protocol) for protocol in results.protocols]
    assert fill(text, {block: markdown(results, summaries)}) == text
    assert json.loads(file.read_text(encoding="utf-8"))["summary"] == json.loads(json.dumps(as_json(summaries)))
