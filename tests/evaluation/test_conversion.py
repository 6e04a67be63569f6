"""A benchmark can be rebuilt from public data: from records through templates, and from generators."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from loracompose.evaluation.conversion import Recipe, convert, from_dataset, from_reasoning_gym

RECIPE = Recipe("mood", "sentiment", "accuracy", ("Review: {text}", "{text} {{good}}?"), "{label}")


def test_records_become_rows_with_templates_in_turn_and_classes_by_name():
    records = [{"text": "a", "label": 1}, {"text": "b", "label": 0}, {"text": "c", "label": 1}]
    rows = convert(records, RECIPE, {"label": ["bad", "good"]})
    assert [(row.prompt, row.response, row.template) for row in rows] == [
        ("Review: a", "good", 0),
        ("b {good}?", "bad", 1),
        ("Review: c", "good", 0),
    ]
    assert {(row.task, row.cluster, row.metric) for row in rows} == {("mood", "sentiment", "accuracy")}


def test_a_hidden_label_is_refused():
    with pytest.raises(ValueError, match="record 0: label is -1, not the number of a class"):
        convert([{"text": "a", "label": -1}], RECIPE, {"label": ["bad", "good"]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompts": ()}, "at least one prompt template"),
        ({"prompts": ("{text",)}, "is no template"),
        ({"prompts": ("{0}",)}, "no name of a field"),
        ({"response": "{label.real}"}, "no name of a field"),
        ({"metric": "f2"}, "no metric 'f2'"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(changed, message):
    fields = {"task": "t", "cluster": "c", "metric": "accuracy", "prompts": ("{text}",), "response": "{label}"}
    with pytest.raises((ValueError, LookupError), match=message):
        Recipe(**{**fields, **changed})


def test_a_field_that_the_records_do_not_have_is_named_with_those_they_have():
    with pytest.raises(LookupError, match="have no field 'text'; they have title, label"):
        convert([{"title": "a", "label": "b"}], RECIPE)


def test_a_dataset_is_read_shuffled_by_seed_and_cut(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"t{i}", "label": f"l{i}"}) + "\n" for i in range(20)]
    (tmp_path / "data" / "test.jsonl").write_text("".join(lines))
    drawn = [from_dataset(str(tmp_path / "data"), RECIPE, "test", 5, seed) for seed in (0, 0, 1)]
    assert len(drawn[0]) == 5
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(from_dataset(str(tmp_path / "data"), RECIPE, "test", 99, 0)) == 20


def test_generators_give_rows_of_their_category_and_no_test_row_for_training():
    pytest.importorskip("reasoning_gym")
    test = from_reasoning_gym("leg_counting", "test", 6, seed=0)
    assert test == from_reasoning_gym("leg_counting", "test", 6, seed=0)
    assert {(row.task, row.cluster, row.metric) for row in test} == {("leg_counting", "arithmetic", "exact_match")}
    assert all(row.response.isdigit() for row in test)
    train, dev = (from_reasoning_gym("leg_counting", split, 6, seed=0) for split in ("train", "dev"))
    assert Counter(len({row.prompt for row in part}) for part in (test, train, dev)) == {6: 3}
    assert len({row.prompt for row in (*test, *train, *dev)}) == 18
    with pytest.raises(ValueError, match="split must be one of test, train, dev, got 'validation'"):
        from_reasoning_gym("leg_counting", "validation", 1, 0)
    with pytest.raises(LookupError, match="no 'legs'; there are"):
        from_reasoning_gym("legs", "test", 1, 0)


def test_splits_share_no_question_where_a_generator_has_few(monkeypatch):
    def drawn(name, size, seed):
        numbers = [random.Random(seed + i).randrange(4000) for i in range(size)]
        return [{"question": f"{number}?", "answer": number} for number in numbers]

    kind = type("Few", (), {"__module__": "reasoning_gym.games.few"})
    gym = SimpleNamespace(factory=SimpleNamespace(DATASETS={"few": (kind, None)}), create_dataset=drawn)
    monkeypatch.setattr("loracompose.evaluation.conversion._reasoning_gym", lambda: gym)
    asked = {"test": 900, "train": 200, "dev": 100}  # other numbers of rows, one after the other
    splits = {split: {row.prompt for row in from_reasoning_gym("few", split, n, 0)} for split, n in asked.items()}
    assert all(splits.values())
    assert not splits["test"] & splits["train"]
    assert not splits["test"] & splits["dev"]
    trained = [row.prompt for row in from_reasoning_gym("few", "train", 1000, 0)]
    assert not splits["dev"] & set(trained)


@pytest.mark.parametrize(
    ("package", "call"),
    [
        ("datasets", lambda: from_dataset("x", RECIPE, "test", 1, 0)),
        ("reasoning_gym", lambda: from_reasoning_gym("leg_counting", "test", 1, 0)),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'loracompose\[eval-data\]'"):
        call()
