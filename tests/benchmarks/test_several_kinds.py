"""benchmarks/several_kinds.py: what it compares differs in the centres alone, and is asked about the same examples."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from loracompose.benchmarks.retrieval_data import RetrievalData
from loracompose.retrieval.phrasing import Fold

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def kinds():
    file = Path(__file__).parents[2] / "benchmarks" / "several_kinds.py"
    source = importlib.util.spec_from_file_location("several_kinds", file)
    module = importlib.util.module_from_spec(source)
    sys.modules["several_kinds"] = module  # dataclass looks its module up
    source.loader.exec_module(module)
    yield module
    del sys.modules["several_kinds"]


@pytest.fixture
def merged(kinds):
    """Two adapters of two tasks each, whose texts and features say which example they are."""
    profiles = {f"task {t}": tuple(f"task {t}, example {i}" for i in range(20)) for t in range(4)}
    data = RetrievalData(profiles, ("a", "b", "c", "d"), np.arange(4), np.zeros(4, dtype=np.bool_))
    features = np.arange(84, dtype=np.float32)[:, None]
    return kinds.merge(data, features, 2)


def test_merged_adapters_have_as_many_examples_as_others_and_each_task_is_found_in_its_own(merged):
    assert [len(texts) for texts in merged.texts] == [20, 20]
    for texts, features, labels in zip(merged.texts, merged.features, merged.kinds, strict=True):
        tasks = [int(text.split(",")[0].removeprefix("task ")) for text in texts]
        assert [20 * task + int(text.split()[-1]) for task, text in zip(tasks, texts, strict=True)] == features[
            :, 0
        ].tolist()
        assert [len(set(np.array(tasks)[labels == kind])) for kind in (0, 1)] == [1, 1]
    for task, own in enumerate(merged.own):
        assert any(text.startswith(f"task {task},") for text in merged.texts[own])


def test_the_posterior_of_an_adapter_is_the_sum_of_those_of_its_kinds(kinds):
    pool = kinds.Merged([["a", "b", "c", "d"], ["e"]], [np.zeros((4, 1)), np.zeros((1, 1))], (), (), (), (), {})
    split = kinds.Split.of(pool, [np.array([0, 1, 0, 0]), np.array([0])])
    assert split.texts == [["a", "c", "d"], ["b"], ["e"]]
    fits = np.log(np.array([[0.2, 0.4, 0.5]]))
    found = np.exp(split.posterior(fits))
    assert found == pytest.approx(np.array([[0.25, 0.5]]) / 0.75)


def test_one_centre_an_adapter_changes_nothing_but_the_constant(kinds, merged):
    split = kinds.Split.of(merged, kinds.whole_adapters(merged))
    assert split.texts == merged.texts
    fits = np.array([[1.0, 3.0]])
    assert np.diff(split.posterior(fits)) == pytest.approx(np.diff(fits))


def test_the_same_examples_are_held_out_of_adapters_as_of_their_kinds(kinds, merged):
    split = kinds.Split.of(merged, merged.kinds)
    held = tuple(np.array([kind, 9 - kind]) for kind in range(4))
    fold = Fold(tuple(np.setdiff1d(np.arange(10), part) for part in held), held)
    joined = kinds.joined(fold, split)

    def texts(groups, parts):
        return [groups[i][place] for i, part in enumerate(parts) for place in part]

    assert texts(merged.texts, joined.held) == texts(split.texts, fold.held)
    assert texts(merged.texts, joined.kept) == texts(split.texts, fold.kept)
