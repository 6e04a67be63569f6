from __future__ import annotations

import json
import shutil
import sqlite3

import pytest

from loracompose import AdapterIndex, load_adapter
from loracompose.retrieval import backup
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.database import Database
from loracompose.retrieval.upkeep import content_digest
from tests.retrieval.disk import watched_disk
from tests.retrieval.material import TASKS, contents, hidden, make_adapter, place_inside


@pytest.fixture(params=[False, True], ids=["refers", "copies"])
def original(request, pool, tmp_path, embedder):
    """An index that refers to its adapters, and one that copies them."""
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=request.param) as built:
        yield built


@pytest.fixture
def copying(pool, tmp_path, embedder):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as built:
        yield built


def digest(folder):
    catalog = Catalog.open(folder / "catalog.sqlite")
    try:
        return content_digest(catalog)
    finally:
        catalog.close()


def test_a_snapshot_is_an_index_that_finds_the_same_and_whose_paths_are_right(original, tmp_path, embedder):
    before = contents(original)
    report = original.snapshot(tmp_path / "deep" / "er" / "saved")
    assert (report.adapters, report.missing) == (4, ())
    with AdapterIndex.open(report.folder, embedder=embedder) as saved:
        assert saved.verify().ok
        assert contents(saved) == before
        assert saved.verify().ok
        inside = original.catalog.settings.copies
        assert (report.folder in saved.path("sql").parents) == inside
        assert load_adapter(saved.path("sql")).fingerprint == saved.card("sql").fingerprint
    assert hidden(tmp_path / "deep" / "er") == []


def test_a_snapshot_keeps_what_it_was_made_of_whatever_happens_afterwards(original, pool, tmp_path, embedder):
    original.snapshot(tmp_path / "saved")
    original.remove("sql")
    make_adapter(pool / "mood", ["new examples"], seed=5)
    original.update(pool / "mood")
    with AdapterIndex.open(tmp_path / "saved", embedder=embedder) as saved:
        assert [card.name for card in saved.cards] == sorted(TASKS)
        assert saved.card("mood").examples == tuple(TASKS["mood"])


def test_a_restored_index_is_what_it_was_and_finds_its_adapters_from_its_place(original, tmp_path, embedder):
    before, names = contents(original), [card.name for card in original.cards]
    original.snapshot(tmp_path / "saved")
    original.remove("sql")
    original.close()
    report = AdapterIndex.restore(tmp_path / "saved", tmp_path / "index")
    assert (report.ok, report.checked) == (True, 4)
    elsewhere = tmp_path / "a" / "b" / "index"
    assert AdapterIndex.restore(tmp_path / "saved", elsewhere).ok
    for home in (tmp_path / "index", elsewhere):
        with AdapterIndex.open(home, embedder=embedder) as index:
            assert [card.name for card in index.cards] == names
            assert contents(index) == before
            assert index.verify().ok
            assert not (home / "snapshot.json").exists()
            index.remove("sql")  # an index like any other
            index.add(tmp_path / "pool" / "sql")
            assert index.verify().ok
    assert hidden(tmp_path) == hidden(elsewhere.parent) == []


def test_a_snapshot_of_copies_needs_nothing_else(copying, pool, tmp_path, embedder):
    copying.snapshot(tmp_path / "saved")
    copying.close()
    shutil.rmtree(pool)
    shutil.rmtree(tmp_path / "index")
    (tmp_path / "far").mkdir()
    shutil.move(tmp_path / "saved", tmp_path / "far" / "saved")
    assert AdapterIndex.restore(tmp_path / "far" / "saved", tmp_path / "index").ok


def test_a_snapshot_that_was_moved_alone_still_finds_adapters_outside(index, tmp_path):
    index.snapshot(tmp_path / "saved")
    (tmp_path / "far" / "away").mkdir(parents=True)
    shutil.move(tmp_path / "saved", tmp_path / "far" / "away" / "saved")
    assert AdapterIndex.restore(tmp_path / "far" / "away" / "saved", tmp_path / "again").ok


def test_adapters_outside_that_changed_or_went_are_reported_and_their_records_restored(index, pool, tmp_path):
    index.snapshot(tmp_path / "saved")
    shutil.rmtree(pool / "sql")
    make_adapter(pool / "mood", TASKS["mood"], seed=99)
    report = AdapterIndex.restore(tmp_path / "saved", tmp_path / "again")
    assert {(problem.adapter, problem.kind) for problem in report.problems} == {("sql", "missing"), ("mood", "adapter")}
    assert report.checked == 4


def test_searching_in_a_snapshot_does_not_damage_it(copying, tmp_path, embedder):
    copying.snapshot(tmp_path / "saved")
    with AdapterIndex.open(tmp_path / "saved", embedder=embedder) as saved:
        saved.search(["anything"])
    assert AdapterIndex.restore(tmp_path / "saved", tmp_path / "again").ok


def weights(saved):
    return next(saved.rglob("sql/adapter_model.safetensors"))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def edit(saved, statement):
    with sqlite3.connect(saved / "catalog.sqlite") as other:
        other.execute(statement)


def tear(saved):
    file = saved / "catalog.sqlite"
    file.write_bytes(file.read_bytes()[:-4096])


HARM = {
    "a changed weight": lambda saved: flip(weights(saved)),
    "lost weights": lambda saved: weights(saved).unlink(),
    "a changed licence": lambda saved: next(saved.rglob("sql/LICENSE")).write_text("mine"),
    "a changed record": lambda saved: edit(saved, "UPDATE adapters SET license = 'mine' WHERE name = 'sql'"),
    "a lost record": lambda saved: edit(saved, "DELETE FROM adapters WHERE name = 'sql'"),
    "a changed embedding": lambda saved: edit(saved, "UPDATE examples SET embedding = zeroblob(512)"),
    "a lost tombstone": lambda saved: edit(saved, "DELETE FROM tombstones"),
    "a torn catalog": tear,
    "no catalog": lambda saved: (saved / "catalog.sqlite").unlink(),
    "a catalog that is none": lambda saved: (saved / "catalog.sqlite").write_bytes(b"no database" * 1000),
    "a torn manifest": lambda saved: (saved / "snapshot.json").write_text('{"format": 1, "files": {'),
    "a manifest without records": lambda saved: (saved / "snapshot.json").write_text('{"format": 1}'),
}


@pytest.mark.parametrize("harm", HARM.values(), ids=HARM.keys())
def test_a_damaged_snapshot_is_refused_and_the_index_stays_as_it_is(copying, pool, tmp_path, embedder, harm):
    (pool / "sql" / "LICENSE").write_text("mit")
    make_adapter(pool / "sql", TASKS["sql"], seed=77)
    copying.update(pool / "sql")
    copying.snapshot(tmp_path / "saved")
    copying.remove("mood")
    copying.close()
    before = digest(tmp_path / "index")
    harm(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"damaged|is not valid JSON|not a catalog"):
        AdapterIndex.restore(tmp_path / "saved", tmp_path / "index")
    assert digest(tmp_path / "index") == before
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as index:
        assert index.verify().ok
    assert hidden(tmp_path) == []


def test_a_manifest_that_names_files_outside_of_the_snapshot_is_refused(copying, tmp_path):
    copying.snapshot(tmp_path / "saved")
    path = tmp_path / "saved" / "snapshot.json"
    for name in ("../pool/sql/card.json", "adapters/x/../../../secret", "/etc/passwd", "adapters/x/y/../../z"):
        manifest = json.loads(path.read_text())
        path.write_text(json.dumps({**manifest, "files": {name: "0"}}))
        with pytest.raises(ValueError, match="which is no copy"):
            AdapterIndex.restore(tmp_path / "saved", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_snapshot_of_a_newer_format_is_refused(copying, tmp_path):
    copying.snapshot(tmp_path / "saved")
    path = tmp_path / "saved" / "snapshot.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 9}))
    with pytest.raises(ValueError, match="has format version 9, this loracompose reads version 1"):
        AdapterIndex.restore(tmp_path / "saved", tmp_path / "again")


def test_neither_a_snapshot_nor_a_restored_index_replaces_what_it_must_not(copying, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    copying.snapshot(tmp_path / "saved")
    with pytest.raises(FileExistsError, match="is not an index"):
        copying.snapshot(tmp_path / "thesis")
    with pytest.raises(FileExistsError):
        copying.snapshot(tmp_path / "saved")
    with pytest.raises(ValueError, match="is in the index folder"):
        copying.snapshot(tmp_path / "index" / "saved")
    with pytest.raises(FileExistsError, match="is not an index"):
        AdapterIndex.restore(tmp_path / "saved", tmp_path / "thesis")
    with pytest.raises(ValueError, match="must lie apart"):
        AdapterIndex.restore(tmp_path / "saved", tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="is no snapshot"):
        AdapterIndex.restore(tmp_path / "index", tmp_path / "again")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"
    assert hidden(tmp_path) == []


def test_whoever_had_the_index_open_while_it_was_restored_is_told(index, tmp_path):
    index.snapshot(tmp_path / "saved")
    AdapterIndex.restore(tmp_path / "saved", tmp_path / "index")
    with pytest.raises(ValueError, match="open the index again"):
        index.remove("sql")


@pytest.mark.parametrize(("owner", "after"), [(Database, "copy_to"), (backup, "copy_files")])
def test_copies_that_go_while_a_snapshot_is_made_do_not_spoil_it(
    copying, tmp_path, embedder, monkeypatch, owner, after
):
    """An adapter goes and another comes: once after the catalog was copied, once after its own copy was."""
    poem = make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=9)
    changes = [lambda: copying.remove("french"), lambda: copying.add(poem)]
    copy = getattr(owner, after)

    def interrupted(*arguments):
        copy(*arguments)
        while changes:
            changes.pop(0)()

    monkeypatch.setattr(owner, after, interrupted)
    copying.snapshot(tmp_path / "saved")
    monkeypatch.undo()
    with AdapterIndex.open(tmp_path / "saved", embedder=embedder) as saved:
        assert [card.name for card in saved.cards] == ["mood", "sql", "sums", "poem"]
        assert saved.verify().ok
    assert len(list((tmp_path / "saved" / "adapters").iterdir())) == 4


def test_a_copy_that_is_gone_is_named(copying, tmp_path):
    shutil.rmtree(copying.path("sql"))
    assert copying.snapshot(tmp_path / "saved").missing == ("sql",)
    report = AdapterIndex.restore(tmp_path / "saved", tmp_path / "again")
    assert [(problem.adapter, problem.kind) for problem in report.problems] == [("sql", "missing")]


def test_a_snapshot_is_on_the_disk_before_it_has_its_name(copying, tmp_path, monkeypatch):
    steps = watched_disk(monkeypatch)
    makers = {
        "saved": lambda: copying.snapshot(tmp_path / "saved"),
        "again": lambda: backup.restore_snapshot(tmp_path / "saved", tmp_path / "again"),
    }
    for name, make in makers.items():
        steps.clear()
        make()
        made = tmp_path / name
        written = [made, *(path for path in made.rglob("*") if not path.name.startswith("catalog.sqlite-"))]
        before, after = steps[: steps.index("rename")], steps[steps.index("rename") :]
        assert {path.stat().st_ino for path in written} <= set(before)
        assert tmp_path.stat().st_ino in after


def test_a_snapshot_refers_to_what_the_index_refers_to_in_its_own_folder(pool, tmp_path, embedder):
    home = place_inside(pool, tmp_path / "index", embedder, "0123456789ab/poem")
    with AdapterIndex.open(home, embedder=embedder) as index:
        assert index.snapshot(tmp_path / "saved").missing == ()
        place = index.path("poem")
    assert not (tmp_path / "saved" / "adapters").exists()
    with AdapterIndex.open(tmp_path / "saved", embedder=embedder) as saved:
        assert saved.path("poem") == place
        assert saved.verify().ok
