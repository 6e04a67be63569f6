"""An answer is kept whole or not at all, and found again only by the same question."""

from __future__ import annotations

import sqlite3

import pytest
import torch

from loracompose.evaluation.cache import Answer, AnswerCache, base_identity, question_key
from loracompose.models import wrap_base
from tests.engines import CHATML, tokenizer
from tests.tiny import base_model

ANSWER = Answer("ja", 12, "Mixture()")


def key(**changed):
    given = {
        "base": "b",
        "prompt": "p",
        "members": [("f", 0.25), ("g", 0.75)],
        "composer": "Mixture()",
        "decoding": {"max_new_tokens": 3},
        **changed,
    }
    return question_key(**given)


def test_answers_outlive_the_process_that_gave_them(tmp_path):
    with AnswerCache(tmp_path / "deep" / "kept.sqlite") as cache:
        cache.put({"a": ANSWER})
        assert cache.get("b") is None
    with AnswerCache(tmp_path / "deep" / "kept.sqlite") as cache:
        assert cache.get("a") == ANSWER
        assert len(cache) == 1


def test_a_batch_that_fails_in_the_middle_leaves_nothing(tmp_path):
    with AnswerCache(tmp_path / "kept.sqlite") as cache:
        with pytest.raises(sqlite3.IntegrityError):
            cache.put({"a": ANSWER, None: ANSWER})  # a key that SQLite refuses
        assert len(cache) == 0
        cache.put({"a": ANSWER})
        assert len(cache) == 1


def test_a_torn_write_is_rolled_back_when_the_file_is_opened_again(tmp_path):
    file = tmp_path / "kept.sqlite"
    with AnswerCache(file) as cache:
        cache.put({"a": ANSWER})
    dying = sqlite3.connect(file, isolation_level=None)
    dying.execute("PRAGMA cache_size = 1")
    dying.execute("BEGIN IMMEDIATE")
    dying.executemany("INSERT INTO answers VALUES (?, ?)", [(f"k{i}", "x" * 1000) for i in range(200)])
    state, journal = file.read_bytes(), (tmp_path / "kept.sqlite-journal").read_bytes()
    dying.close()
    file.write_bytes(state)  # as a power cut would leave them: pages written, the transaction not committed
    (tmp_path / "kept.sqlite-journal").write_bytes(journal)
    with AnswerCache(file) as cache:
        assert cache.get("a") == ANSWER
        assert len(cache) == 1


def test_the_first_answer_to_a_question_stays(tmp_path):
    with AnswerCache(tmp_path / "kept.sqlite") as cache:
        cache.put({"a": ANSWER})
        cache.put({"a": Answer("nein", 0, ""), "b": ANSWER})
        assert cache.get("a") == ANSWER
        assert len(cache) == 2


def test_another_file_is_refused_and_left_alone(tmp_path):
    file = tmp_path / "notes.txt"
    file.write_text("do not lose this, whatever happens")
    with pytest.raises(ValueError, match=r"notes\.txt is no cache of answers"):
        AnswerCache(file)
    assert file.read_text() == "do not lose this, whatever happens"


@pytest.mark.parametrize(
    "changed",
    [
        {"base": "c"},
        {"prompt": "q"},
        {"prompt": [{"role": "user", "content": "p"}]},
        {"members": [("f", 0.75), ("g", 0.25)]},
        {"members": [("f", 0.25 + 1e-9), ("g", 0.75)]},
        {"members": [("f", 0.25)]},
        {"members": []},
        {"composer": "Mixture(k=1)"},
        {"decoding": {"max_new_tokens": 4}},
    ],
    ids=str,
)
def test_whatever_decides_the_text_changes_the_key(changed):
    assert key(**changed) != key()


def test_what_does_not_decide_the_text_does_not_change_the_key():
    assert key(members=[("g", 0.75), ("f", 0.25)]) == key()
    assert key(members=[], composer="Lego()") == key(members=[])


def test_a_base_is_known_by_what_decides_its_text(monkeypatch):
    def identity(seed=0, dtype=torch.float32, template=None, penalty=1.0, extra=(), epsilon=None):
        model, words = base_model(seed=seed, dtype=dtype), tokenizer(template)
        if epsilon is not None:
            model.config.rms_norm_eps = epsilon
        model.generation_config.repetition_penalty = penalty
        words.add_tokens(list(extra))
        words(["a b", "a"], padding=True, truncation=True, max_length=2)  # which the tokenizer remembers
        return base_identity(wrap_base(model, words))

    assert identity() == identity()
    assert len({identity(), identity(seed=1), identity(dtype=torch.bfloat16), identity(template=CHATML)}) == 4
    assert len({identity(), identity(penalty=1.3), identity(extra=["<new>"]), identity(epsilon=0.5)}) == 4
    before = identity()
    monkeypatch.setattr(torch, "__version__", "1.0")
    assert identity() != before
