from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from loracompose.benchmarks.retrieval import (
    ALPHAS,
    KS,
    PAPER,
    abstention,
    calibration_error,
    gains,
    hits,
    is_the_papers,
    measure,
    own_ranks,
    reliability,
)
from loracompose.benchmarks.retrieval_data import read_retrieval_data, with_profiles
from loracompose.benchmarks.retrieval_scorings import bm25
from loracompose.cli import app
from loracompose.cli.retrieval_tables import retrieval_tables, rounded
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.retrieval.profiles import read_profiles
from tests.retrieval.material import TASKS, bag_of_words


def write(file: Path, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def papers(tmp_path):
    """A folder of the paper's form: every task's examples, and one row of each to ask."""
    folder = tmp_path / "papers"
    folder.mkdir()
    write(folder / "profiles.jsonl", [{"adapter": n, "prompt": p} for n, ps in TASKS.items() for p in ps])
    write(folder / "dev.jsonl", [{"adapter": n, "prompt": ps[0] + " please"} for n, ps in TASKS.items()])
    return folder


@pytest.fixture
def tasks(tmp_path):
    """A folder of tasks whose test rows have one template that the others lack."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, prompts in TASKS.items():
        rows = [{"task": name, "prompt": p, "template": i % 2} for i, p in enumerate(prompts)]
        write(folder / f"{name}.train.jsonl", rows)
        write(folder / f"{name}.test.jsonl", [*rows[:2], {"task": name, "prompt": prompts[0] + " now", "template": 7}])
    return folder


def test_the_papers_form_is_read_as_it_stands(papers):
    data = read_retrieval_data(papers)
    assert data.profiles == {name: tuple(prompts) for name, prompts in TASKS.items()}
    assert [list(TASKS)[i] for i in data.own] == list(TASKS)
    assert set(data.parts) == {"all"}
    assert is_the_papers(papers)


def test_profiles_of_tasks_are_drawn_from_the_rows_to_train_on_and_strange_templates_are_unseen(tasks):
    data = read_retrieval_data(tasks, examples=2, seed=1)
    for name, drawn in data.profiles.items():
        assert len(drawn) == 2
        assert set(drawn) <= set(TASKS[name])
    assert data.unseen.tolist() == [False, False, True] * len(TASKS)
    assert {name: int(part.sum()) for name, part in data.parts.items()} == {
        "all": 3 * len(TASKS),
        "seen": 2 * len(TASKS),
        "unseen": len(TASKS),
    }
    assert read_retrieval_data(tasks, examples=2, seed=1).profiles == data.profiles
    assert read_retrieval_data(tasks, examples=2, seed=2).profiles != data.profiles


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"dev.jsonl:2 is not JSON"),
        ("[]", r'dev.jsonl:2 must be an object with the strings "adapter" and "prompt"'),
        ('{"adapter": "french"}', r"dev.jsonl:2 must be an object"),
        ('{"adapter": "nobody", "prompt": "x"}', r"no profiles for \['nobody'\]"),
    ],
)
def test_a_broken_row_is_named(papers, line, message):
    first = (papers / "dev.jsonl").read_text().splitlines()[0]
    (papers / "dev.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(ValueError, match=message):
        read_retrieval_data(papers)


def test_a_folder_of_neither_form_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has neither"):
        read_retrieval_data(tmp_path)


def test_hits_count_how_many_adapters_are_ahead():
    rng = np.random.default_rng(0)
    scores, own = rng.normal(size=(200, 10)), rng.integers(0, 10, size=200)
    found = hits(scores, own)
    for k in KS:
        naive = np.mean([own[i] in sorted(range(10), key=lambda j, row=scores[i]: -row[j])[:k] for i in range(200)])
        assert found[str(k)]["share"] == pytest.approx(100 * naive)
        assert found[str(k)]["low"] <= found[str(k)]["share"] <= found[str(k)]["high"]


def test_a_scoring_that_tells_nothing_apart_finds_no_more_than_the_first_adapters():
    found = hits(np.zeros((10, 10)), np.arange(10))
    assert [found[str(k)]["share"] for k in KS] == [10.0 * k for k in KS]


def test_a_gain_is_the_difference_of_hits_and_its_interval_is_paired():
    rng = np.random.default_rng(0)
    own = rng.integers(0, 10, size=200)
    before, after = rng.normal(size=(200, 10)), rng.normal(size=(200, 10))
    found = gains(own_ranks(after, own), own_ranks(before, own))
    for k in map(str, KS):
        assert found[k]["points"] == pytest.approx(hits(after, own)[k]["share"] - hits(before, own)[k]["share"])
        assert found[k]["low"] < found[k]["points"] < found[k]["high"]
    same = gains(own_ranks(after, own), own_ranks(after, own))
    assert same["1"] == {"points": 0, "low": 0, "high": 0}  # intervals of two shares apart would not be of no width


def test_other_profiles_stand_for_the_same_adapters_whatever_their_order(papers):
    data = read_retrieval_data(papers)
    others = {name: (f"about {name}",) for name in reversed(TASKS)}
    changed = with_profiles(data, others)
    assert list(changed.profiles) == list(data.profiles)
    assert changed.profiles == others
    assert changed.prompts == data.prompts
    with pytest.raises(ValueError, match="cannot stand for"):
        with_profiles(data, {"french": ("a",)})


def test_separators_of_lines_within_a_prompt_are_part_of_it(papers):
    odd = "one\u2028two\x85three"
    line = json.dumps({"adapter": next(iter(TASKS)), "prompt": odd}, ensure_ascii=False)
    (papers / "dev.jsonl").write_text(line + "\n", encoding="utf-8")
    with (papers / "profiles.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    assert read_retrieval_data(papers).prompts == (odd,)
    assert odd in read_profiles(papers / "profiles.jsonl")[next(iter(TASKS))]


def test_a_sure_and_right_posterior_has_no_calibration_error_and_a_sure_and_wrong_one_all():
    logs, own = np.log(np.array([[1 - 1e-12, 1e-12]] * 8)), np.zeros(8, dtype=np.int64)
    assert calibration_error(reliability(logs, own)) == pytest.approx(0)
    assert calibration_error(reliability(logs, own + 1)) == pytest.approx(1)
    half = np.log(np.full((4, 2), 0.5))
    assert calibration_error(reliability(half, np.array([0, 0, 1, 1]))) == pytest.approx(0)


def test_abstaining_more_never_keeps_more():
    rng = np.random.default_rng(1)
    found = abstention(rng.normal(size=(100, 3)), np.sort(rng.normal(size=50)), rng.integers(0, 3, size=100))
    shares = [found[str(alpha)]["abstained"] for alpha in ALPHAS]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_bm25_prefers_the_document_with_the_rare_word():
    scores = bm25([["a dog", "a cat"], ["a sea", "a moon"]], ["moon", "a", "sun"])
    assert scores[0, 1] > 0 == scores[0, 0]
    assert scores[1, 0] == scores[1, 1]
    assert (scores[2] == 0).all()


def test_a_measurement_has_every_channel_and_the_papers_rows(papers, tmp_path):
    result = measure(read_retrieval_data(papers), CallableEmbedder(bag_of_words, "bag", "1"), paper=True)
    assert json.loads(json.dumps(rounded(result))) == rounded(result)
    names = ("random", "bm25", "mean", "meaning", "edges", "wording", "meaning + edges", "meaning + wording", "hybrid")
    assert set(names) < set(result["scorings"])
    assert result["scorings"]["hybrid"]["all"]["hit"]["1"]["share"] == 100
    assert list(result["paper"]) == list(PAPER)
    assert [len(table.columns) for table in retrieval_tables(result)] == [6, 4]
    pytest.importorskip("matplotlib")
    from loracompose.benchmarks.retrieval_figure import draw

    draw(result, tmp_path / "docs" / "figure.svg")
    text = (tmp_path / "docs" / "figure.svg").read_text()
    assert text.lstrip().startswith("<?xml")


def test_the_command_names_a_folder_of_neither_form(tmp_path):
    found = CliRunner().invoke(app, ["bench", "retrieval", "--data", str(tmp_path)])
    assert found.exit_code == 2
    assert "has neither" in found.output + found.stderr
