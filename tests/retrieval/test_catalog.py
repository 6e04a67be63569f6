from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import FORMAT, Catalog, Settings

SETTINGS = Settings(encoder="e", revision="1", dimension=4, instruction="i: ")


def card(name, examples=("a", "b"), fingerprint="f"):
    return Card(name, "d", tuple(examples), ("t", "u"), "mit", fingerprint, "base", {"n": [1, {"m": 2}]})


def unit(rows=2, seed=0):
    views = np.random.default_rng(seed).normal(size=(rows, 4, 4)).astype(np.float32)
    return (views / np.linalg.norm(views, axis=2, keepdims=True)).reshape(rows, 16)


@pytest.fixture
def catalog(tmp_path):
    with_closing = Catalog.create(tmp_path / "catalog.sqlite", SETTINGS)
    yield with_closing
    with_closing.close()


def state(catalog):
    with catalog.reading():
        entries = catalog.entries()
        embeddings = [catalog.embeddings(entry.id).tolist() for entry in entries]
        return catalog.generation, catalog.settings, entries, embeddings, catalog.tombstones()


def test_the_catalog_imports_without_torch_and_without_faiss():
    code = "import loracompose.retrieval.catalog, sys; sys.exit(any(m in sys.modules for m in ('torch', 'faiss')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_goes_in_comes_out_after_reopening(catalog):
    catalog.add(card("x"), "../x", unit())
    catalog.close()
    with_new = Catalog.open(catalog.path)
    entry = with_new.entry("x")
    assert (entry.card, entry.path) == (card("x"), "../x")
    assert np.array_equal(with_new.embeddings(entry.id), unit())
    assert with_new.embeddings(entry.id).dtype == np.float32
    assert with_new.settings == SETTINGS
    with_new.close()


def test_kinds_come_out_as_they_went_in_and_wrong_ones_change_nothing(catalog):
    kinds = Card("x", examples=("a", "b"), kinds=("one", "ünd zwei"))
    entry = catalog.add(kinds, "../x", unit())
    assert catalog.entry("x") == entry
    assert catalog.entry("x").card.kinds == ("one", "ünd zwei")
    before = state(catalog)
    with pytest.raises(ValueError, match="y: kinds must name the kind of each of its 2 examples"):
        catalog.add(Card("y", examples=("a", "b"), kinds=("one",)), "../y", unit())
    assert state(catalog) == before


def test_the_file_is_in_wal_mode(catalog):
    with sqlite3.connect(catalog.path) as other:
        assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_taken_name_is_refused_and_changes_nothing(catalog):
    catalog.add(card("x"), "../x", unit())
    before = state(catalog)
    with pytest.raises(ValueError, match="'x' is in the index already; use update"):
        catalog.add(card("x", fingerprint="g"), "../other/x", unit(seed=1))
    assert state(catalog) == before


def test_an_unknown_name_is_a_lookup_error_that_lists_what_is_near(catalog):
    for name in ("french", "german"):
        catalog.add(card(name), name, unit())
    with pytest.raises(LookupError, match=r"no adapter named 'frensh' .* it has 2, among them \['french'\]"):
        catalog.entry("frensh")


def test_a_removed_adapter_leaves_a_tombstone_and_its_row_id_is_never_used_again(catalog):
    old = catalog.add(card("x", fingerprint="f1"), "x", unit())
    catalog.remove("x")
    assert "x" not in catalog
    assert len(catalog) == 0
    assert [(stone.name, stone.fingerprint) for stone in catalog.tombstones()] == [("x", "f1")]
    with pytest.raises(LookupError, match="'x' was removed from the index on 20"):
        catalog.entry("x")
    new = catalog.add(card("x", fingerprint="f2"), "x", unit())
    assert new.id > old.id
    assert [stone.fingerprint for stone in catalog.tombstones("x")] == ["f1"]
    assert catalog.tombstones("y") == []


def test_removing_leaves_no_examples_behind(catalog):
    catalog.add(card("x"), "x", unit())
    catalog.remove("x")
    assert catalog.example_count() == 0


def test_replacing_buries_the_old_content_only_if_the_content_changed(catalog):
    catalog.add(card("x", fingerprint="f1"), "x", unit())
    catalog.replace(card("x", examples=("c",), fingerprint="f1"), "x", unit(1))
    assert catalog.tombstones() == []
    catalog.replace(card("x", fingerprint="f2"), "x", unit())
    assert [stone.fingerprint for stone in catalog.tombstones()] == ["f1"]
    assert catalog.names() == ["x"]


@pytest.mark.parametrize("change", ["add", "replace", "remove"])
def test_a_failure_in_the_middle_of_a_change_leaves_the_old_state(catalog, change):
    catalog.add(card("x", fingerprint="f1"), "x", unit())
    with sqlite3.connect(catalog.path) as other:
        other.executescript(
            "CREATE TRIGGER second BEFORE INSERT ON examples WHEN NEW.position = 1 "
            "BEGIN SELECT RAISE(ABORT, 'disk on fire'); END;"
            "CREATE TRIGGER stone BEFORE INSERT ON tombstones WHEN NEW.fingerprint = 'f1' "
            "BEGIN SELECT RAISE(ABORT, 'disk on fire'); END;"
        )
    before = state(catalog)
    act = {
        "add": lambda: catalog.add(card("y"), "y", unit()),
        "replace": lambda: catalog.replace(card("x", fingerprint="f1", examples=("c", "d")), "x", unit()),
        "remove": lambda: catalog.remove("x"),
    }[change]
    with pytest.raises(sqlite3.DatabaseError, match="disk on fire"):
        act()
    assert state(catalog) == before


def test_a_process_that_dies_in_the_middle_of_a_change_leaves_the_old_state(catalog):
    catalog.add(card("x"), "x", unit())
    before = state(catalog)
    code = (
        "import os, sys; from pathlib import Path; from loracompose.retrieval.catalog import Catalog\n"
        "catalog = Catalog.open(Path(sys.argv[1]))\n"
        "with catalog._changing():\n"
        "    catalog.remove('x')\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, catalog.path], check=False).returncode == 9
    assert state(catalog) == before
    assert catalog.damage() == []


def test_another_process_reads_while_a_change_is_under_way_and_sees_the_old_state(catalog):
    catalog.add(card("x"), "x", unit())
    reader = Catalog.open(catalog.path)
    with catalog._changing():
        catalog.remove("x")
        assert reader.names() == ["x"]
    assert reader.names() == []
    reader.close()


def test_a_thread_never_sees_the_half_change_of_another(catalog):
    catalog.add(card("x"), "x", unit())
    seen = []
    started = threading.Event()

    def look():
        started.set()
        seen.append(catalog.names())

    with catalog._changing():
        catalog.remove("x")
        thread = threading.Thread(target=look)
        thread.start()
        started.wait()
        catalog.add(card("y"), "y", unit())
    thread.join()
    assert seen == [["y"]]


def test_reading_holds_one_generation_while_another_process_writes(catalog):
    catalog.add(card("x"), "x", unit())
    writer = Catalog.open(catalog.path)
    with catalog.reading():
        before = catalog.names()
        writer.remove("x")
        assert catalog.names() == before == ["x"]
    assert catalog.names() == []
    writer.close()


@pytest.mark.parametrize("bad", [unit(3), unit(2)[:, :4], np.full((2, 16), np.nan, dtype=np.float32)])
def test_embeddings_that_do_not_fit_are_refused_and_change_nothing(catalog, bad):
    with pytest.raises(ValueError, match=r"x: embeddings must be finite and \(2, 16\)"):
        catalog.add(card("x"), "x", bad)
    assert len(catalog) == 0
    assert catalog.generation == 0


def test_embeddings_of_an_earlier_epoch_are_refused(catalog):
    anew = Settings(encoder="e2", revision="1", dimension=4, instruction="i: ", epoch=1)
    catalog.replace_embeddings(anew, {})
    with pytest.raises(ValueError, match="embedded anew while 'x'"):
        catalog.add(card("x"), "x", unit(), epoch=0)


def test_new_embeddings_must_cover_exactly_the_adapters_that_are_there(catalog):
    entry = catalog.add(card("x"), "x", unit())
    anew = Settings(encoder="e2", revision="1", dimension=4, instruction="i: ", epoch=1)
    before = state(catalog)
    with pytest.raises(ValueError, match="changed while it was being embedded"):
        catalog.replace_embeddings(anew, {})
    assert state(catalog) == before
    catalog.replace_embeddings(anew, {entry.id: unit(seed=5)})
    assert np.array_equal(catalog.embeddings(entry.id), unit(seed=5))
    assert catalog.settings == anew


def test_what_is_noted_holds_for_its_generation_alone(catalog):
    catalog.note("k", 0, "v")
    assert catalog.noted("k", 0) == "v"
    catalog.add(card("x"), "x", unit())
    assert catalog.noted("k", 1) is None
    catalog.note("k", 0, "late")
    assert catalog.noted("k", 0) == "v"


def test_more_adapters_than_a_statement_takes_variables_are_read_in_order(catalog):
    with catalog._changing():
        for i in range(1203):
            catalog.add(card(f"a{i}", examples=(str(i),)), f"a{i}", unit(1))
    assert [entry.card.examples[0] for entry in catalog.entries()] == [str(i) for i in range(1203)]
    assert catalog.generation == 1204


def test_a_point_query_reads_one_row(catalog):
    for name in "xyz":
        catalog.add(card(name), name, unit())
    with sqlite3.connect(catalog.path) as other:
        other.execute("UPDATE adapters SET tags = 'no json' WHERE name != 'y'")
    assert catalog.entry("y").card == card("y")


@pytest.mark.parametrize("version", ["1", "99"])
def test_an_older_or_newer_format_version_is_refused_with_the_remedy(catalog, version):
    catalog.close()
    with sqlite3.connect(catalog.path) as other:
        other.execute("UPDATE meta SET value = ? WHERE key = 'format'", (version,))
    message = rf"format version {version}, this loracompose reads version {FORMAT}.* build the index again from its"
    with pytest.raises(ValueError, match=message):
        Catalog.open(catalog.path)


@pytest.mark.parametrize("content", [b"this is no database at all, whatever its name", b""])
def test_a_file_that_is_no_catalog_is_refused(tmp_path, content):
    path = tmp_path / "catalog.sqlite"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is not a catalog"):
        Catalog.open(path)


def test_a_missing_catalog_says_how_to_make_one(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no index here: .* AdapterIndex.build"):
        Catalog.open(tmp_path / "catalog.sqlite")


def test_a_closed_catalog_says_so(catalog):
    catalog.close()
    catalog.close()
    with pytest.raises(ValueError, match="was closed"):
        catalog.names()


def test_an_embedding_of_the_wrong_size_is_named(catalog):
    entry = catalog.add(card("x"), "x", unit())
    with sqlite3.connect(catalog.path) as other:
        other.execute("UPDATE examples SET embedding = x'00' WHERE position = 1")
    with pytest.raises(ValueError, match="has 1 bytes, expected 64"):
        catalog.embeddings(entry.id)


def test_a_catalog_that_cannot_be_written_is_read(catalog, monkeypatch):
    catalog.add(card("x"), "x", unit())
    catalog.close()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    frozen = Catalog.open(catalog.path)
    assert frozen.names() == ["x"]
    frozen.note("k", 1, "v")
    assert frozen.noted("k", 1) is None
    with pytest.raises(PermissionError, match="cannot be written; copy"):
        frozen.remove("x")
    frozen.close()


@pytest.fixture
def frozen(catalog, monkeypatch):
    """The catalog, with one adapter and closed, as one opens it who cannot write it; others can."""
    catalog.add(card("x"), "x", unit())
    catalog.close()
    with monkeypatch.context() as patched:
        patched.setattr(os, "access", lambda path, mode: False)
        opened = Catalog.open(catalog.path)
    assert opened.names() == ["x"]
    yield opened
    opened.close()


def test_who_cannot_write_a_catalog_sees_what_others_write_and_has_closed(frozen):
    with closing(Catalog.open(frozen.path)) as other:
        other.add(card("y"), "y", unit(seed=1))
    assert not Path(f"{frozen.path}-wal").exists()
    assert frozen.names() == ["x", "y"]
    assert not frozen.writable
    with pytest.raises(PermissionError, match="cannot be written"):
        frozen.remove("x")


def test_who_cannot_write_a_catalog_sees_what_others_are_writing(frozen):
    with closing(Catalog.open(frozen.path)) as other:
        other.add(card("y"), "y", unit(seed=1))
        assert frozen.names() == ["x", "y"]
        other.add(card("z"), "z", unit(seed=2))
        assert frozen.names() == ["x", "y", "z"]


def test_who_cannot_write_a_catalog_reads_on_after_others_have_closed_it(frozen):
    with closing(Catalog.open(frozen.path)) as other:
        other.add(card("y"), "y", unit(seed=1))
        assert frozen.database._connection.total_changes == 0  # opened beside their log, and not read from yet
    assert frozen.names() == ["x", "y"]
    assert not Path(f"{frozen.path}-shm").exists()  # which a reader who may not make one could not have


def test_who_cannot_write_a_catalog_reads_on_after_it_was_compacted(frozen):
    with closing(Catalog.open(frozen.path)) as other:
        for number in range(60):
            other.add(card(f"n{number}"), "n", unit(seed=number))
    assert len(frozen.entries()) == 61
    with closing(Catalog.open(frozen.path)) as other:
        for number in range(59):
            other.remove(f"n{number}")
        other.database.compact()
    assert [entry.card.name for entry in frozen.entries()] == ["x", "n59"]
    assert frozen.damage() == []


def test_one_state_is_read_or_an_error_says_that_the_catalog_changed_meanwhile(frozen):
    def read_twice():
        with frozen.reading():
            assert frozen.names() == ["x"]
            with closing(Catalog.open(frozen.path)) as other:
                other.add(card("y"), "y", unit(seed=1))
            frozen.names()

    with pytest.raises(ValueError, match=r"changed while it was read.*try again"):
        read_twice()
    with frozen.reading():
        assert frozen.names() == ["x", "y"]
        with closing(Catalog.open(frozen.path)) as other:
            other.add(card("z"), "z", unit(seed=1))
            assert frozen.names() == ["x", "y"]  # what is in the log alone has not touched the file
