"""Rows are read whole or refused by place, and drawn evenly."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from loracompose.evaluation.tasks import TaskRow, draw, read_tasks, rows_of, write_tasks
from tests.evaluation.material import task_rows

ROW = {"prompt": "p", "response": "r", "task": "t", "cluster": "c", "metric": "accuracy", "template": 1}


def made(task, counts):
    return [
        TaskRow(f"{task} {template} {i}", "r", task, "c", "accuracy", template)
        for template, count in counts.items()
        for i in range(count)
    ]


def test_what_is_written_is_read_back_by_split_and_task(tmp_path):
    files = write_tasks(task_rows(), tmp_path / "new", "test")
    assert [file.name for file in files] == [f"{task}.test.jsonl" for task in ("french", "sql", "mood", "sums")]
    assert set(read_tasks(tmp_path / "new")) == set(task_rows())
    assert set(read_tasks(files[0])) == {row for row in task_rows() if row.task == "french"}
    with pytest.raises(FileExistsError, match=r"french\.test\.jsonl"):
        write_tasks(task_rows(), tmp_path / "new", "test")


def test_a_row_that_occurs_twice_counts_once(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text((json.dumps(ROW) + "\n\n") * 2)
    assert read_tasks(file) == (TaskRow(**ROW),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        (json.dumps({**ROW, "response": None}), "has the texts prompt, response"),
        (json.dumps({**ROW, "template": "0"}), "template must be an integer"),
        (json.dumps({**ROW, "prompt": " "}), "must not be empty"),
        (json.dumps({**ROW, "metric": "f2"}), "no metric 'f2'"),
    ],
)
def test_a_line_that_is_no_row_is_refused_by_file_and_number(tmp_path, line, message):
    file = tmp_path / "t.jsonl"
    file.write_text(json.dumps(ROW) + "\n" + line + "\n")
    with pytest.raises((ValueError, LookupError), match=rf"t\.jsonl:2: .*{message}"):
        read_tasks(file)


def test_what_is_missing_is_said_with_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="eval make"):
        read_tasks(tmp_path / "none")
    write_tasks([TaskRow(**ROW)], tmp_path, "train")
    with pytest.raises(FileNotFoundError, match="its splits are train"):
        read_tasks(tmp_path)


def test_some_tasks_can_be_asked_for_by_name():
    assert {row.task for row in rows_of(task_rows(), ["sql", "sums"])} == {"sql", "sums"}
    assert rows_of(task_rows(), None) == task_rows()
    with pytest.raises(LookupError, match="no task x; there are french, mood"):
        rows_of(task_rows(), ["sql", "x"])


def test_a_task_of_two_clusters_is_refused(tmp_path):
    write_tasks([TaskRow(**ROW), TaskRow(**{**ROW, "prompt": "q", "cluster": "d"})], tmp_path, "test")
    with pytest.raises(ValueError, match="task 't' has the cluster 'c' and 'd'"):
        read_tasks(tmp_path)


def test_rows_are_drawn_evenly_over_templates_as_far_as_they_go():
    rows = made("a", {0: 10, 1: 10, 2: 1}) + made("b", {0: 2})
    drawn = draw(rows, 7, seed=0)
    assert Counter((row.task, row.template) for row in drawn) == {("a", 0): 3, ("a", 1): 3, ("a", 2): 1, ("b", 0): 2}
    assert sorted(draw(rows, None, seed=0), key=lambda row: row.id) == sorted(rows, key=lambda row: row.id)


def test_more_rows_keep_those_drawn_before_whatever_the_order_of_the_file():
    rows = made("a", {0: 10, 1: 10, None: 10})
    few, many = draw(rows, 4, seed=1), draw(rows[::-1], 9, seed=1)
    assert many[:4] == few
    assert draw(rows, 9, seed=2) != many
    with pytest.raises(ValueError, match="at least 1, got 0"):
        draw(rows, 0, seed=0)
