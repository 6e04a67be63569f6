"""A large pool finds what comparing with all finds, through every change, re-whitening and accident."""

from __future__ import annotations

import json
import sqlite3
import threading
from contextlib import closing
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loracompose import AdapterIndex
from loracompose.retrieval.database import Database
from loracompose.retrieval.embedding import features, whole
from loracompose.retrieval.scale import gathering, making, searching
from loracompose.retrieval.scale.gathering import CancelledError
from loracompose.retrieval.scale.ledger import generation_and_record
from loracompose.retrieval.scale.making import make_version
from loracompose.retrieval.scale.parts import EDGE, SHAPE, WHOLE, parts_of
from loracompose.retrieval.scale.pool import Bound, LargePool
from loracompose.retrieval.scale.structure import Breadth
from loracompose.retrieval.scale.version import KINDS, file_of, load_version
from loracompose.retrieval.weighting import log_softmax
from tests.retrieval.scale.material import EMBEDDER, PROMPTS, card, enter, make_index

ALL = 100


def large(tmp_path, seeds=range(30), name="large"):
    return make_index(tmp_path / name, seeds, exact_limit=5)


def small(tmp_path, seeds=range(30), name="small"):
    return make_index(tmp_path / name, seeds, exact_limit=1000)


def assert_same(found, expected):
    assert found.names == expected.names
    for part in ("scores", "weights", "typicality"):
        np.testing.assert_allclose(getattr(found, part), getattr(expected, part), atol=2e-4)


def by_definition(index, number=WHOLE):
    """Scores of all adapters for PROMPTS, from the catalog alone, under the frozen covariance and what changed it."""
    view = index._large.view()
    part, drift = view.version.parts[number], view.drifts[number]
    frame = part.frame
    entries = index.catalog.entries()
    stored = [parts_of(index.catalog.embeddings(entry.id), entry.card.examples)[number] for entry in entries]
    groups = [own.astype(np.float64) for own in stored]
    scatter = sum((group - group.mean(axis=0)).T @ (group - group.mean(axis=0)) for group in groups)
    frozen = np.linalg.inv(frame.whitening @ frame.whitening.T)
    weight = 1 - frame.shrinkage
    base = frame.freedom * frozen + weight * (scatter - part.scatter)
    inverse = np.linalg.inv(base / (frame.freedom + weight * drift.freedom))
    means = np.stack([group.mean(axis=0) for group in groups])
    gaps = parts_of(features(EMBEDDER, PROMPTS, view.settings), PROMPTS)[number][:, None] - means
    fits = -0.5 * np.einsum("pkd,de,pke->pk", gaps, inverse, gaps) / frame.temperature
    return [entry.card.name for entry in entries], log_softmax(fits)


@pytest.mark.parametrize("scoring", ["hybrid", "discriminant", "mean"])
@pytest.mark.parametrize("k", [1, 5, ALL])
def test_both_ways_find_the_same(tmp_path, scoring, k):
    with large(tmp_path) as one, small(tmp_path) as other:
        assert_same(one.search(PROMPTS, k, scoring=scoring), other.search(PROMPTS, k, scoring=scoring))


@pytest.mark.parametrize("exact_limit", [5, 1000])
@pytest.mark.parametrize("scoring", ["hybrid", "discriminant", "mean"])
def test_a_search_compares_as_the_index_says_unless_it_is_told(tmp_path, scoring, exact_limit):
    with make_index(tmp_path / "index", range(30), exact_limit=exact_limit, scoring=scoring) as index:
        told = {way: index.search(PROMPTS, 5, scoring=way).scores for way in ("hybrid", "discriminant", "mean")}
        unsaid = index.search(PROMPTS, 5).scores
    for way, scores in told.items():
        assert (unsaid.shape == scores.shape and bool((unsaid == scores).all())) == (way == scoring)


@pytest.mark.parametrize("scoring", ["hybrid", "mean"])
def test_both_ways_filter_and_exclude_alike(tmp_path, scoring):
    exclude = [None, ["a00003"], ["a00011", "a00000"], []]
    with large(tmp_path) as one, small(tmp_path) as other:
        for where in (None, {"tags": "t1"}, {"name": "a00007"}, lambda card: card.name > "a00020"):
            asked = {"k": 4, "exclude": exclude, "where": where, "scoring": scoring}
            assert_same(one.search(PROMPTS, **asked), other.search(PROMPTS, **asked))
        for wrong in ({"exclude": [["nobody"]] * 4}, {"where": {"colour": "red"}}):
            with pytest.raises(LookupError):
                one.search(PROMPTS, **wrong)


def test_both_ways_explain_alike(tmp_path):
    with large(tmp_path) as one, small(tmp_path) as other:
        found, expected = one.explain(PROMPTS[0]), other.explain(PROMPTS[0])
    assert [c.card for c in found.candidates] == [c.card for c in expected.candidates]
    assert [c.nearest for c in found.candidates] == [c.nearest for c in expected.candidates]
    np.testing.assert_allclose([c.score for c in found.candidates], [c.score for c in expected.candidates], atol=1e-4)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 40)), max_size=12), st.booleans())
def test_any_sequence_of_changes_finds_what_the_definition_says(tmp_path_factory, steps, every):
    with large(tmp_path_factory.mktemp("pool"), range(20)) as index:
        index.search(PROMPTS)
        for add, seed in steps:
            present = card(seed).name in index
            if add and not present:
                enter(index.catalog, seed)
            elif not add and present:
                index.catalog.remove(card(seed).name)
            if every:  # otherwise all changes are caught up with at once
                index.search(PROMPTS)
        found = index.search(PROMPTS, ALL, scoring="discriminant")
        names, scores = by_definition(index)
        assert list(found.names) == names
        np.testing.assert_allclose(found.scores, scores, atol=1e-3)


@pytest.mark.parametrize("number", [EDGE, SHAPE])
def test_what_rescores_follows_what_comes_and_goes_as_the_definition_says(tmp_path, number):
    with large(tmp_path, range(20)) as index:
        index.search(PROMPTS)
        for seed in (30, 31, 32):
            enter(index.catalog, seed)
        for name in ("a00004", "a00031"):
            index.catalog.remove(name)
        view = index._large.view()
        assert view.drifts[number].freedom == 21 * 3 - view.version.parts[number].frame.freedom
        names, scores = by_definition(index, number)
        assert len(names) == 21
        places = view.places(np.array(index.catalog.ids()))
        queries = view.queries(parts_of(features(EMBEDDER, PROMPTS, view.settings), PROMPTS))
        found = log_softmax(np.stack([view.fits(query, places, number) for query in queries]))
        np.testing.assert_allclose(found, scores, atol=2e-3)


def test_an_adapter_that_is_replaced_is_found_by_its_new_examples(tmp_path):
    with large(tmp_path) as index:
        index.search(PROMPTS)
        new = card(99)
        index.catalog.replace(
            type(new)("a00003", examples=new.examples, fingerprint="new"),
            "pool/a00003",
            features(EMBEDDER, new.examples, index.catalog.settings),
        )
        found = index.search([new.examples[0]], 1)
        assert found.names == ("a00003",)
        assert len(index._large.view()) == 30


def test_what_came_is_a_candidate_by_its_distance_as_what_was_there_is(tmp_path):
    with large(tmp_path) as index:
        index._large.view()
        for seed in (97, 98, 99):
            enter(index.catalog, seed)
        view = index._large.view()
        prompts = [card(seed).examples[0] for seed in (99, 7, 98)]
        queries = view.queries([whole(features(EMBEDDER, prompts, view.settings))])
        nearest = [int(view.fits(query, np.arange(33)).argmax()) for query in queries]
        assert nearest == [32, 7, 31]
        assert [places.tolist() for places in view.near(queries, Breadth(1, 1))] == [[place] for place in nearest]


@pytest.mark.parametrize("sample", [512, 8])
def test_a_version_made_from_the_one_before_is_one_made_from_the_catalog(tmp_path, monkeypatch, sample):
    monkeypatch.setattr(gathering, "_SAMPLE", sample)
    with large(tmp_path) as index:
        before = index._large.view().version
        for seed in (50, 51, 52):
            enter(index.catalog, seed)
        for name in ("a00002", "a00029", "a00051"):
            index.catalog.remove(name)
        database = Database.open(index.catalog.path)
        versions = []
        for previous in (before, None):
            record = make_version(database, index.folder, previous)
            versions.append(load_version(index.folder, record))
        database.close()
        one, other = versions
        assert one.ids.tolist() == other.ids.tolist() == index.catalog.ids()
        assert one.sizes.tolist() == other.sizes.tolist()
        rows = np.arange(len(one.ids))
        for mine, theirs in zip(one.parts, other.parts, strict=True):
            assert mine.frame.freedom == theirs.frame.freedom
            np.testing.assert_allclose(mine.scatter, theirs.scatter, atol=1e-5)
            np.testing.assert_allclose(mine.frame.precision, theirs.frame.precision, rtol=1e-3, atol=1e-3)
            means = [part.means.take(rows).rows + part.frame.centre for part in (mine, theirs)]
            np.testing.assert_allclose(*means, atol=1e-4)
        for mine, theirs in zip(one.words.take(rows), other.words.take(rows), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_rewhitening_behind_the_searches_changes_no_result_beyond_what_the_choices_change(tmp_path):
    with large(tmp_path) as index:
        index._large.view()
        pool = LargePool(index.catalog.path, index.folder, Bound(share=0.0, least=2))
        first = pool.current()
        for seed in (60, 61, 62):
            enter(index.catalog, seed)
        drifted = pool.current()
        assert drifted.version is first.version
        pool.wait()
        fresh = pool.current()
        assert fresh.version is not first.version
        assert (fresh.changed, len(fresh)) == (0, 33)
        given = [whole(features(EMBEDDER, PROMPTS[:1], fresh.settings))]
        places = [view.places(fresh.version.ids) for view in (drifted, fresh)]
        old, new = (
            view.fits(view.queries(given)[0], place) for view, place in zip((drifted, fresh), places, strict=True)
        )
        old, new = (view.version.parts[0].frame.temperature * fit for view, fit in ((drifted, old), (fresh, new)))
        assert np.corrcoef(old, new)[0, 1] > 0.99
        assert old.argmax() == new.argmax()
        pool.close()
        stored = {path.name.split("-")[1].split(".")[0] for path in index.folder.glob("version-*.*")}
        assert stored == {fresh.version.token}


def test_searches_go_on_while_a_version_is_made(tmp_path, monkeypatch):
    entered, release = threading.Event(), threading.Event()
    derive = making.derive_files

    def slow(*given):
        entered.set()
        assert release.wait(20)
        return derive(*given)

    with large(tmp_path) as index:
        index._large.view()
        pool = LargePool(index.catalog.path, index.folder, Bound(share=0.0, least=0))
        first = pool.current().version
        monkeypatch.setattr(making, "derive_files", slow)
        enter(index.catalog, 70)
        pool.current()
        assert entered.wait(20)
        enter(index.catalog, 71)  # comes after the new version has read the catalog
        index.catalog.remove("a00004")
        during = pool.current()
        assert during.version is first
        assert len(during) == 31
        release.set()
        pool.wait()
        after = pool.current()
        assert after.version is not first
        assert (len(after), after.changed) == (31, 2)
        np.testing.assert_array_equal(
            np.sort(after.ids(after.places(np.array(index.catalog.ids())))), index.catalog.ids()
        )
        pool.close()


def test_a_failure_behind_the_searches_is_said_once_and_leaves_the_version(tmp_path, monkeypatch):
    def failing(*given):
        raise OSError("no space left")

    with large(tmp_path) as index:
        index._large.view()
        pool = LargePool(index.catalog.path, index.folder, Bound(share=0.0, least=0))
        token = pool.current().version.token
        monkeypatch.setattr(making, "derive_files", failing)
        enter(index.catalog, 70)
        pool.current()
        with pytest.raises(RuntimeError, match="no space left"):
            pool.wait()
        assert pool._view.version.token == token
        assert sorted(path.name for path in index.folder.glob("version-*.*")) == sorted(
            file_of(index.folder, token, kind).name for kind in KINDS
        )
        monkeypatch.undo()
        assert len(pool.current()) == 31
        pool.close()


def test_a_version_that_is_not_wanted_any_more_leaves_nothing(tmp_path):
    with large(tmp_path) as index:
        index._large.view()
        before = sorted(index.folder.glob("version-*"))
        database = Database.open(index.catalog.path)
        with pytest.raises(CancelledError):
            make_version(database, index.folder, None, lambda: True)
        database.close()
        assert sorted(index.folder.glob("version-*")) == before


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("harm", ["missing", "cut", "changed"])
def test_a_version_whose_file_is_missing_or_damaged_is_made_anew(tmp_path, kind, harm):
    with large(tmp_path) as index:
        expected = index.search(PROMPTS, 5)
        token = index._large.view().version.token
    path = file_of(index.folder, token, kind)
    content = path.read_bytes()
    path.unlink()
    if harm != "missing":
        path.write_bytes(content[:-1] if harm == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with type(index).open(index.folder, embedder=EMBEDDER) as again:
        assert_same(again.search(PROMPTS, 5), expected)
        assert again._large.view().version.token != token


def test_every_byte_of_a_version_is_verified_and_repair_makes_it_anew(tmp_path):
    with large(tmp_path) as index:
        expected = index.search(PROMPTS, 5)
        token = index._large.view().version.token

        def derived():
            return [problem for problem in index.verify().problems if problem.kind == "derived"]

        assert derived() == []
        path = file_of(index.folder, token, "means")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert [problem.what for problem in derived()] == [f"{path.name} is damaged"]
        index.repair()
        assert derived() == []
        assert_same(index.search(PROMPTS, 5), expected)
        assert index._large.view().version.token != token


def test_a_version_of_other_embeddings_is_made_anew(tmp_path):
    with large(tmp_path) as index:
        index.search(PROMPTS)
        token = index._large.view().version.token
        index.rebuild()
        assert_same(index.search(PROMPTS), index.search(PROMPTS))
        assert index._large.view().version.token != token
        assert index._large.view().version.epoch == 1


def test_a_version_in_an_earlier_format_is_made_anew(tmp_path):
    with large(tmp_path) as index:
        expected = index.search(PROMPTS, 5)
        token = index._large.view().version.token
    with closing(sqlite3.connect(tmp_path / "large" / "catalog.sqlite")) as file:
        record = json.loads(file.execute("SELECT record FROM version").fetchone()[0])
        del record["format"]  # as before there were formats
        file.execute("UPDATE version SET record = ?", (json.dumps(record),))
        file.commit()
    with AdapterIndex.open(tmp_path / "large", embedder=EMBEDDER) as index:
        assert_same(index.search(PROMPTS, 5), expected)
        assert index._large.view().version.token != token


def test_departures_without_prompts_are_of_an_earlier_format_and_make_room(tmp_path):
    with large(tmp_path) as index:
        expected = index.search(PROMPTS, 5)
    with closing(sqlite3.connect(tmp_path / "large" / "catalog.sqlite")) as file:
        file.executescript(
            "DROP TRIGGER departing; DROP TABLE departures; CREATE TABLE departures (seq INTEGER PRIMARY KEY "
            "AUTOINCREMENT, adapter INTEGER NOT NULL, position INTEGER NOT NULL, embedding BLOB NOT NULL); CREATE "
            "TRIGGER departing BEFORE DELETE ON adapters BEGIN INSERT INTO departures (adapter, position, embedding) "
            "SELECT adapter, position, embedding FROM examples WHERE adapter = OLD.id; END"
        )
        record = json.loads(file.execute("SELECT record FROM version").fetchone()[0])
        file.execute("UPDATE version SET record = ?", (json.dumps(record | {"format": 2}),))
        file.commit()
    with AdapterIndex.open(tmp_path / "large", embedder=EMBEDDER) as index:
        assert_same(index.search(PROMPTS, 5), expected)
        index.catalog.remove("a00004")
        kept = index.catalog.database.rows("SELECT prompt FROM departures ORDER BY position")
        assert [row[0] for row in kept] == list(card(4).examples)
        assert len(index._large.view()) == 29


def test_another_process_sees_what_came_went_and_was_whitened_anew(tmp_path):
    with large(tmp_path) as index:
        first = index._large.view()
        other = LargePool(index.catalog.path, index.folder)
        enter(index.catalog, 80)
        index.catalog.remove("a00001")
        assert (len(other.current()), other.current().changed) == (30, 2)
        database = Database.open(index.catalog.path)
        make_version(database, index.folder, first.version)
        database.close()
        assert (len(other.current()), other.current().changed) == (30, 0)
        assert (len(index._large.view()), index._large.view().changed) == (30, 0)
        other.close()


def test_a_pool_that_shrinks_is_compared_exactly_again(tmp_path):
    with large(tmp_path, range(7)) as index, small(tmp_path, range(5)) as other:
        index.search(PROMPTS)
        for seed in (5, 6):
            index.catalog.remove(card(seed).name)
        assert index._large.view() is None
        assert_same(index.search(PROMPTS), other.search(PROMPTS))


def test_opening_and_searching_read_the_examples_of_those_that_are_found_and_no_others(tmp_path, monkeypatch):
    with large(tmp_path, range(40)) as index:
        index.search(PROMPTS[:1])
    read = []
    rows = Database.rows

    def counting(self, query, *values):
        found = rows(self, query, *values)
        if "examples" in query:
            read.extend(found)
        return found

    monkeypatch.setattr(Database, "rows", counting)
    with type(index).open(index.folder, embedder=EMBEDDER) as again:
        again.search(PROMPTS[:1], 3)
    assert 0 < len(read) <= 3 * 4


def test_half_precision_changes_scores_in_the_third_digit_at_most(tmp_path):
    with large(tmp_path) as one, make_index(tmp_path / "half", range(30), exact_limit=5, precision=2) as other:
        found, expected = (index.search(PROMPTS, ALL, scoring="discriminant") for index in (other, one))
        assert (other.folder / "catalog.sqlite").is_file()
    np.testing.assert_allclose(found.scores, expected.scores, atol=5e-2)
    assert found.scores.argmax(dim=1).tolist() == expected.scores.argmax(dim=1).tolist()


def test_a_departure_keeps_the_embeddings_of_what_went_until_a_version_knows_it(tmp_path):
    with large(tmp_path) as index:
        index._large.view()
        kept = index.catalog.embeddings(4)
        index.catalog.remove("a00003")
        database = index.catalog.database
        _, record = generation_and_record(database)
        assert record is not None
        pool = LargePool(index.catalog.path, index.folder)
        assert database.rows("SELECT DISTINCT adapter FROM departures") == [(4,)]
        np.testing.assert_array_equal(
            np.stack([np.frombuffer(row[0], "<f4") for row in database.rows("SELECT embedding FROM departures")]), kept
        )
        make_version(Database.open(index.catalog.path), index.folder, pool.current().version)
        assert database.rows("SELECT count(*) FROM departures") == [(0,)]
        pool.close()


def test_an_index_that_is_built_larger_than_its_limit_is_searched_by_a_version_from_the_start(tmp_path, embedder, pool):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, exact_limit=2) as one:
        assert len(list((tmp_path / "index").glob("version-*.faiss"))) == 1
        found = one.search(["count the users with a query"], 4)
    with AdapterIndex.build(pool, tmp_path / "other", embedder=embedder) as other:
        assert_same(found, other.search(["count the users with a query"], 4))
    with pytest.raises(ValueError, match="exact_limit must be at least 1, got 0"):
        AdapterIndex.build(pool, tmp_path / "none", embedder=embedder, exact_limit=0)


@pytest.mark.parametrize(
    ("weights", "count"), [((1, 1, 1, 1), 3), ((0, 0, 1, 1), 3), ((1, 1, 1, 0), 2), ((1, 0, 1, 0), 1)]
)
def test_parts_behind_the_last_one_with_a_weight_are_left_out(weights, count):
    view = SimpleNamespace(version=SimpleNamespace(fitted=SimpleNamespace(weights=weights)))
    given = np.zeros((1, 8), dtype=np.float32)
    assert len(searching._parts(view, given, ["a"], "hybrid")) == count
    assert len(searching._parts(view, given, ["a"], "discriminant")) == 1
