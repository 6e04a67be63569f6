from __future__ import annotations

import json
import shutil
import sqlite3

import numpy as np
import pytest

from loracompose import AdapterIndex
from loracompose.retrieval.embedding import CallableEmbedder, features
from loracompose.retrieval.snapshot import FITTED_KEY
from loracompose.retrieval.upkeep import content_digest
from tests.retrieval.material import TASKS, assert_alike, bag_of_words, contents, make_adapter


def edit(index, statement, *values):
    with sqlite3.connect(index.catalog.path) as other:
        other.execute(statement, values)


def spoil(index, blob, name="sql"):
    edit(
        index,
        "UPDATE examples SET embedding = ? WHERE position = 1 AND adapter = (SELECT id FROM adapters WHERE name = ?)",
        blob,
        name,
    )


def records(index):
    return {entry.card.name: entry.card for entry in index.catalog.entries()}


def by_name(found):
    """What a search sees, whatever the order of the adapters."""
    names, scores, weights, temperature = found
    order = np.argsort(names)
    return sorted(names), np.asarray(scores)[:, order], np.asarray(weights)[:, order], temperature


def test_a_sound_index_is_not_touched(index):
    before = content_digest(index.catalog)
    report = index.repair()
    assert (report.ok, report.mended, report.remaining) == (True, (), ())
    assert content_digest(index.catalog) == before


@pytest.mark.parametrize(
    "blob",
    [
        np.full(128, np.nan, dtype="<f4").tobytes(),
        np.ones(128, dtype="<f4").tobytes(),
        b"1234",
        (np.eye(1, 128, 5) + np.eye(1, 128, 69)).astype("<f4").tobytes(),
    ],
    ids=["not finite", "wrong norm", "wrong size", "of another text"],
)
def test_broken_embeddings_are_made_again_and_no_other(index, embedder, blob):
    before, held = contents(index), records(index)
    untouched = {e.card.name: e.id for e in index.catalog.entries() if e.card.name != "sql"}
    spoil(index, blob)
    report = index.repair()
    assert [problem.adapter for problem in report.mended] == ["sql"]
    assert report.ok
    assert index.verify().ok
    assert records(index) == held
    entry = index.catalog.entry("sql")
    wanted = features(embedder, entry.card.examples, index.catalog.settings)
    np.testing.assert_array_equal(index.catalog.embeddings(entry.id), wanted)
    assert {e.card.name: e.id for e in index.catalog.entries() if e.card.name != "sql"} == untouched
    assert_alike(by_name(contents(index)), by_name(before))
    assert index.catalog.tombstones() == []


def test_a_repair_that_needs_no_encoder_asks_for_none(index, tmp_path):
    (tmp_path / "index" / "vectors.faiss").unlink()
    with AdapterIndex.open(tmp_path / "index") as opened:  # without the callable it was built with
        assert opened.repair().ok


def test_embeddings_are_never_made_again_with_another_encoder(index, tmp_path):
    spoil(index, b"1234")
    before = content_digest(index.catalog)
    with AdapterIndex.open(tmp_path / "index") as opened:
        opened._embedder = CallableEmbedder(bag_of_words, "another")
        with pytest.raises(ValueError, match="do not compare"):
            opened.repair()
    assert content_digest(index.catalog) == before


@pytest.mark.parametrize("harm", ["missing", "damaged", "unreadable fit"])
def test_what_is_derived_is_derived_anew(index, tmp_path, harm):
    before = contents(index)
    file = tmp_path / "index" / "vectors.faiss"
    right = file.read_bytes()
    if harm == "missing":
        file.unlink()
    elif harm == "damaged":
        file.write_bytes(right[:-1] + bytes([right[-1] ^ 1]))
    else:
        edit(index, f"UPDATE derived SET value = '{{\"of\": \"another time\"}}' WHERE key = '{FITTED_KEY}'")
    report = index.repair()
    assert [problem.kind for problem in report.mended] == ["derived"]
    assert report.ok
    assert file.read_bytes() == right
    assert contents(index) == before


def test_leftovers_are_deleted(pool, tmp_path, embedder):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as index:
        left = make_adapter(tmp_path / "index" / "adapters" / "0123456789ab" / "gone", ["a b"]).parent
        half = tmp_path / "index" / ".vectors.faiss.1.2"
        half.write_bytes(b"half")
        report = index.repair()
        assert report.ok
        assert {problem.kind for problem in report.mended} == {"leftover"}
        assert not left.exists()
        assert not half.exists()
        assert len(index) == 4


def test_an_adapter_that_moved_beside_its_neighbours_is_found_by_its_content(index, pool, tmp_path):
    held = records(index)
    (pool / "sql").rename(pool / "sql-renamed")
    report = index.repair()
    assert [(problem.adapter, problem.kind) for problem in report.mended] == [("sql", "missing")]
    assert report.ok
    assert index.path("sql") == pool.resolve() / "sql-renamed"
    assert records(index) == held


def test_a_pool_that_moved_is_found_where_it_is_looked_for(index, pool, tmp_path):
    (tmp_path / "new").mkdir()
    shutil.move(pool, tmp_path / "new" / "place")
    report = index.repair()
    assert [problem.kind for problem in report.remaining] == ["missing"] * 4
    assert "look_in" in report.remaining[0].remedy
    report = index.repair(look_in=[tmp_path / "nowhere", tmp_path / "new" / "place"])
    assert len(report.mended) == 4
    assert report.ok
    assert index.path("sql") == (tmp_path / "new" / "place").resolve() / "sql"


def test_a_lost_copy_is_copied_again_from_where_its_content_is(pool, tmp_path, embedder):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as index:
        shutil.rmtree(index.path("sql"))
        assert not index.repair().ok
        report = index.repair(look_in=[pool])
        assert report.ok
        assert tmp_path / "index" / "adapters" in index.path("sql").parents
        assert (pool / "sql" / "card.json").exists()
        shutil.rmtree(pool)
        assert index.verify().ok


@pytest.mark.parametrize("change", ["weights", "card", "torn"])
def test_what_is_like_a_missing_adapter_but_not_the_same_is_not_taken_for_it(index, pool, tmp_path, change):
    shutil.rmtree(pool / "sql")
    like = make_adapter(tmp_path / "other" / "sql", TASKS["sql"], seed=99 if change == "weights" else 1)
    if change == "card":
        (like / "card.json").write_text(json.dumps({"examples": ["something else"]}))
    if change == "torn":
        (like / "adapter_model.safetensors").write_bytes(b"torn")
    report = index.repair(look_in=[tmp_path / "other"])
    assert [(problem.adapter, problem.kind) for problem in report.remaining] == [("sql", "missing")]
    assert report.mended == ()


def test_what_cannot_be_derived_is_reported_with_its_remedy_and_its_record_kept(index, pool):
    held = records(index)
    make_adapter(pool / "mood", TASKS["mood"], seed=99)
    (pool / "french" / "adapter_model.safetensors").write_bytes(b"torn")
    shutil.rmtree(pool / "sql")
    card = json.loads((pool / "sums" / "card.json").read_text())
    (pool / "sums" / "card.json").write_text(json.dumps({**card, "tags": ["new"]}))
    before = content_digest(index.catalog)
    report = index.repair()
    assert report.mended == ()
    assert {problem.adapter for problem in report.remaining} == {"mood", "french", "sql", "sums"}
    assert all("update(folder)" in problem.remedy or "remove(name)" in problem.remedy for problem in report.remaining)
    assert records(index) == held
    assert content_digest(index.catalog) == before


def test_examples_that_were_lost_are_left_to_an_update(index, pool):
    edit(index, "DELETE FROM examples WHERE adapter = (SELECT id FROM adapters WHERE name = 'sql')")
    report = index.repair()
    assert {problem.adapter for problem in report.remaining} == {"sql"}
    assert "sql" in index
    index.update(pool / "sql")
    assert index.repair().ok


def test_a_damaged_catalog_is_left_alone_and_the_remedy_named(index, tmp_path):
    index.compact()
    index.close()
    path = tmp_path / "index" / "catalog.sqlite"
    content = bytearray(path.read_bytes())
    content[-2 * 4096 : -4096] = b"\xff" * 4096
    path.write_bytes(bytes(content))
    with AdapterIndex.open(tmp_path / "index") as opened:
        report = opened.repair()
    assert report.mended == ()
    assert report.remaining[0].kind == "catalog"
    assert "restore" in report.remaining[0].remedy
    assert path.read_bytes() == bytes(content)
