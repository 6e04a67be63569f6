from __future__ import annotations

import os
import sqlite3

import pytest

from loracompose import AdapterIndex
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.retrieval.locking import locked
from loracompose.retrieval.snapshot import FITTED_KEY, VECTORS_KEY
from loracompose.retrieval.upkeep import content_digest
from tests.retrieval.material import bag_of_words, contents, make_adapter, place_inside


def test_compacting_gives_back_the_space_of_what_was_removed_and_changes_no_record(index, tmp_path):
    many = [f"prompt {i} of very many" for i in range(400)]
    index.add(make_adapter(tmp_path / "late" / "long", many, seed=9))
    index.remove("long")
    before = contents(index), content_digest(index.catalog), index.catalog.generation
    assert index.catalog.database.rows("PRAGMA freelist_count")[0][0] > 0
    report = index.compact()
    assert index.catalog.database.rows("PRAGMA freelist_count") == [(0,)]
    assert (contents(index), content_digest(index.catalog), index.catalog.generation) == before
    assert report.deleted == ()
    assert report.bytes_before - report.bytes_after > 400 * 4 * 128
    files = list((tmp_path / "index").iterdir())
    assert report.bytes_after == sum(file.stat().st_size for file in files)
    log = tmp_path / "index" / "catalog.sqlite-wal"
    assert not log.exists() or log.stat().st_size == 0
    assert index.verify().ok


def test_compacting_drops_what_no_record_refers_to_and_nothing_else(pool, tmp_path, embedder):
    home = tmp_path / "index"
    with AdapterIndex.build(pool, home, embedder=embedder, copy=True) as index:
        left = make_adapter(home / "adapters" / "0123456789ab" / "gone", ["a b"]).parent
        half = home / ".vectors.faiss.1.2"
        half.write_bytes(b"half")
        copies = sorted(path for path in (home / "adapters").rglob("*") if left not in (path, *path.parents))
        assert {problem.kind for problem in index.verify().problems} == {"leftover"}
        assert index.compact().deleted == ("adapters/0123456789ab", ".vectors.faiss.1.2")
        assert sorted((home / "adapters").rglob("*")) == copies
        assert index.verify().ok


def test_only_derived_values_of_earlier_generations_are_dropped(index):
    index.search(["x"])
    index.remove("sql")
    index.search(["x"])
    now = index.catalog.generation
    index.catalog.note("of mine", now, "kept")
    with sqlite3.connect(index.catalog.path) as other:
        other.execute("INSERT INTO derived VALUES ('old', ?, 'dropped')", (now - 1,))
    index.compact()
    rows = index.catalog.database.rows("SELECT key, generation FROM derived ORDER BY key")
    assert rows == [(FITTED_KEY, now), ("of mine", now), (VECTORS_KEY, now)]


def test_a_copy_that_is_being_entered_is_not_taken_for_a_leftover(pool, tmp_path):
    """Whoever enters a copy shares the lock that deleting leftovers takes alone."""
    home = tmp_path / "index"
    seen = []

    def watching(texts):
        if any("poem" in text for text in texts):
            with pytest.raises(BlockingIOError), locked(home, wait=False):
                seen.append("deleting")
            with locked(home, shared=True, wait=False):
                seen.append("entering")
        return bag_of_words(texts)

    with AdapterIndex.build(pool, home, embedder=CallableEmbedder(watching, "watching"), copy=True) as index:
        index.add(make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=9))
        assert seen == ["entering"]
        with locked(home, wait=False):
            assert index.verify().ok


def test_an_index_that_cannot_be_written_is_not_compacted(index, tmp_path, embedder, monkeypatch):
    index.close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with (
        AdapterIndex.open(tmp_path / "index", embedder=embedder) as frozen,
        pytest.raises(PermissionError, match="cannot be written"),
    ):
        frozen.compact()


@pytest.mark.parametrize("clear", ["compact", "repair"])
def test_an_adapter_in_the_folder_of_copies_that_the_index_did_not_copy_is_never_cleared_away(
    pool, tmp_path, embedder, clear
):
    home = place_inside(pool, tmp_path / "index", embedder, "poem", "0123456789ab/song")
    beside = make_adapter(home / "adapters" / "abcdef012345" / "draft", ["a b"])
    with AdapterIndex.open(home, embedder=embedder) as index:
        assert index.verify().ok
        getattr(index, clear)()
        assert index.verify().ok
        assert (index.path("poem") / "card.json").is_file()
    assert (beside / "card.json").is_file()


def test_a_copying_index_takes_only_folders_named_as_its_copies_for_leftovers(pool, tmp_path, embedder):
    home = tmp_path / "index"
    with AdapterIndex.build(pool, home, embedder=embedder, copy=True) as index:
        mine = make_adapter(home / "adapters" / "mine" / "poem", ["a b"])
        left = make_adapter(home / "adapters" / "0123456789ab" / "gone", ["a b"])
        assert index.compact().deleted == ("adapters/0123456789ab",)
    assert (mine / "card.json").is_file()
    assert not left.exists()


def test_removing_an_adapter_deletes_nothing_that_the_index_did_not_copy(pool, tmp_path, embedder):
    home = place_inside(pool, tmp_path / "index", embedder, "mine/poem", "mine/song", "0123456789ab/tale")
    with AdapterIndex.open(home, embedder=embedder) as index:
        index.remove("poem")
        index.remove("tale")
        assert (index.path("song") / "card.json").is_file()
    for folder in ("mine/poem", "0123456789ab/tale"):
        assert (home / "adapters" / folder / "card.json").is_file()


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize("update", [False, True])
def test_an_adapter_inside_the_index_folder_is_refused_unless_it_is_a_copy_that_is_recorded(
    pool, tmp_path, embedder, copy, update
):
    home = tmp_path / "index"
    with AdapterIndex.build(pool, home, embedder=embedder, copy=copy) as index:
        inside = make_adapter(home / "adapters" / "0123456789ab" / "sql", ["a b"], seed=9)
        (tmp_path / "link").mkdir()
        (tmp_path / "link" / "sql").symlink_to(inside)
        enter = index.update if update else index.add
        for folder in (inside, tmp_path / "link" / "sql"):
            with pytest.raises(ValueError, match=r"sql: .* in the index folder .*move it out of there"):
                enter(folder)
        assert (inside / "card.json").is_file()
        if copy:
            recorded = index.path("sql")
            assert index.update(recorded) == index.card("sql")
            assert index.path("sql") == recorded
            assert (recorded / "card.json").is_file()
