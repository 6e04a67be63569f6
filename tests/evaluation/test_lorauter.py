"""LORAUTER asks which tasks a prompt is like, by their validation rows, and weighs their adapters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from loracompose import AdapterIndex
from loracompose.evaluation.lorauter import task_cosines
from loracompose.evaluation.methods import Situation
from loracompose.evaluation.specification import parse_method
from loracompose.evaluation.tasks import TaskRow
from loracompose.retrieval.embedding import CallableEmbedder
from tests.evaluation.material import CLUSTERS, task_rows
from tests.retrieval.material import TASKS, bag_of_words, make_adapter

NAMES = sorted(CLUSTERS)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lorauter")
    for seed, (name, examples) in enumerate(TASKS.items()):
        make_adapter(folder / "pool" / name, examples, seed)
    return AdapterIndex.build(folder / "pool", folder / "index", embedder=CallableEmbedder(bag_of_words, "bag", "1"))


def validation():
    return [
        TaskRow(f"{text} please", "", task, CLUSTERS[task], "accuracy", i % 2)
        for task, examples in TASKS.items()
        for i, text in enumerate(examples)
    ]


def asked(line, cosines):
    rows = task_rows()[: 3 if cosines is None else len(cosines)]
    situation = Situation(rows, [NAMES] * len(rows), frozenset(NAMES), None, {}, cosines)
    return [dict(question.adapters) for question in parse_method(line).questions(situation)]


def test_a_task_is_the_mean_of_its_validation_prompts_and_hidden_with_its_adapter(index):
    prompts = [row.prompt for row in task_rows()]
    hidden = [frozenset({NAMES[i % 4]}) for i in range(len(prompts))]
    got = task_cosines(index, prompts, hidden, validation())
    instruction = index.catalog.settings.instruction

    def unit(text):
        vector = np.asarray(bag_of_words([instruction + text]))[0].astype(np.float64)
        return vector / np.linalg.norm(vector)

    for i, prompt in enumerate(prompts):
        for j, name in enumerate(NAMES):
            mean = np.mean([unit(row.prompt) for row in validation() if row.task == name], axis=0)
            want = -math.inf if name in hidden[i] else unit(prompt) @ mean / np.linalg.norm(mean)
            assert got[i, j].item() == pytest.approx(want, abs=1e-6)


def test_the_nearest_tasks_are_weighed_by_a_softmax_of_cosines_at_a_fifth():
    cosines = torch.tensor([[0.1, 0.5, 0.3, -0.2], [-math.inf, 0.4, -math.inf, -math.inf], [-math.inf] * 4])
    first, second, third = asked("lorauter", cosines)
    powers = {NAMES[j]: math.exp(cosines[0, j].item() / 0.2) for j in (0, 1, 2)}
    assert first == pytest.approx({name: power / sum(powers.values()) for name, power in powers.items()})
    assert second == pytest.approx({NAMES[1]: 1.0})
    assert third == {}
    assert asked("lorauter k=1", cosines)[0] == pytest.approx({NAMES[1]: 1.0})
    flat = asked("lorauter k=9 temperature=1e6", cosines)[0]
    assert flat == pytest.approx(dict.fromkeys(NAMES, 0.25), rel=1e-5)


def test_lorauter_without_validation_rows_is_refused_with_what_it_needs(index):
    with pytest.raises(LookupError, match=r"put a TASK\.dev\.jsonl"):
        asked("lorauter", None)
    few = [row for row in validation() if row.task != "sql"]
    with pytest.raises(LookupError, match=r"there are none of \['sql'\]"):
        task_cosines(index, ["a"], [frozenset()], few)
    for line in ("lorauter k=0", "lorauter temperature=0", "lorauter temperature=inf"):
        with pytest.raises(ValueError, match="lorauter: "):
            parse_method(line)
