"""Mixtures of tasks: every task as often, lengths together, all of it a function of the seed."""

from __future__ import annotations

import itertools
import json
from collections import Counter

import pytest

from loracompose.training.task_mixture import task_mixture
from tests.training.tiny_base import tokenizer

COUNTS = {"few": 3, "many": 40, "some": 11}


def rows():
    return [
        {"prompt": f"{task} {i}" + "x" * (i % 7), "response": "r", "task": task}
        for task, count in COUNTS.items()
        for i in range(count)
    ]


def mixture(data=None, **given):
    return task_mixture(rows() if data is None else data, tokenizer(None), **given)


def test_every_task_is_drawn_equally_often_and_goes_through_all_its_rows_before_it_repeats_one():
    found = mixture()
    plan = found.plan(6, steps=16, seed=1)  # two buckets of 8 batches
    drawn = Counter(found.examples[row].task for batch in plan for row in batch)
    assert drawn == {task: 32 for task in COUNTS}
    for task, places in found.by_task.items():
        times = Counter(row for batch in plan for row in batch if row in places)
        assert set(times.values()) <= {32 // COUNTS[task], -(-32 // COUNTS[task])}


def test_a_batch_holds_rows_of_like_length_from_several_tasks():
    found = mixture()
    lengths = [[found.encoded[row].length for row in batch] for batch in found.plan(6, steps=8, seed=1)]
    spans = sorted((min(batch), max(batch)) for batch in lengths)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert any(len({found.examples[row].task for row in batch}) > 1 for batch in found.plan(6, steps=8, seed=1))


def test_the_order_is_a_function_of_the_seed_and_longer_runs_begin_alike():
    found = mixture()
    assert found.plan(4, steps=5, seed=1) == found.plan(4, steps=50, seed=1)[:5]
    assert found.plan(4, steps=5, seed=1) != found.plan(4, steps=5, seed=2)


def test_a_cap_draws_so_many_rows_of_each_task_by_the_seed():
    one, two = mixture(per_task=5, seed=1), mixture(per_task=5, seed=2)
    assert {task: len(places) for task, places in one.by_task.items()} == {"few": 3, "many": 5, "some": 5}
    assert one.examples != two.examples
    assert one.digest != two.digest
    assert one.digest == mixture(per_task=5, seed=1).digest


def test_long_rows_are_left_out_and_counted_and_do_not_use_up_the_cap():
    longest = max(code.length for code in mixture().encoded)
    found = mixture(per_task=30, max_length=longest - 1)
    assert len(found.by_task["many"]) == 30
    assert found.left_out > 0
    assert max(code.length for code in found.encoded) < longest


def test_a_folder_holds_one_file_a_task_and_only_the_split_is_read(tmp_path):
    for task in COUNTS:
        for split, wanted in (("train", "r"), ("dev", "d")):
            row = {"prompt": "p", "response": wanted, "task": task}
            (tmp_path / f"{task}.{split}.jsonl").write_text(json.dumps(row) + "\n")
    assert {example.response for example in mixture(tmp_path).examples} == {"r"}
    assert {example.response for example in mixture(tmp_path, split="dev").examples} == {"d"}
    assert list(mixture(tmp_path, tasks=("some",)).by_task) == ["some"]
    assert len(mixture(tmp_path / "few.train.jsonl").examples) == 1


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no \*\.train\.jsonl file"):
        mixture(tmp_path)
    with pytest.raises(LookupError, match="no task none; it has few, many, some"):
        mixture(tasks=("none",))
    with pytest.raises(ValueError, match=r"max_length is 4, and all 3 rows of task 'few' are longer"):
        mixture(max_length=4)
