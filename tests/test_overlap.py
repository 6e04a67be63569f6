"""One ahead: in order, at most one value early, failures where they were due, and no thread left behind."""

from __future__ import annotations

import threading
from contextlib import closing

import pytest

from loracompose.overlap import one_ahead

PATIENCE = 20.0


def ours() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("one-ahead")]


def test_values_come_in_order_made_in_one_other_thread():
    threads = set()

    def make(i):
        threads.add(threading.current_thread())
        return i * i

    assert list(one_ahead(make, range(5))) == [0, 1, 4, 9, 16]
    assert list(one_ahead(make, [])) == []
    assert len({thread.name for thread in threads}) == 1
    assert threading.main_thread() not in threads
    assert not ours()


def test_the_next_value_is_made_while_the_present_one_is_used():
    made = [threading.Event() for _ in range(3)]

    def make(i):
        made[i].set()
        return i

    with closing(one_ahead(make, range(3))) as values:
        assert next(values) == 0
        assert made[1].wait(PATIENCE)  # although nobody has asked for it
        assert not made[2].is_set()


def test_an_exception_comes_where_its_value_was_due_and_ends_the_work():
    begun = []

    def make(i):
        begun.append(i)
        if i == 2:
            raise ZeroDivisionError
        return i

    values = one_ahead(make, range(9))
    assert [next(values), next(values)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(values)
    assert begun == [0, 1, 2]
    assert not ours()


def test_stopping_early_starts_no_other_call_and_leaves_no_thread():
    begun, go = [], threading.Event()

    def make(i):
        begun.append(i)
        if i == 1:
            assert go.wait(PATIENCE)
        return i

    with closing(one_ahead(make, range(9))) as values:
        assert next(values) == 0
        go.set()
    assert begun in ([0], [0, 1])
    assert not ours()
