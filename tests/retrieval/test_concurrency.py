"""Readers in processes of their own while another one writes: what they see is always one state of the index."""

from __future__ import annotations

import multiprocessing
from contextlib import closing

import pytest

from loracompose import AdapterIndex
from loracompose.benchmarks import victim
from loracompose.benchmarks.material import word_encoder, write_adapter
from loracompose.retrieval import snapshot
from loracompose.retrieval.building import reembed
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.embedding import CallableEmbedder
from tests.retrieval.material import PROMPTS, bag_of_words

ROUNDS = 6
PATIENCE = 300.0  # seconds
BASE, PAIR = ("a", "b", "c"), ("x", "y")


def read(home, ready, stop, answer):
    """Search and list until told to stop; answer with every state that was seen, or with what went wrong."""
    seen = set()
    try:
        with AdapterIndex.open(home, embedder=word_encoder()) as index:
            while True:
                found = index.search(["x version 0 example 1"], k=99)
                assert bool((found.weights.sum(-1) - 1).abs().max() < 1e-5)
                seen.add(found.names)
                seen.add(tuple(card.name for card in index.cards))
                if ready is not None:
                    ready.release()
                    ready = None
                if stop.is_set():
                    break
        answer.send(seen)
    except BaseException as error:
        answer.send(repr(error))
        raise


def write(home, pool, answer):
    """Add and remove the pair again and again, compact, and save a snapshot in between."""
    try:
        with AdapterIndex.open(home, embedder=word_encoder()) as index:
            for number in range(ROUNDS):
                for name in PAIR:
                    index.add(pool / name)
                if number % 3 == 1:
                    index.snapshot(home.with_name(f"saved{number}"))
                for name in PAIR:
                    index.remove(name)
                if number % 3 == 2:
                    index.compact()
        answer.send("done")
    except BaseException as error:
        answer.send(repr(error))
        raise


def answer_of(pipe):
    """What a process answers, which it must do in time: one that was killed never does."""
    assert pipe[0].poll(PATIENCE)
    return pipe[0].recv()


def test_processes_that_read_while_another_writes_see_states_that_were(tmp_path):
    for name in BASE:
        write_adapter(tmp_path / "base" / name, 0)
    for name in PAIR:
        write_adapter(tmp_path / "late" / name, 0)
    home = tmp_path / "index"
    AdapterIndex.build(tmp_path / "base", home, embedder=word_encoder(), copy=True).close()
    context = multiprocessing.get_context("forkserver")  # which imports the library once, for all of them
    context.set_forkserver_preload(["__main__", *victim.USED])
    ready, stop = context.Semaphore(0), context.Event()
    pipes = [context.Pipe(duplex=False) for _ in range(3)]
    readers = [context.Process(target=read, args=(home, ready, stop, pipe[1]), daemon=True) for pipe in pipes[:2]]
    writer = context.Process(target=write, args=(home, tmp_path / "late", pipes[2][1]), daemon=True)
    for reader in readers:
        reader.start()
    for _ in readers:
        assert ready.acquire(timeout=PATIENCE)
    writer.start()
    assert answer_of(pipes[2]) == "done"
    stop.set()
    seen = [answer_of(pipe) for pipe in pipes[:2]]
    for process in (*readers, writer):
        process.join()
    states = {BASE, (*BASE, "x"), (*BASE, "x", "y"), (*BASE, "y")}
    for states_seen in seen:
        assert states_seen <= states
        assert BASE in states_seen
    for number in (1, 4):
        with AdapterIndex.open(tmp_path / f"saved{number}", embedder=word_encoder()) as saved:
            assert tuple(card.name for card in saved.cards) == (*BASE, *PAIR)
            assert saved.verify().ok
    with AdapterIndex.open(home, embedder=word_encoder()) as index:
        assert tuple(card.name for card in index.cards) == BASE
        assert index.verify().ok


def test_prompts_of_one_encoder_are_never_compared_with_examples_of_another(index, monkeypatch):
    """Somebody embeds everything anew after the encoder was checked and before the examples are read."""
    other = CallableEmbedder(lambda texts: bag_of_words(texts)[:, ::-1], "turned", "1")
    taken = snapshot.take_snapshot

    def late(*given):
        with closing(Catalog.open(index.catalog.path)) as catalog:
            reembed(catalog, other)
        return taken(*given)

    index.remove("mood")  # so that the next search takes another snapshot
    monkeypatch.setattr(snapshot, "take_snapshot", late)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"embedded with 'turned' .* this embedder is 'bag-of-words'"):
            index.search(PROMPTS)
        monkeypatch.undo()
