"""Where large pools meet the life cycle: other processes, damaged records, shrinking, narrow filters."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest

from loracompose.retrieval import fitting, snapshot
from loracompose.retrieval.building import reembed
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.database import Database
from loracompose.retrieval.embedding import CallableEmbedder, features
from loracompose.retrieval.scale import allowed, ledger, making
from loracompose.retrieval.scale.making import make_version
from loracompose.retrieval.scale.pool import LargePool
from loracompose.retrieval.scale.shelf import CardShelf
from loracompose.retrieval.scale.version import load_version
from tests.retrieval.scale.material import EMBEDDER, PROMPTS, card, enter, make_index, texts

TURNED = CallableEmbedder(lambda texts: EMBEDDER(texts)[:, ::-1] * np.linspace(1, 3, 12), "turned", "1")


def large(tmp_path, seeds=range(30), name="large"):
    return make_index(tmp_path / name, seeds, exact_limit=5)


def test_a_version_made_from_one_that_is_not_current_any_more_has_the_exact_statistics(tmp_path):
    with large(tmp_path) as index:
        index.search(PROMPTS)
        database = Database.open(index.catalog.path)
        first = load_version(index.folder, make_version(database, index.folder))
        for seed in range(10):
            index.remove(card(seed).name)
        make_version(database, index.folder)  # by another process, which forgets the departures that it knows
        again = load_version(index.folder, make_version(database, index.folder, first))
        fresh = load_version(index.folder, make_version(database, index.folder))
        database.close()
    for mine, expected in zip(again.parts, fresh.parts, strict=True):
        assert mine.frame.freedom == expected.frame.freedom
        np.testing.assert_allclose(mine.scatter, expected.scatter, atol=1e-4)


class Interrupted(LargePool):
    """Something happens after a version was loaded and before what came since is read."""

    between = staticmethod(lambda: None)

    def _loaded(self, record):
        found = super()._loaded(record)
        between, self.between = self.between, lambda: None
        between()
        return found


def test_a_view_is_never_of_one_epoch_with_a_version_of_another(tmp_path):
    with large(tmp_path) as index:
        index.search(PROMPTS)
        pool = Interrupted(index.catalog.path, index.folder)
        pool.between = lambda: reembed(index.catalog, TURNED)
        view = pool.current()
        pool.close()
    assert view.settings.epoch == view.version.epoch


def test_what_goes_while_another_process_makes_a_version_is_gone_from_the_view(tmp_path):
    with large(tmp_path) as index:
        index.search(PROMPTS)
        pool = Interrupted(index.catalog.path, index.folder)

        def other():
            index.remove(card(0).name)
            database = Database.open(index.catalog.path)
            make_version(database, index.folder)
            database.close()

        pool.between = other
        assert len(pool.current()) == 29
        pool.close()


def test_a_snapshot_is_never_of_two_epochs(tmp_path):
    with make_index(tmp_path / "small", range(8), exact_limit=100) as index:
        index.search(PROMPTS)
        previous = index._snapshot
        catalog = index.catalog

        class Late(Catalog):
            def reading(self):
                if self.settings.epoch == 0:
                    reembed(catalog, TURNED)
                return super().reading()

        taken = snapshot.take_snapshot(Late(catalog.database), index.folder / "vectors.faiss", previous)
        assert taken.settings.epoch == 1
        for entry, group in zip(taken.entries, taken.examples, strict=True):
            np.testing.assert_array_equal(group, catalog.embeddings(entry.id))


def test_an_index_that_was_large_can_be_emptied_and_embedded_anew(tmp_path):
    with large(tmp_path, range(8)) as index:
        index.search(PROMPTS)
        for seed in range(8):
            index.remove(card(seed).name)
        index._embedder = TURNED
        index.rebuild()
        assert index.search(PROMPTS).cards == ()


def test_closing_while_the_next_version_is_just_done_is_fine(tmp_path):
    class Ending(LargePool):
        """Its worker ends between two looks at it."""

        looks = 0

        @property
        def _worker(self):
            self.looks += 1
            return self.thread if self.looks == 1 else None

        @_worker.setter
        def _worker(self, worker):
            self.looks = 0
            self.thread = worker

    with large(tmp_path) as index:
        pool = Ending(index.catalog.path, index.folder)
        pool._worker = threading.Thread(target=lambda: None)
        pool.thread.start()
        pool.close()


@pytest.mark.parametrize(
    "broken", [b"\0" * 12, np.full(48, np.nan, dtype="<f4").tobytes()], ids=["too short", "not finite"]
)
def test_removing_an_adapter_of_broken_embeddings_leaves_a_pool_that_can_be_searched(tmp_path, broken):
    with large(tmp_path) as index:
        index.search(PROMPTS)
        index.catalog.database.execute(
            "UPDATE examples SET embedding = ? WHERE adapter = (SELECT id FROM adapters WHERE name = ?)",
            broken,
            card(3).name,
        )
        index.remove(card(3).name)
        found = index.search(PROMPTS, 30)
        assert len(found.names) == 29
        assert np.isfinite(found.scores.numpy()).all()


def test_a_narrow_filter_ranks_by_all_channels_in_a_large_pool_too(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting, "_EXAMPLES", 60)
    keep = {card(seed).name for seed in range(0, 120, 12)}
    prompts = [texts(seed, 1)[0] for seed in range(1000, 1040)]
    with large(tmp_path, range(120)) as one, make_index(tmp_path / "small", range(120), exact_limit=1000) as other:
        mine, expected = (index.search(prompts, 1, where=lambda found: found.name in keep) for index in (one, other))
    for row in range(len(prompts)):
        assert mine.for_prompt(row)[0].card == expected.for_prompt(row)[0].card


def test_files_of_a_version_that_a_killed_process_was_making_are_swept_when_the_pool_is_opened(tmp_path):
    with large(tmp_path) as index:
        index.search(PROMPTS)
        left = index.folder / "version-0123456789ab.means"
        left.write_bytes(b"half of it")
        kept = set(index.folder.glob("version-*.*")) - {left}
        with making._alone(index.folder):  # it is being made after all
            LargePool(index.catalog.path, index.folder).close()
            assert left.exists()
        LargePool(index.catalog.path, index.folder).close()
        assert set(index.folder.glob("version-*.*")) == kept


def test_a_pool_that_shrinks_to_half_of_what_is_large_keeps_no_departures_and_may_grow_again(tmp_path):
    def departures():
        return index.catalog.database.rows("SELECT count(*) FROM departures")[0][0]

    with large(tmp_path, range(8)) as index, make_index(tmp_path / "small", range(9), exact_limit=100) as other:
        index.search(PROMPTS)
        for seed in range(3, 8):
            index.remove(card(seed).name)
        assert departures() == 5 * 4
        index.search(PROMPTS)  # three are left, of a limit of five: it may soon be large again
        assert departures() == 5 * 4
        index.remove(card(2).name)
        index.search(PROMPTS)
        assert departures() == 0
        assert not list(index.folder.glob("version-*.*"))
        index.remove(card(1).name)
        assert departures() == 0
        for seed in range(1, 9):
            enter(index.catalog, seed)
        assert len(index._large.view()) == 9
        found, expected = index.search(PROMPTS, 9), other.search(PROMPTS, 9)
        np.testing.assert_allclose(found.scores, expected.scores, atol=1e-3)
        index.remove(card(1).name)
        assert departures() == 4


def test_an_error_of_a_filter_of_the_users_own_is_the_users_to_see(tmp_path, monkeypatch):
    monkeypatch.setattr(allowed, "_CARDS", 4)
    asked = {"k": 20, "where": lambda found: found.extra["colour"] == "red"}
    with large(tmp_path, range(20)) as one, make_index(tmp_path / "small", range(20), exact_limit=1000) as other:
        for index in (one, other):
            enter(index.catalog, 20, extra={"colour": "red"})
            for scoring in ("hybrid", "mean"):
                with pytest.raises(KeyError, match="colour"):
                    index.search(PROMPTS, scoring=scoring, **asked)


@pytest.mark.parametrize("scoring", ["hybrid", "mean"])
def test_keys_of_a_filter_may_each_be_known_to_other_cards_of_a_large_pool(tmp_path, monkeypatch, scoring):
    monkeypatch.setattr(allowed, "_CARDS", 4)
    with large(tmp_path, range(12)) as one, make_index(tmp_path / "small", range(12), exact_limit=1000) as other:
        for index in (one, other):
            enter(index.catalog, 12, extra={"colour": "red"})
            for seed in range(13, 23):
                enter(index.catalog, seed)
            enter(index.catalog, 23, extra={"size": "big"})
        for where, names in (
            ({"colour": "red", "size": "big"}, ()),
            ({"colour": "red"}, ("a00012",)),
            ({"size": ["big", "small"]}, ("a00023",)),
        ):
            for index in (one, other):
                assert index.search(PROMPTS, 5, where=where, scoring=scoring).names == names
        for index in (one, other):
            with pytest.raises(LookupError, match=r"where has \['weight'\], which no card has"):
                index.search(PROMPTS, 5, where={"colour": "red", "weight": 3}, scoring=scoring)


@pytest.mark.parametrize("scoring", ["hybrid", "mean"])
def test_an_adapter_that_is_excluded_is_not_found_if_it_is_updated_while_the_prompts_are_embedded(tmp_path, scoring):
    with large(tmp_path) as index:
        name, prompt = card(3).name, card(3).examples[0]
        assert index.search([prompt], 1, scoring=scoring).names == (name,)

        def updating(texts):
            index.catalog.replace(
                replace(card(3), fingerprint=f"after {index.catalog.generation}"),
                f"pool/{name}",
                features(EMBEDDER, card(3).examples, index.catalog.settings),
            )
            return EMBEDDER(texts)

        index._embedder = CallableEmbedder(updating, EMBEDDER.name, EMBEDDER.revision)
        found = index.search([prompt], 29, exclude=[[name]], scoring=scoring)
        assert len(found.names) == 29
        assert name not in found.names


def test_an_adapter_whose_examples_are_lost_leaves_the_others_their_names(tmp_path):
    with large(tmp_path) as index:
        index.catalog.database.execute(
            "DELETE FROM examples WHERE adapter = (SELECT id FROM adapters WHERE name = ?)", card(3).name
        )
        for scoring in ("hybrid", "discriminant", "mean"):
            for seed in (2, 4, 20, 29):
                assert index.search([card(seed).examples[0]], 1, scoring=scoring).names == (card(seed).name,)
        assert len(index.search(PROMPTS, 30).names) == 29
        version = index._large.view().version
        assert len(version.ids) == len(version.sizes) == 29
        for seed in (40, 41):  # and where the next version takes over what stays of this one
            enter(index.catalog, seed)
        make_version(index.catalog.database, index.folder, version)
        for seed in (2, 20, 41):
            assert index.search([card(seed).examples[0]], 1).names == (card(seed).name,)
        lost = [problem for problem in index.verify().problems if problem.kind == "embeddings"]
        assert [(problem.adapter, problem.what) for problem in lost] == [("a00003", "0 embeddings for 0 examples")]


@pytest.mark.parametrize("update", [False, True])
def test_an_adapter_that_goes_after_its_examples_were_lost_is_not_waited_for(tmp_path, monkeypatch, update):
    with large(tmp_path) as index:
        name, prompt = card(3).name, card(3).examples[0]
        index._large.view()  # a version that has it
        index.catalog.database.execute("DELETE FROM examples WHERE adapter = 4")
        if update:
            index.catalog.replace(card(3), f"pool/{name}", features(EMBEDDER, card(3).examples, index.catalog.settings))
        else:
            index.remove(name)
        taken, take = [], CardShelf.take

        def counting(self, ids):
            taken.append(ids)
            assert len(taken) < 5, "it searches for ever"
            return take(self, ids)

        monkeypatch.setattr(CardShelf, "take", counting)
        found = index.search([prompt], 30).names
        assert len(found) == len(set(found)) == len(index) == 29 + update
        assert (index.search([prompt], 1).names == (name,)) == update


def test_adapters_without_examples_may_fill_a_whole_block_of_a_large_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger, "_BLOCK", 4)
    with large(tmp_path) as index:
        index.catalog.database.execute("DELETE FROM examples WHERE adapter BETWEEN 5 AND 8")
        assert index.search([card(20).examples[0]], 1).names == (card(20).name,)
        assert len(index._large.view()) == 26
