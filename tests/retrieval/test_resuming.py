from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from loracompose import AdapterIndex
from loracompose.retrieval import placement
from loracompose.retrieval.embedding import INSTRUCTION, CallableEmbedder
from loracompose.retrieval.locking import locked
from loracompose.retrieval.resuming import EmbeddedSoFar
from loracompose.retrieval.tables import Settings
from tests.retrieval.material import TASKS, bag_of_words, contents, hidden, make_adapter


class Interruptible:
    """A bag of words that counts the texts it embeds, and fails at those with a certain word."""

    def __init__(self, stop=None):
        self.stop = stop
        self.texts = []

    def __call__(self, texts):
        if self.stop and any(self.stop in text for text in texts):
            raise KeyboardInterrupt
        self.texts += texts
        return bag_of_words(texts)

    @property
    def adapters(self):
        """The adapters whose examples were embedded."""
        return {name for name, examples in TASKS.items() if set(examples) & set(self.texts)}


def interrupted(pool, home, stop="seven", revision="1", **options):
    with pytest.raises(KeyboardInterrupt):
        AdapterIndex.build(
            pool, home, embedder=CallableEmbedder(Interruptible(stop), "words", revision), copy=True, **options
        )


def test_an_interrupted_build_goes_on_where_it_stopped_and_ends_as_one_in_one_go(pool, tmp_path, capsys):
    interrupted(pool, tmp_path / "index")
    assert not (tmp_path / "index").exists()
    rest = Interruptible()
    encoder = CallableEmbedder(rest, "words", "1")
    with (
        AdapterIndex.build(pool, tmp_path / "index", embedder=encoder, copy=True, progress=True) as index,
        AdapterIndex.build(pool, tmp_path / "once", embedder=CallableEmbedder(bag_of_words, "words", "1")) as once,
    ):
        assert rest.adapters == {"sums"}
        assert index.report.resumed == 3
        assert once.report.resumed == 0
        assert contents(index) == contents(once)
        assert index.cards == once.cards
        assert index.catalog.generation == once.catalog.generation
        assert index.catalog.tombstones() == []
        assert index.verify().ok
    assert "embedding" in capsys.readouterr().out
    assert hidden(tmp_path) == []


def test_only_what_has_not_changed_since_is_taken_over(pool, tmp_path):
    interrupted(pool, tmp_path / "index")
    make_adapter(pool / "mood", ["other examples"], seed=2)  # other examples: embedded again
    make_adapter(pool / "sql", TASKS["sql"], seed=50)  # other weights: the same examples
    make_adapter(pool / "albanian", ["translate into albanian"], seed=51)
    rest = Interruptible()
    with AdapterIndex.build(pool, tmp_path / "index", embedder=CallableEmbedder(rest, "words", "1")) as index:
        assert index.report.resumed == 2
        assert set(rest.texts) >= {"other examples", "translate into albanian"}
        assert rest.adapters == {"sums"}
        assert [card.name for card in index.cards] == ["albanian", "french", "mood", "sql", "sums"]
        assert index.card("mood").examples == ("other examples",)
        assert index.verify().ok


@pytest.mark.parametrize("other", [{"revision": "2"}, {"name": "others"}, {"instruction": "Now: "}])
def test_embeddings_of_another_encoder_or_instruction_are_not_taken_over(pool, tmp_path, other):
    interrupted(pool, tmp_path / "index")
    rest = Interruptible()
    encoder = CallableEmbedder(rest, other.get("name", "words"), other.get("revision", "1"))
    instruction = other.get("instruction", INSTRUCTION)
    with AdapterIndex.build(pool, tmp_path / "index", embedder=encoder, instruction=instruction) as index:
        assert rest.adapters == set(TASKS)
        assert index.report.resumed == 0
        assert index.verify().ok


def test_a_build_can_be_interrupted_as_often_as_it_likes(pool, tmp_path):
    for stop in ("dog", "review", "query", "seven"):
        interrupted(pool, tmp_path / "index", stop)
    rest = Interruptible()
    with AdapterIndex.build(pool, tmp_path / "index", embedder=CallableEmbedder(rest, "words", "1")) as index:
        assert rest.adapters == {"sums"}
        assert len(index) == 4


def test_what_a_killed_build_left_is_cleared_by_the_next(pool, tmp_path, embedder):
    for word in ("building", "unfinished"):
        (tmp_path / f".index.{word}").mkdir()
    (tmp_path / ".index.building" / "catalog.sqlite").write_bytes(b"half")
    (tmp_path / ".index.building" / "adapters" / "0123456789ab").mkdir(parents=True)
    (tmp_path / ".index.unfinished" / "embedded.sqlite").write_bytes(b"")
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=True) as index:
        assert index.verify().ok
    assert hidden(tmp_path) == []


def test_a_damaged_file_of_an_interrupted_build_is_named(pool, tmp_path, embedder):
    (tmp_path / ".index.unfinished").mkdir()
    (tmp_path / ".index.unfinished" / "embedded.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match=r"embedded\.sqlite of an interrupted build is damaged .*delete it"):
        AdapterIndex.build(pool, tmp_path / "index", embedder=embedder)
    assert not (tmp_path / "index").exists()


def test_an_index_is_built_by_one_at_a_time(pool, tmp_path, embedder):
    refused = []

    def meanwhile(texts):
        if any("seven" in text for text in texts):
            with pytest.raises(BlockingIOError, match="is being made by another process") as told:
                AdapterIndex.build(pool, tmp_path / "index", embedder=embedder)
            refused.append(told)
        return bag_of_words(texts)

    with AdapterIndex.build(pool, tmp_path / "index", embedder=CallableEmbedder(meanwhile, "words")) as index:
        assert len(refused) == 1
        assert index.verify().ok
    assert hidden(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="folders are not locked there")
def test_a_lock_is_that_of_the_folder_that_is_there_when_it_is_got(tmp_path, monkeypatch):
    """Whoever waits for a folder that is deleted and made again meanwhile gets the new one."""
    import fcntl

    home, lock = tmp_path / "home", fcntl.flock

    def replaced_meanwhile(descriptor, how):
        monkeypatch.setattr(fcntl, "flock", lock)
        home.rename(tmp_path / "away")
        home.mkdir()
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", replaced_meanwhile)
    with locked(home, create=True), pytest.raises(BlockingIOError), locked(home, wait=False):
        raise AssertionError("held twice")
    with pytest.raises(FileNotFoundError), locked(tmp_path / "none"):
        raise AssertionError("there is none")


@pytest.fixture
def two(tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    return tmp_path / "one", tmp_path / "other"


def test_an_exchange_gives_each_folder_the_place_of_the_other_also_in_several_steps(two, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "_exchanged_at_once", lambda *folders: False)
    placement.exchange(*two)
    assert [path.name for folder in two for path in folder.iterdir()] == ["other", "one"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "other"]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_an_exchange_is_one_step_where_the_system_can(two, monkeypatch):
    def refused(path, target):
        raise AssertionError("renamed")

    monkeypatch.setattr(Path, "rename", refused)
    placement.exchange(*two)
    assert [path.name for folder in two for path in folder.iterdir()] == ["other", "one"]


def test_an_exchange_that_fails_halfway_puts_the_folder_back(two, tmp_path, monkeypatch):
    monkeypatch.setattr(placement, "_exchanged_at_once", lambda *folders: False)
    rename = Path.rename

    def failing(path, target):
        if path.name == "one":
            raise OSError("no room")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="no room"):
        placement.exchange(*two)
    assert [path.name for folder in two for path in folder.iterdir()] == ["one", "other"]


def test_where_an_interrupted_replacement_has_put_the_index_is_told(index, tmp_path, monkeypatch):
    index.close()
    (tmp_path / "index").rename(tmp_path / ".index.old-0123abcd")
    with pytest.raises(FileNotFoundError, match=r"the index is in .*\.index\.old-0123abcd: rename it back"):
        AdapterIndex.open(tmp_path / "index")


def test_embeddings_so_far_come_back_as_they_went_in(tmp_path):
    settings = Settings("e", "1", 4, "i: ")
    rows = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    with EmbeddedSoFar(tmp_path, settings) as done:
        done.put(("a", "b"), rows)
    with EmbeddedSoFar(tmp_path, settings) as done:
        assert np.array_equal(done.get(("a", "b")), rows)
        assert ("b", "a") not in done
        with pytest.raises(LookupError, match="has no embeddings of"):
            done.get(("b", "a"))
    (tmp_path / "embedded.sqlite").unlink()
    with EmbeddedSoFar(tmp_path, settings):
        pass  # an interruption before the first embedding leaves nothing
    assert list(tmp_path.iterdir()) == []
