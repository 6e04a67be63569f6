from __future__ import annotations

import json
import os
import shutil
import sqlite3

import pytest

from loracompose import AdapterIndex, load_adapter
from loracompose.retrieval.embedding import CallableEmbedder
from tests.retrieval.material import PROMPTS, assert_alike, bag_of_words, contents, hidden, make_adapter


def test_an_opened_index_finds_what_the_built_one_found(index, tmp_path, embedder):
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as opened:
        assert contents(opened) == contents(index)


def test_opening_does_not_embed_anything(index, tmp_path):
    def never(texts):
        raise AssertionError("embedded")

    AdapterIndex.open(tmp_path / "index", embedder=CallableEmbedder(never, "bag-of-words", "1")).close()


@pytest.mark.parametrize(("name", "revision"), [("other", "1"), ("bag-of-words", "2")])
def test_another_encoder_is_refused_naming_both_and_the_remedy(index, tmp_path, name, revision):
    other = CallableEmbedder(bag_of_words, name, revision)
    message = rf"'bag-of-words' \(revision '1'\), this embedder is '{name}' \(revision '{revision}'\).*reembed=True"
    with pytest.raises(ValueError, match=message):
        AdapterIndex.open(tmp_path / "index", embedder=other)


def test_an_index_of_a_callable_needs_the_callable_only_where_texts_are_embedded(index, tmp_path):
    with AdapterIndex.open(tmp_path / "index") as opened:
        assert [card.name for card in opened.cards] == ["french", "mood", "sql", "sums"]
        opened.remove("mood")
        assert opened.verify().ok
        for use in (lambda: opened.search(["x"]), lambda: opened.add(opened.path("sql")), opened.prepare):
            with pytest.raises(ValueError, match=r"built with the callable 'bag-of-words'.* pass it as embedder="):
                use()


def test_reembedding_gives_what_a_build_with_the_new_encoder_gives(index, pool, tmp_path):
    new = CallableEmbedder(lambda texts: bag_of_words(texts)[:, :32] + 0.1, "shorter")
    with (
        AdapterIndex.open(tmp_path / "index", embedder=new, reembed=True) as anew,
        AdapterIndex.build(pool, tmp_path / "other", embedder=new) as built,
    ):
        assert contents(anew) == contents(built)
        assert anew.verify().ok
    with pytest.raises(ValueError, match="this embedder is 'bag-of-words'"):
        index.search(["the handle that was open all along"])
    with pytest.raises(ValueError, match="this embedder is 'bag-of-words'"):
        index.add(make_adapter(tmp_path / "late", ["a b"]))


def test_a_rebuild_embeds_everything_anew(pool, tmp_path):
    shift = [0.0]
    embedder = CallableEmbedder(lambda texts: bag_of_words(texts) + shift[0], "shifted")
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder) as index:
        index.search(PROMPTS)
        shift[0] = 0.5
        index.rebuild()
        with AdapterIndex.build(pool, tmp_path / "fresh", embedder=embedder) as fresh:
            assert contents(index) == contents(fresh)
        assert index.verify().ok


def test_a_moved_index_still_finds_adapters_that_moved_with_it(index, tmp_path, embedder):
    index.close()
    (tmp_path / "elsewhere").mkdir()
    for part in ("pool", "index"):
        shutil.move(tmp_path / part, tmp_path / "elsewhere" / part)
    with AdapterIndex.open(tmp_path / "elsewhere" / "index", embedder=embedder) as moved:
        assert moved.path("sql") == (tmp_path / "elsewhere" / "pool" / "sql").resolve()
        assert moved.verify().ok


def test_an_index_moved_alone_says_which_folder_is_gone(index, tmp_path, embedder):
    index.close()
    shutil.move(tmp_path / "index", tmp_path / "a" / "b")
    with AdapterIndex.open(tmp_path / "a" / "b", embedder=embedder) as moved:
        with pytest.raises(FileNotFoundError, match=r"'sql' is gone: .*update\(folder\)"):
            moved.path("sql")
        moved.update(tmp_path / "pool" / "sql")
        assert moved.path("sql") == (tmp_path / "pool" / "sql").resolve()
        assert moved.catalog.tombstones() == []


def test_a_copying_index_needs_nothing_outside(pool, tmp_path, embedder):
    (pool / "sql" / "optimizer.pt").write_bytes(b"pickle")
    (pool / "sql" / "checkpoint-1").mkdir()
    (pool / "sql" / "LICENSE").write_text("mit")
    AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True).close()
    shutil.move(tmp_path / "index", tmp_path / "moved")
    fingerprint = load_adapter(pool / "sql").fingerprint
    shutil.rmtree(pool)
    with AdapterIndex.open(tmp_path / "moved", embedder=embedder) as index:
        folder = index.path("sql")
        assert load_adapter(folder).fingerprint == fingerprint
        assert folder.name == "sql"
        assert sorted(path.name for path in folder.iterdir()) == [
            "LICENSE",
            "adapter_config.json",
            "adapter_model.safetensors",
            "card.json",
        ]
        assert index.verify().ok


@pytest.mark.parametrize("harm", ["missing", "damaged", "stale"])
def test_a_faiss_file_that_is_missing_damaged_or_stale_is_derived_anew(index, tmp_path, embedder, harm):
    file = tmp_path / "index" / "vectors.faiss"
    old = file.read_bytes()
    if harm == "stale":
        index.remove("mood")
        index.search(["anything"])
    before = contents(index)
    right = file.read_bytes()
    index.close()
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(old if harm == "stale" else old[:-1] + bytes([old[-1] ^ 1]))
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as opened:
        assert_alike(contents(opened), before)  # statistics brought up to date round otherwise than new ones
    assert file.read_bytes() == right
    assert hidden(tmp_path / "index") == []


def test_a_sound_faiss_file_is_read_not_rewritten(index, tmp_path, embedder):
    file = tmp_path / "index" / "vectors.faiss"
    written = file.stat().st_ino
    AdapterIndex.open(tmp_path / "index", embedder=embedder).close()
    assert file.stat().st_ino == written


def test_a_readonly_index_is_searched_without_being_written(index, tmp_path, embedder, monkeypatch):
    before = contents(index)
    index.close()
    (tmp_path / "index" / "vectors.faiss").unlink()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as opened:
        assert contents(opened) == before
    assert [path.name for path in (tmp_path / "index").iterdir()] == ["catalog.sqlite"]


def test_a_closed_index_says_so(index):
    index.close()
    with pytest.raises(ValueError, match="was closed"):
        index.search(["x"])


@pytest.mark.real
def test_the_default_encoder_is_stored_checked_and_loaded_again_by_name(pool, tmp_path):
    AdapterIndex.build(pool, tmp_path / "index").close()
    with AdapterIndex.open(tmp_path / "index") as index:
        assert index.search(["Translate 'a green tree' into French"], k=1).names == ("french",)
        assert index.catalog.settings.revision
        stored = index.catalog.settings
    with sqlite3.connect(tmp_path / "index" / "catalog.sqlite") as other:
        value = json.dumps({**vars(stored), "revision": "sha256:else"})
        other.execute("UPDATE meta SET value = ? WHERE key = 'settings'", (value,))
    with AdapterIndex.open(tmp_path / "index") as index, pytest.raises(ValueError, match="sha256:else"):
        index.prepare()
    with pytest.raises(ValueError, match="sha256:else"):
        AdapterIndex.open(tmp_path / "index", embedder=stored.encoder)
