from __future__ import annotations

import shutil
import sqlite3
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loracompose import AdapterIndex
from tests.retrieval.material import PROMPTS, TASKS, contents, make_adapter

STEPS = ["add", "remove", "update", "search"]


def test_a_change_by_another_process_is_seen_by_the_next_search(index, tmp_path, embedder):
    with AdapterIndex.open(tmp_path / "index", embedder=embedder) as other:
        other.remove("sql")
    assert "sql" not in index.search(PROMPTS, k=9).names


def test_an_index_that_was_replaced_is_neither_searched_nor_changed_by_those_who_had_it_open(
    index, pool, tmp_path, embedder
):
    index.search(PROMPTS)
    poem = make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=9)
    shutil.rmtree(pool / "sql")
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, overwrite=True) as new:
        for use in (
            lambda: index.search(PROMPTS),
            lambda: index.add(poem),
            lambda: index.update(pool / "mood"),
            lambda: index.remove("mood"),
            lambda: index.card("sql"),
        ):
            with pytest.raises(ValueError, match=r"catalog\.sqlite is not the file .* opened.*open the index again"):
                use()
        assert sorted(new.search(PROMPTS, k=9).names) == ["french", "mood", "sums"]
        assert [card.name for card in new.cards] == ["french", "mood", "sums"]


def test_an_index_that_was_deleted_says_so(index, tmp_path):
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(ValueError, match="replaced, moved or deleted"):
        index.search(PROMPTS)


def test_removing_never_touches_an_adapter_outside_the_index(index, pool):
    index.remove("sql")
    assert (pool / "sql" / "adapter_model.safetensors").exists()


def test_a_copying_index_copies_what_is_added_and_deletes_what_it_copied(pool, tmp_path, embedder):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as index:
        index.add(make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=9))
        first = index.path("poem")
        assert tmp_path / "index" in first.parents
        make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=10)
        index.update(tmp_path / "late" / "poem")
        second = index.path("poem")
        assert not first.exists()
        index.update(tmp_path / "late" / "poem")
        assert index.path("poem") == second
        index.remove("poem")
        assert not second.exists()
        assert (tmp_path / "late" / "poem" / "card.json").exists()
        with pytest.raises(ValueError, match="already"):
            index.add(pool / "sql")
        assert index.verify().ok


def test_an_added_adapter_is_found_and_a_removed_one_is_not(index, tmp_path):
    poem = make_adapter(tmp_path / "late" / "poem", ["write a poem about rain", "rhyme on the sea"], seed=9)
    prompt = ["write a poem about the sea"]
    card = index.add(poem)
    assert card == index.card("poem")
    assert index.search(prompt, k=1).names == ("poem",)
    index.remove("poem")
    assert "poem" not in index.search(prompt, k=9).names
    assert [stone.name for stone in index.catalog.tombstones()] == ["poem"]
    with pytest.raises(LookupError, match="was removed"):
        index.card("poem")


def test_the_same_folder_name_from_two_places_is_refused(index, tmp_path):
    with pytest.raises(ValueError, match="'sql' is in the index already"):
        index.add(make_adapter(tmp_path / "late" / "sql", ["another"], seed=9))
    assert index.card("sql").examples == tuple(TASKS["sql"])


def test_a_link_is_an_adapter_under_the_name_of_the_link(index, tmp_path):
    target = make_adapter(tmp_path / "store" / "abc123", ["write a poem"], seed=9)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "poem").symlink_to(target)
    assert index.add(tmp_path / "late" / "poem").name == "poem"
    assert index.path("poem") == (tmp_path / "late").resolve() / "poem"


def test_an_update_takes_the_new_content_and_buries_the_old(index, pool):
    old = index.card("sql").fingerprint
    make_adapter(pool / "sql", ["select everything"], seed=77)
    new = index.update(pool / "sql")
    assert new == index.card("sql")
    assert new.fingerprint != old
    assert [stone.fingerprint for stone in index.catalog.tombstones("sql")] == [old]
    assert len(index) == 4
    assert index.search(["select everything"], k=1, scoring="mean").scores.item() > 0.99


def test_an_update_without_a_change_changes_nothing(index, pool):
    generation = index.catalog.generation
    index.update(pool / "sql")
    assert index.catalog.generation == generation


def test_updating_or_removing_what_is_not_there_is_a_lookup_error(index, tmp_path):
    with pytest.raises(LookupError, match="no adapter named 'poem'"):
        index.update(make_adapter(tmp_path / "late" / "poem", ["a b"]))
    with pytest.raises(LookupError, match="no adapter named 'poem'"):
        index.remove("poem")
    with pytest.raises(FileNotFoundError, match=r"no adapter_config\.json"):
        index.add(tmp_path)


@pytest.mark.parametrize("copy", [False, True])
def test_a_failure_in_the_middle_of_an_add_leaves_the_old_index(pool, tmp_path, embedder, copy):
    index = AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=copy)
    before = contents(index)
    with sqlite3.connect(index.catalog.path) as other:
        other.execute(
            "CREATE TRIGGER fire BEFORE INSERT ON examples WHEN NEW.position = 1 "
            "BEGIN SELECT RAISE(ABORT, 'disk on fire'); END"
        )
    with pytest.raises(sqlite3.DatabaseError, match="disk on fire"):
        index.add(make_adapter(tmp_path / "late" / "poem", ["a", "b"], seed=9))
    assert contents(index) == before
    assert "poem" not in index
    assert index.verify().ok
    index.close()


def test_searches_run_while_adapters_come_and_go_and_each_sees_one_generation(index, tmp_path):
    pair = [make_adapter(tmp_path / "late" / name, TASKS["sql"], seed=9) for name in ("twin_a", "twin_b")]
    errors, seen = [], []
    done = threading.Event()

    def look():
        try:
            while not done.is_set():
                found = index.search(PROMPTS, k=99)
                seen.append(found.names)
                assert torch.isfinite(found.scores).all()
                assert torch.allclose(found.weights.sum(-1), torch.ones(len(PROMPTS)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(8):
        for folder in pair:
            index.add(folder)
        for folder in pair:
            index.remove(folder.name)
    done.set()
    for thread in threads:
        thread.join()
    assert errors == []
    base = ("french", "mood", "sql", "sums")
    states = {base, (*base, "twin_a"), (*base, "twin_a", "twin_b"), (*base, "twin_b")}
    assert set(seen) <= states


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "update", "search"]), st.sampled_from("abcd")), max_size=12)
)
def test_any_sequence_of_changes_gives_what_a_rebuild_gives(tmp_path_factory, embedder, steps):
    root = tmp_path_factory.mktemp("sequence")
    (root / "empty").mkdir()
    expected: dict[str, int] = {}
    with AdapterIndex.build(root / "empty", root / "index", embedder=embedder) as index:
        for version, (step, name) in enumerate(steps):
            folder = make_adapter(root / "pool" / name, [f"{name} number {version}", f"about {name}"], version)
            if step == "search":
                index.search(["number"], k=2)
            elif step == "add" and name not in expected:
                index.add(folder)
                expected[name] = version
            elif step == "remove" and name in expected:
                index.remove(name)
                del expected[name]
            elif step == "update" and name in expected:
                index.update(folder)
                del expected[name]  # it moves to the end
                expected[name] = version
        assert [card.name for card in index.cards] == list(expected)
        shutil.rmtree(root / "pool", ignore_errors=True)
        for name, version in expected.items():
            make_adapter(root / "pool" / name, [f"{name} number {version}", f"about {name}"], version)
        (root / "pool").mkdir(exist_ok=True)
        assert index.verify().ok
        changed = index.search(PROMPTS, k=9)
        with AdapterIndex.build(root / "pool", root / "fresh", embedder=embedder) as fresh:
            built = fresh.search(PROMPTS, k=9)
            assert index.temperature == pytest.approx(fresh.temperature, rel=1e-3)
        order = [changed.names.index(name) for name in built.names]
        assert [changed.cards[i] for i in order] == list(built.cards)
        torch.testing.assert_close(changed.scores[:, order], built.scores)
        torch.testing.assert_close(changed.weights[:, order], built.weights, atol=1e-3, rtol=0)
