"""Making a version: one pass over what is new, one over the means; then it is current, in one step."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from loracompose.retrieval.database import Database
from loracompose.retrieval.scale import ledger
from loracompose.retrieval.scale.deriving import derive_files
from loracompose.retrieval.scale.gathering import CancelledError, gather
from loracompose.retrieval.scale.ledger import Record
from loracompose.retrieval.scale.version import PATTERNS, Version, recorded

LOCK_FILE = "version-lock"


def make_version(
    database: Database, home: Path, previous: Version | None = None, cancelled: Callable[[], bool] = lambda: False
) -> Record:
    """Make a version of the present generation, and make it current.

    Args:
        database: the catalog's file, by a connection of its own: it is read for minutes.
        home: the index folder.
        previous: the version to go on from; only if it is current still, for the departures since another one that
            its successor knew are forgotten.
        cancelled: asked now and then.

    Raises:
        CancelledError: it was cancelled, or everything was embedded anew meanwhile.
        PermissionError: the catalog cannot be written.
    """
    token = uuid.uuid4().hex[:12]
    ledger.prepare(database)
    _, before = ledger.generation_and_record(database)
    with _alone(home):
        ledger.prepare(database)  # again: who gave the pool up meanwhile has dropped the trigger
        _, current = ledger.generation_and_record(database)
        if current is not None and current != before:  # another process made one meanwhile
            return current
        if previous is not None and (current is None or current.token != previous.token):
            previous = None
        try:
            gathered, digests = gather(database, home, token, previous, cancelled)
            digests |= derive_files(home, token, gathered, cancelled)
            record = recorded(home, token, gathered.epoch, digests)
            if not ledger.install(database, record, gathered.position):
                raise CancelledError("everything was embedded anew")
        except BaseException:
            sweep(home, f"version-{token}.*")
            raise
        sweep(home, *PATTERNS, keep=token)
    return record


def sweep(home: Path, *patterns: str, keep: str | None = None) -> None:
    """Delete files of versions, but not those of one; who has them open can still read them."""
    for pattern in patterns:
        for path in home.glob(pattern):
            if keep is None or not path.name.startswith(f"version-{keep}."):
                path.unlink(missing_ok=True)


def sweep_abandoned(database: Database, home: Path) -> None:
    """Delete files of versions that are neither current nor being made: what a killed process has left."""
    with suppress(BlockingIOError), _alone(home, wait=False):
        _, record = ledger.generation_and_record(database)
        sweep(home, *PATTERNS, keep=None if record is None else record.token)


def give_up(database: Database, home: Path) -> None:
    """Forget the version of a pool that is not large any more, and keep no more of what goes.

    While one is being made nothing happens.
    """
    with suppress(BlockingIOError), _alone(home, wait=False):
        ledger.forget(database)
        sweep(home, *PATTERNS)


@contextmanager
def _alone(home: Path, *, wait: bool = True) -> Iterator[None]:
    """One version is made at a time, among all processes; on Windows, which has no such locks, within none.

    Raises:
        BlockingIOError: one is being made, and nobody waits.
    """
    if os.name == "nt":
        yield
        return
    import fcntl  # which only POSIX has

    with (home / LOCK_FILE).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
