"""A process that is killed at any moment loses nothing that was acknowledged, and a test of that can fail."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from loracompose.adapters.folder import sync
from loracompose.benchmarks import crash
from loracompose.benchmarks.crash import NAMES, crash_test
from loracompose.benchmarks.journal import Journal, State, Step, read_journal
from loracompose.benchmarks.material import word_encoder, write_pools
from loracompose.benchmarks.victim import Place
from loracompose.cli import app
from loracompose.retrieval.index import AdapterIndex


def test_an_index_survives_kills_at_calls_all_over_the_library(tmp_path):
    """Every kill comes before a call that the seed decides; `loracompose bench crash` adds kills by the clock."""
    options = ["--kills", "12", "--seed", "3", "--by-clock", "0", "-o", str(tmp_path / "crash.json")]
    result = CliRunner().invoke(app, ["bench", "crash", *options])
    assert result.exit_code == 0, result.output
    assert "12 kills" in result.output
    report = json.loads((tmp_path / "crash.json").read_text())
    assert report["failures"] == []
    assert report["kills"] == 12
    assert report["operations"] == sum(report["acknowledged"].values()) + sum(report["in_flight"].values())
    assert sum(report["in_flight"].values()) == 12


def test_a_journal_tells_what_was_acknowledged_and_what_was_in_flight(tmp_path):
    assert read_journal(tmp_path / "j").in_flight is None
    journal = Journal(tmp_path / "j")
    first, second = Step("add", "a", 1), Step("remove", "a")
    journal.begin(first)
    assert read_journal(tmp_path / "j").in_flight == first
    journal.end()
    journal.begin(second)
    told = read_journal(tmp_path / "j")
    assert (told.acknowledged, told.in_flight) == ((first,), second)


def test_steps_lead_to_the_states_they_say():
    state = State({"a": 0})
    for step, versions in [
        (Step("add", "b", 2), {"a": 0, "b": 2}),
        (Step("update", "a", 1), {"a": 1, "b": 2}),
        (Step("snapshot"), {"a": 1, "b": 2}),
        (Step("remove", "b"), {"a": 1}),
        (Step("compact"), {"a": 1}),
        (Step("replace", version=2), {"a": 2, "b": 2}),
        (Step("restore"), {"a": 1, "b": 2}),
    ]:
        state = state.after(step, ("a", "b"))
        assert state.versions == versions


@pytest.fixture(scope="module")
def ordeal(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("ordeal"))
    test = crash._Ordeal(place, 0, 0.0)
    AdapterIndex.build(place.pools / "0", place.index, embedder=word_encoder(), copy=True).close()
    sync(place.root)
    return test


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        (dict.fromkeys(NAMES, 0), ""),
        (dict.fromkeys(NAMES[1:], 0), "the index holds"),
        (dict.fromkeys((*NAMES[1:], "adapter9"), 0), "KeyError"),
        ({**dict.fromkeys(NAMES, 0), NAMES[3]: 1}, "the index holds"),
    ],
    ids=["all right", "a record too many", "a record lost", "another version"],
)
def test_the_crash_test_sees_a_record_too_many_a_lost_one_and_a_wrong_one(ordeal, expected, told):
    ordeal._cards = {**ordeal._cards, ("adapter9", 0): None} if "adapter9" in expected else ordeal._cards
    _, failures = ordeal._look([State(expected)])
    assert bool(failures) == bool(told)


def test_the_material_of_a_name_and_a_version_is_always_the_same(tmp_path):
    cards = write_pools(tmp_path / "one", ("a", "b"), 2)
    assert cards == write_pools(tmp_path / "two", ("a", "b"), 2)
    assert len({card.fingerprint for card in cards.values()}) == 4


@pytest.mark.parametrize(("kills", "share"), [(0, 0.5), (1, 1.5)])
def test_a_crash_test_of_nothing_is_refused(kills, share):
    with pytest.raises(ValueError, match="kills must be at least 1"):
        crash_test(kills, by_clock=share)
