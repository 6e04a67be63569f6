"""The next value made in a thread while the present one is used."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")


def one_ahead(make: Callable[[Item], Value], items: Iterable[Item]) -> Generator[Value]:
    """`make` of each item in order, the next one running in one background thread while the caller has the present.

    The caller has one value and one more is being made. An exception of `make` is raised where its value was due, after
    the values before it, and no other call is started. Whoever stops early closes the generator
    (`contextlib.closing`): that waits for the call that is running and leaves no thread behind.

    Args:
        make: must not depend on what the caller does with earlier values.
        items: read in the caller's thread, one ahead.
    """
    background = ThreadPoolExecutor(1, thread_name_prefix="one-ahead")
    try:
        ahead: Future[Value] | None = None
        for item in items:
            present = None if ahead is None else (ahead.result(),)
            ahead = background.submit(make, item)
            if present is not None:
                yield present[0]
        if ahead is not None:
            yield ahead.result()
    finally:
        background.shutdown(wait=True, cancel_futures=True)
