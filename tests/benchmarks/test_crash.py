"""A process that is killed at any moment loses nothing that was acknowledged, and a test of that can fail."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

from loracompose.benchmarks import crash
from loracompose.benchmarks.crash import NAMES, crash_test
from loracompose.benchmarks.journal import Journal, State, Step, read_journal
from loracompose.benchmarks.material import word_encoder, write_pools
from loracompose.benchmarks.victim import Place
from loracompose.cli import app
from loracompose.retrieval.index import AdapterIndex


def test_an_index_survives_kills_at_calls_all_over_the_library(tmp_path):
    """Every kill comes before a call that the seed decides; `loracompose bench crash` adds kills by the clock."""
    options = ["--kills", "15", "--seed", "3", "--by-clock", "0", "-o", str(tmp_path / "crash.json")]
    result = CliRunner().invoke(app, ["bench", "crash", *options])
    assert result.exit_code == 0, result.output
    assert "15 kills" in result.output
    report = json.loads((tmp_path / "crash.json").read_text())
    assert report["failures"] == []
    assert report["kills"] == 15
    assert report["operations"] == sum(report["acknowledged"].values()) + sum(report["in_flight"].values())
    assert 0 < sum(report["in_flight"].values()) <= 15


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
    return crash._Ordeal(Place(tmp_path_factory.mktemp("ordeal")), 0, 0.0)


def lose_a_weight(index):
    (index.path(NAMES[0]) / "adapter_model.safetensors").unlink()


HARM = {
    "nothing": lambda index: None,
    "a record lost": lambda index: index.remove(NAMES[2]),
    "another version": lambda index: index.update(index.folder.parent / "pools" / "1" / NAMES[3]),
    "a weight lost": lose_a_weight,
    "embeddings of another": lambda index: index.catalog.database.execute(
        "UPDATE examples SET embedding = (SELECT max(embedding) FROM examples)"
    ),
    "no index": lambda index: shutil.rmtree(index.folder),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_the_crash_test_sees_what_is_lost_or_wrong(ordeal, harm):
    place = ordeal._place
    AdapterIndex.build(
        place.pools / "0", place.index, embedder=word_encoder(), copy=True, overwrite=place.index.exists()
    ).close()
    with AdapterIndex.open(place.index, embedder=word_encoder()) as index:
        harm(index)
    _, failures = ordeal._look([State(dict.fromkeys(NAMES, 0))])
    assert bool(failures) == (harm is not HARM["nothing"])


def test_a_record_too_many_is_seen_and_a_step_in_flight_may_have_taken_effect_or_not(ordeal):
    place = ordeal._place
    AdapterIndex.build(
        place.pools / "0", place.index, embedder=word_encoder(), copy=True, overwrite=place.index.exists()
    ).close()
    whole, less = State(dict.fromkeys(NAMES, 0)), State(dict.fromkeys(NAMES[1:], 0))
    assert ordeal._look([less])[1] != []
    assert ordeal._look([less, whole]) == (whole, [])
    assert ordeal._look([whole, less]) == (whole, [])


def test_the_material_of_a_name_and_a_version_is_always_the_same(tmp_path):
    cards = write_pools(tmp_path / "one", ("a", "b"), 2)
    assert cards == write_pools(tmp_path / "two", ("a", "b"), 2)
    assert len({card.fingerprint for card in cards.values()}) == 4


@pytest.mark.parametrize(("kills", "share"), [(0, 0.5), (1, 1.5)])
def test_a_crash_test_of_nothing_is_refused(kills, share):
    with pytest.raises(ValueError, match="kills must be at least 1"):
        crash_test(kills, by_clock=share)
