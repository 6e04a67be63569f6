"""LoraHub's line of a table takes the weights that were searched for a row's task in the very pool it may use."""

from __future__ import annotations

import json

import pytest

from loracompose.composers.lorahub import LoraHub
from loracompose.evaluation.methods import Situation
from loracompose.evaluation.searched import Search, read_searches, write_searches
from loracompose.evaluation.specification import parse_method
from tests.evaluation.material import CLUSTERS, task_rows

NAMES = sorted(CLUSTERS)
WHOLE = {name: 0.25 * place for place, name in enumerate(NAMES)}
MASKED = {name: -0.5 for name in NAMES if name != "mood"}


@pytest.fixture
def file(tmp_path):
    searches = [Search(task, WHOLE) for task in NAMES] + [Search("mood", MASKED)]
    write_searches(searches, tmp_path / "found.json")
    assert read_searches(tmp_path / "found.json") == searches
    return tmp_path / "found.json"


def asked(file, hidden):
    rows = task_rows()
    allowed = [[name for name in NAMES if name != hidden or row.task != hidden] for row in rows]
    method = parse_method(f"lorahub weights={file}")
    assert method.label == "lorahub"
    assert method.composer == LoraHub()
    return zip(rows, method.questions(Situation(rows, allowed, frozenset(NAMES), None, {})), strict=True)


def test_a_row_gets_the_weights_of_its_task_in_its_pool_without_those_of_zero(file):
    for row, question in asked(file, hidden="mood"):
        want = MASKED if row.task == "mood" else {name: w for name, w in WHOLE.items() if w}
        assert question.prompt == row.prompt
        assert dict(question.adapters) == want


def test_a_pool_in_which_nothing_was_searched_is_an_error_that_says_how(file):
    with pytest.raises(LookupError, match=r"no weights for task 'sums' in a pool of 3 adapters: search them with"):
        list(asked(file, hidden="sums"))


@pytest.mark.parametrize(
    "content",
    ["{", "[1]", '[{"task": "sums"}]', '[{"task": "sums", "weights": {"mood": "much"}}]', json.dumps({"a": 1})],
)
def test_a_file_of_something_else_is_an_error_that_says_what_it_must_be(tmp_path, content):
    (tmp_path / "found.json").write_text(content)
    with pytest.raises(ValueError, match="must be a JSON list of"):
        read_searches(tmp_path / "found.json")
    with pytest.raises(FileNotFoundError, match="lorahub_weights"):
        read_searches(tmp_path / "missing.json")


def test_a_weight_that_is_no_finite_number_is_refused(tmp_path):
    (tmp_path / "found.json").write_text('[{"task": "sums", "weights": {"mood": NaN}}]')
    with pytest.raises(ValueError, match="the weight of 'mood' for task 'sums' is nan"):
        read_searches(tmp_path / "found.json")
