"""Methods ask with the adapters they claim, and a line of text says which method."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loracompose.composers import Lego, Mixture
from loracompose.composers.arrow import Arrow
from loracompose.evaluation.found import Found
from loracompose.evaluation.methods import Situation
from loracompose.evaluation.specification import parse_method, parse_methods
from loracompose.retrieval.cards import Card
from loracompose.retrieval.result import Retrieval
from tests.evaluation.material import CLUSTERS, solved_rows, task_rows


def situation(hidden=()):
    rows = [row for row in task_rows() if row.template == 0]  # french, sql, mood, sums
    cards = tuple(Card(name, "", (), (), "", name) for name in ("french", "sql", "mood"))
    scores = torch.tensor([[-0.1, -2.0, -3.0]] * 3 + [[-torch.inf] * 3])
    weights = torch.tensor([[0.9, 0.1, 1e-45]] * 3 + [[0.0] * 3])
    best = Retrieval(cards, scores, weights)
    shots = {task: [row for row in solved_rows() if row.task == task] for task in CLUSTERS}
    allowed = [[name for name in sorted(CLUSTERS) if name not in hidden]] * 4
    return Situation(rows, allowed, frozenset(CLUSTERS) - {"sums"}, Found(best, scores, 0.0), shots)


def sets(line, hidden=()):
    return [None if q is None else dict(q.adapters) for q in parse_method(line).questions(situation(hidden))]


def test_the_base_has_no_adapter_and_the_oracle_the_own_one_where_there_is_one():
    assert sets("base") == [{}] * 4
    assert sets("oracle", hidden=["french"]) == [{"french": 1.0}, {"sql": 1.0}, {"mood": 1.0}, None]


def test_uniform_all_and_random_stay_within_what_is_allowed():
    assert sets("uniform_all", hidden=["sql"]) == [dict.fromkeys(["french", "mood", "sums"], 1 / 3)] * 4
    assert sets("uniform_all", hidden=CLUSTERS) == [{}] * 4
    assert sets("random", hidden=["sql", "mood", "sums"]) == [{"french": 1.0}] * 4
    drawn = [tuple(map(tuple, sets(f"random seed={seed}"))) for seed in range(8)]
    assert drawn[0] == tuple(map(tuple, sets("random")))
    assert len(set(drawn)) > 1


def test_few_shots_come_from_the_solved_rows_of_the_task_and_end_with_the_prompt():
    now = situation()
    for question, row in zip(parse_method("few_shot shots=2").questions(now), now.rows, strict=True):
        turns = [turn["content"] for turn in question.prompt]
        assert turns[-1] == row.prompt
        solved = {(solved.prompt, solved.response) for solved in now.shots[row.task]}
        assert set(zip(turns[0:4:2], turns[1:4:2], strict=True)) < solved
        assert [turn["role"] for turn in question.prompt] == ["user", "assistant"] * 2 + ["user"]
    with pytest.raises(LookupError, match=r"needs 9 solved rows of task 'french', there are 4: put a french\.train"):
        parse_method("few_shot shots=9").questions(now)


def test_a_composer_gets_the_retrieved_by_weight_without_those_too_small_to_matter():
    first, *_, last = sets("mixture")
    assert first == pytest.approx({"french": 0.9, "sql": 0.1})
    assert last == {}  # nothing was retrieved: the base model
    assert sets("mixture k=1")[0] == pytest.approx({"french": 1.0})
    assert sets("arrow weighting=uniform")[0] == pytest.approx(dict.fromkeys(["french", "sql", "mood"], 1 / 3))


def test_a_member_of_less_than_a_thousandth_gives_its_weight_to_the_others():
    now = situation()
    shares = torch.tensor([[0.9989, 0.0006, 0.0005], [0.998, 0.0, 0.002], [1.996, 0.004, 0.0], [0.0, 0.0, 0.0]])
    now = replace(now, found=replace(now.found, best=replace(now.found.best, weights=shares)))
    got = [dict(question.adapters) for question in parse_method("mixture").questions(now)]
    assert got[0] == {"french": 1.0}  # not 0.9999999: the oracle's question
    assert got[1] == pytest.approx({"french": 0.998, "mood": 0.002})
    assert got[3] == {}


def test_the_last_bits_of_retrieved_weights_do_not_make_another_question():
    now = situation()
    asked = []
    for noise in (0.0, 1e-9):  # as of an encoder that saw the prompts in other batches
        shares = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.5, 0.0]] * 2, dtype=torch.float64) + noise
        found = replace(now.found, best=replace(now.found.best, weights=shares))
        asked.append([q.adapters for q in parse_method("mixture").questions(replace(now, found=found))])
    assert asked[0] == asked[1]


def test_one_adapter_for_everything_is_a_folder():
    assert sets("adapter path='my runs/all' label=multi") == [{Path("my runs/all"): 1.0}] * 4


def test_a_label_has_no_folder_of_this_machine():
    assert parse_method("adapter path=/home/me/all").label == "adapter"
    assert parse_method("random seed=3").label == "random seed=3"


def test_a_line_says_composer_settings_and_label():
    method = parse_method("lego k=5 weighting=lorauter temperature=0.5 set.k=16 set.units=canonical")
    assert method.composer == Lego(k=16, units="canonical")
    assert (method.k, method.weighting, method.temperature) == (5, "lorauter", 0.5)
    assert method.label == "lego k=5 weighting=lorauter temperature=0.5 set.k=16 set.units=canonical"
    assert parse_method("arrow set.top_k=None label='arrow, all'") == parse_method(
        "arrow  set.top_k=None label='arrow, all'"
    )
    assert parse_method("arrow set.top_k=None").composer == Arrow(top_k=None)
    assert parse_method("oracle").composer == Mixture()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "got nothing"),
        ("merge", "no method 'merge'; there are base"),
        ("lego units=raw", "no setting 'units'; it has k, weighting"),
        ("lego set.rank=3", "no setting 'rank'; it has k, units"),
        ("lego set.k=0", "k must be an integer of at least 1"),
        ("mixture k=0", "k must be an integer of at least 1"),
        ("mixture k", "expected key=value"),
        ("mixture k=1 k=2", "each key once"),
        ("mixture weighting=best", "weighting must be one of"),
        ("base seed=1", "no setting 'seed'"),
        ("few_shot shots=0", "shots must be"),
        ("adapter", "say which, path=FOLDER"),
        ("oracle label=own", "'oracle' keeps its name"),
    ],
)
def test_a_line_that_means_nothing_is_refused_with_what_would(line, message):
    with pytest.raises((ValueError, LookupError), match=message):
        parse_method(line)


def test_a_label_is_a_word_whatever_it_looks_like():
    assert parse_method("random label=1").label == "1"


def test_base_and_oracle_are_always_in_the_table_and_no_label_stands_twice():
    assert [m.label for m in parse_methods(["mixture", "oracle"])] == ["base", "mixture", "oracle"]
    with pytest.raises(ValueError, match="two methods are called 'mixture'"):
        parse_methods(["mixture", "mixture"])


def test_a_composer_that_learns_nothing_refuses_a_router(tmp_path):
    with pytest.raises(FileNotFoundError, match="no router in"):
        parse_method(f"mixture router={tmp_path}")
