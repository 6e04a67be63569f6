"""Locks on folders: they keep processes apart, leave no file behind, and the system takes them back from the dead."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, *, shared: bool = False, wait: bool = True, create: bool = False) -> Iterator[None]:
    """Hold the lock of the folder that is at this path.

    On Windows, where a folder cannot be opened, nothing is held: one process at a time must do what needs it.

    Args:
        folder: the folder; it may be renamed or deleted by its holder.
        shared: many may hold it at once, but not together with one that does not share.
        wait: wait for the others, otherwise raise.
        create: make the folder if it is not there.

    Raises:
        BlockingIOError: not `wait`, and another holds it.
        FileNotFoundError: not `create`, and there is no such folder.
    """
    if os.name == "nt":
        folder.mkdir(exist_ok=True) if create else folder.stat()
        yield
        return
    descriptor = _acquire(folder, shared=shared, wait=wait, create=create)
    try:
        yield
    finally:
        os.close(descriptor)  # which gives the lock back


def _acquire(folder: Path, *, shared: bool, wait: bool, create: bool) -> int:
    import fcntl  # which only POSIX has

    how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    while True:
        try:
            if create:
                folder.mkdir(exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            if not create or not folder.parent.is_dir():
                raise
            continue  # deleted in between by the one who held it
        try:
            fcntl.flock(descriptor, how)
            if _is_at(descriptor, folder):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # another folder took its place while this one was waited for


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    except FileNotFoundError:
        return False
