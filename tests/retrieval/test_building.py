from __future__ import annotations

import shutil

import numpy as np
import pytest

from loracompose import AdapterIndex, load_adapter
from loracompose.retrieval.embedding import INSTRUCTION, CallableEmbedder
from loracompose.retrieval.segments import closing, opening
from tests.retrieval.disk import watched_disk
from tests.retrieval.material import TASKS, bag_of_words, hidden, make_adapter


def test_every_subfolder_with_a_config_enters_in_the_order_of_names(index, pool):
    assert index.report.added == ("french", "mood", "sql", "sums")
    assert index.report.skipped == {}
    assert [card.name for card in index.cards] == ["french", "mood", "sql", "sums"]
    assert len(index) == 4
    assert "sql" in index
    assert "nosql" not in index
    adapter = load_adapter(pool / "sql")
    card = index.card("sql")
    assert (card.examples, card.fingerprint, card.base_model) == (
        tuple(TASKS["sql"]),
        adapter.fingerprint,
        "tiny/base",
    )
    assert index.path("sql") == pool.resolve() / "sql"


def test_a_card_says_what_the_public_name_says():
    from loracompose import Card

    assert Card.__module__ == "loracompose.retrieval.cards"


def test_what_cannot_be_found_or_loaded_is_reported_and_left_out(pool, tmp_path, embedder):
    (pool / "notes").mkdir()
    (pool / "README.md").write_text("a file")
    make_adapter(pool / "dora", ["a b"], use_dora=True)
    make_adapter(pool / "mute", [])
    (make_adapter(pool / "bare", ["a b"]) / "card.json").unlink()
    (make_adapter(pool / "torn", ["a b"]) / "adapter_model.safetensors").write_bytes(b"torn")
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder) as index:
        assert index.report.added == ("french", "mood", "sql", "sums")
        reasons = index.report.skipped
    assert sorted(reasons) == ["bare", "dora", "mute", "notes", "torn"]
    assert "use_dora" in reasons["dora"]
    assert "no examples" in reasons["mute"]
    assert "no card.json" in reasons["bare"]
    assert "no adapter_config.json" in reasons["notes"]
    assert reasons["torn"]


def test_strict_raises_all_reasons_and_leaves_nothing(pool, tmp_path, embedder):
    make_adapter(pool / "dora", ["a b"], use_dora=True)
    make_adapter(pool / "mute", [])
    with pytest.raises(ValueError, match=r"(?s)2 adapters cannot be indexed:.*dora: .*use_dora.*mute: .*no examples"):
        AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, strict=True)
    assert not (tmp_path / "index").exists()
    assert hidden(tmp_path) == []


def test_strict_does_not_mind_folders_that_are_no_adapters(pool, tmp_path, embedder):
    (pool / "notes").mkdir()
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, strict=True) as index:
        assert list(index.report.skipped) == ["notes"]


def test_a_build_that_fails_leaves_nothing_but_the_embeddings_it_made(pool, tmp_path):
    def failing(texts):
        if any("seven" in text for text in texts):
            raise RuntimeError("out of memory")
        return bag_of_words(texts)

    with pytest.raises(RuntimeError, match="out of memory"):
        AdapterIndex.build(pool, tmp_path / "index", embedder=CallableEmbedder(failing, "failing"), copy=True)
    assert not (tmp_path / "index").exists()
    assert hidden(tmp_path) == [".index.unfinished"]
    assert [path.name for path in (tmp_path / ".index.unfinished").iterdir()] == ["embedded.sqlite"]


def test_an_index_is_replaced_only_when_asked_and_survives_a_failing_replacement(index, pool, tmp_path, embedder):
    with pytest.raises(FileExistsError, match="overwrite=True"):
        AdapterIndex.build(pool, tmp_path / "index", embedder=embedder)
    broken = CallableEmbedder(lambda texts: np.zeros((len(texts), 64)), "zeros")
    with pytest.raises(ValueError, match="zero or non-finite"):
        AdapterIndex.build(pool, tmp_path / "index", embedder=broken, overwrite=True)
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as old:
        assert len(old) == 4
    shutil.rmtree(pool / "sql")
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, overwrite=True) as new:
        assert len(new) == 3
    assert hidden(tmp_path) == []


def test_a_folder_that_is_no_index_is_never_replaced(pool, tmp_path, embedder):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not an index"):
        AdapterIndex.build(pool, tmp_path / "thesis", embedder=embedder, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_an_index_never_replaces_the_folder_that_its_adapters_come_from(pool, tmp_path, embedder):
    home = tmp_path / "index"
    AdapterIndex.build(pool, home, embedder=embedder).close()
    mine = make_adapter(home / "mine" / "poem", ["write a poem"]).parent
    (tmp_path / "linked").symlink_to(mine)
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "poem").symlink_to(mine / "poem")
    for source in (mine, home, tmp_path / "linked", home / "mine" / ".." / "mine", tmp_path / "links"):
        with pytest.raises(ValueError, match=rf"index folder {home} that would be replaced.*; move them") as told:
            AdapterIndex.build(source, home, embedder=embedder, overwrite=True)
        assert str(home if source == home else mine) in str(told.value)
    assert (mine / "poem" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("foreign", ["notes.txt", "mine/", "adapters/mine/", "adapters/0123456789ab/sql/train.py"])
def test_an_index_folder_with_anything_else_in_it_is_never_replaced(pool, tmp_path, embedder, foreign):
    home = tmp_path / "index"
    AdapterIndex.build(pool, home, embedder=embedder, copy=True).close()
    place = home / foreign
    (place if foreign.endswith("/") else place.parent).mkdir(parents=True, exist_ok=True)
    if not foreign.endswith("/"):
        place.write_text("years of work")
    with pytest.raises(FileExistsError, match=rf"did not write: .*{foreign.rstrip('/')}.*move"):
        AdapterIndex.build(pool, home, embedder=embedder, overwrite=True)
    assert place.exists()
    assert hidden(tmp_path) == []
    with AdapterIndex.open(home, embedder=embedder) as index:
        assert len(index) == 4


def test_what_is_named_as_a_copy_in_an_index_that_makes_none_is_the_users(pool, tmp_path, embedder):
    home = tmp_path / "index"
    AdapterIndex.build(pool, home, embedder=embedder).close()
    mine = make_adapter(home / "adapters" / "0123456789ab" / "poem", ["write a poem"])
    with pytest.raises(FileExistsError, match="did not write: adapters; move"):
        AdapterIndex.build(pool, home, embedder=embedder, overwrite=True)
    assert (mine / "adapter_model.safetensors").is_file()


def test_an_index_of_copies_that_was_changed_and_is_open_is_replaced_when_asked(pool, tmp_path, embedder):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as index:
        (pool / "sql" / "LICENSE").write_text("mit")
        index.update(make_adapter(pool / "sql", ["select everything"], seed=77))
        index.search(["anything"])
        (tmp_path / "index" / ".vectors.faiss.1.2").write_bytes(b"what a crash leaves")
        AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, overwrite=True).close()
    assert hidden(tmp_path) == []


def test_copies_are_on_the_disk_before_the_index_names_them(pool, tmp_path, embedder, monkeypatch):
    steps = watched_disk(monkeypatch)
    home = tmp_path / "index"
    with AdapterIndex.build(pool, home, embedder=embedder, copy=True) as index:
        before, after = steps[: steps.index("rename")], steps[steps.index("rename") :]
        written = [home, home / "adapters", *(home / "adapters").rglob("*")]
        assert len(written) == 2 + 4 * (2 + 3)
        assert {path.stat().st_ino for path in written} <= set(before)
        assert tmp_path.stat().st_ino in after
        steps.clear()
        index.add(make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=9))
        place = index.path("poem")
        written = [place, place.parent, home / "adapters", *place.iterdir()]
        assert {path.stat().st_ino for path in written} <= set(steps)


def test_a_missing_source_is_an_error_and_an_empty_one_an_empty_index(tmp_path, embedder):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        AdapterIndex.build(tmp_path / "none", tmp_path / "index", embedder=embedder)
    (tmp_path / "empty").mkdir()
    with AdapterIndex.build(tmp_path / "empty", tmp_path / "index", embedder=embedder) as index:
        found = index.search(["anything"])
        assert (found.cards, found.scores.shape, found.weights.shape) == ((), (1, 0), (1, 0))
        assert index.verify().ok


def test_progress_shows_bars_and_changes_nothing(pool, tmp_path, embedder, capsys):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, progress=True) as index:
        assert len(index) == 4
    assert "embedding" in capsys.readouterr().out


def test_examples_and_prompts_are_embedded_whole_under_the_instruction_and_at_their_edges(pool, tmp_path):
    seen = []

    def watching(texts):
        seen.extend(texts)
        return bag_of_words(texts)

    embedder = CallableEmbedder(watching, "watching")
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder) as index:
        index.search(["hello"])
    texts = [text for text in seen if text != "dimension"]
    plain = [*(example for examples in TASKS.values() for example in examples), "hello"]
    views = [*plain, *(INSTRUCTION + text for text in plain), *map(opening, plain), *map(closing, plain)]
    assert set(texts) == set(views)
    assert INSTRUCTION == "Represent the sentence for similar task retrieval: "


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "(" * 200 + "q_proj" + ")" * 200},
        {"layers_to_transform": [0], "layers_pattern": "(?i)layers"},
        {"layers_to_transform": [0], "layers_pattern": "(?P<idx>x)"},
    ],
    ids=["nested", "flags", "names"],
)
def test_a_pattern_that_cannot_be_run_leaves_out_its_adapter_alone(pool, tmp_path, embedder, config):
    make_adapter(pool / "odd", ["write a poem"], **config)
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder) as index:
        assert set(index.report.skipped) == {"odd"}
        assert list(config)[-1] in index.report.skipped["odd"]
        assert len(index) == 4


@pytest.mark.parametrize(
    "text",
    ['{"examples": ["a"], "examples": ["b"]}', '{"examples": ["a"], "x": ' + "[" * 3000 + "]" * 3000 + "}"],
    ids=["twice", "nested"],
)
def test_a_card_that_is_no_sound_json_leaves_out_its_adapter_alone(pool, tmp_path, embedder, text):
    (make_adapter(pool / "odd", ["x"]) / "card.json").write_text(text)
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder) as index:
        assert set(index.report.skipped) == {"odd"}
