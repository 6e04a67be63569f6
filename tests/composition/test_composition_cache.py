"""The composition cache: bounded by what it really holds, one composition for many threads, failures forgotten."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import loracompose.composition.cache as module
from loracompose.composition.cache import CompositionCache, held_bytes
from tests.flights import announced_waits

THREADS = 6
PATIENCE = 20.0  # seconds until a thread that never comes fails a test


def composed(value: float = 1.0, rank: int = 2):
    return {"m": (torch.full((rank, 4), value), torch.full((4, rank), value))}


SIZE = 2 * 4 * 4 * 2  # bytes of one


def test_a_set_is_composed_once_and_then_handed_out():
    cache = CompositionCache()
    first, again = cache.recall("a", composed)
    second, recalled = cache.recall("a", lambda: pytest.fail("composed twice"))
    assert (again, recalled) == (False, True)
    assert second is first
    stats = cache.stats
    assert (stats.hits, stats.misses, stats.evictions, stats.entries, stats.bytes) == (1, 1, 0, 1, SIZE)


def test_the_least_recently_used_set_goes_first():
    cache = CompositionCache(2 * SIZE)
    for key in "abac":  # a was used after b, so c pushes b out
        cache.recall(key, composed)
    assert (cache.stats.evictions, cache.stats.entries, cache.stats.bytes) == (1, 2, 2 * SIZE)
    assert [cache.recall(key, composed)[1] for key in "acb"] == [True, True, False]


@pytest.mark.parametrize("room", [0, SIZE - 1])
def test_a_set_without_room_is_handed_out_and_not_kept(room):
    cache = CompositionCache(room)
    assert [cache.recall("a", composed)[1] for _ in range(2)] == [False, False]
    assert (cache.stats.bytes, cache.stats.entries, cache.stats.evictions) == (0, 0, 0)
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        CompositionCache(-1)


def test_a_view_counts_as_all_that_it_keeps_alive_and_shared_memory_once():
    whole = torch.zeros(10, 4)
    assert held_bytes({"m": (whole[:2], whole[2:4].mT), "n": (whole[4:], torch.zeros(4, 6))}) == 10 * 4 * 4 + 4 * 6 * 4


def test_a_failure_is_raised_and_not_remembered():
    cache = CompositionCache()
    with pytest.raises(ZeroDivisionError):
        cache.recall("a", lambda: 1 // 0)
    assert cache.recall("a", composed)[1] is False
    assert cache.stats.misses == 2


def test_clearing_forgets_everything():
    cache = CompositionCache()
    cache.recall("a", composed)
    cache.clear()
    assert (cache.stats.entries, cache.stats.bytes, cache.recall("a", composed)[1]) == (0, 0, False)


@pytest.fixture
def waiting(monkeypatch):
    """Released once for each thread that waits for another's composition."""
    return announced_waits(module, monkeypatch)


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("room", [0, SIZE])
def test_threads_that_ask_together_share_one_composition_or_its_failure(waiting, room, fails):
    cache, made = CompositionCache(room), []

    def compose():
        for _ in range(THREADS - 1):
            assert waiting.acquire(timeout=PATIENCE), "another thread composed by itself"
        made.append(1)
        if fails:
            raise ZeroDivisionError
        return composed()

    with ThreadPoolExecutor(THREADS) as threads:
        answers = [threads.submit(cache.recall, "a", compose) for _ in range(THREADS)]
    assert len(made) == 1
    if fails:
        assert all(isinstance(answer.exception(), ZeroDivisionError) for answer in answers)
        assert cache.recall("a", composed)[1] is False
    else:
        assert len({id(answer.result()[0]) for answer in answers}) == 1
        assert sorted(answer.result()[1] for answer in answers) == [False] + [True] * (THREADS - 1)
    assert cache.stats.bytes <= room


def test_under_many_threads_and_little_room_everyone_gets_what_was_asked_for():
    cache = CompositionCache(2 * SIZE)

    def ask(i):
        got, _ = cache.recall(i % 5, lambda: composed(float(i % 5)))
        return bool((got["m"][0] == i % 5).all())

    with ThreadPoolExecutor(THREADS) as threads:
        assert all(threads.map(ask, range(300)))
    stats = cache.stats
    assert stats.bytes == stats.entries * SIZE <= 2 * SIZE
    assert stats.hits + stats.misses == 300
    assert stats.misses == stats.evictions + stats.entries


def test_what_cannot_be_counted_is_a_failure_like_any_other():
    cache = CompositionCache(max_bytes=1000)
    for _ in range(2):  # the second call would wait for ever if the first were remembered
        with pytest.raises(AttributeError):
            cache.recall("a", lambda: {"q": ("no", "tensors")})
