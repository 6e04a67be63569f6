"""A large pool that stays open: its current view, brought up to date by what came and went, re-whitened behind it."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from pathlib import Path

from loracompose.retrieval.database import Database
from loracompose.retrieval.scale import ledger
from loracompose.retrieval.scale.gathering import CancelledError
from loracompose.retrieval.scale.ledger import Position, Record
from loracompose.retrieval.scale.making import make_version, sweep_abandoned
from loracompose.retrieval.scale.version import Version, damage, load_version
from loracompose.retrieval.scale.view import View


@dataclass(frozen=True)
class Bound:
    """How far the pool may drift from its version before the next one is made.

    `share` of the version's adapters that came or went, at least `least` and at most `most` of them; `error`, the
    relative error of squared distances, `Drift.remainder`.
    """

    share: float = 0.05
    least: int = 256
    most: int = 16384
    error: float = 0.05

    def exceeded(self, view: View) -> bool:
        """Whether a view has drifted too far."""
        allowed = min(max(int(self.share * len(view.gone)), self.least), self.most)
        return view.changed > allowed or any(drift.errs(self.error) for drift in view.drifts)


DEFAULT_BOUND = Bound()


class LargePool:
    """The large pool of an index folder, by connections of its own to the catalog; threads share it.

    Args:
        catalog: the catalog's file.
        home: the index folder.
        bound: when to make the next version.
    """

    def __init__(self, catalog: Path, home: Path, bound: Bound = DEFAULT_BOUND) -> None:
        self._path, self._home, self._bound = catalog, home, bound
        self._database = Database.open(catalog)
        ledger.prepare(self._database)
        if self._database.writable:
            sweep_abandoned(self._database, home)
        self._view: View | None = None
        self._next: Version | None = None
        self._refreshing = threading.Lock()
        self._worker: threading.Thread | None = None
        self._failure: Exception | None = None
        self._closed = threading.Event()

    def close(self) -> None:
        """Stop what runs behind it, and close; closing twice is fine."""
        self._closed.set()
        worker = self._worker  # which forgets itself at its end
        if worker is not None:
            worker.join()
        self._database.close()

    def current(self) -> View:
        """The view of the catalog's present generation.

        Raises:
            PermissionError: there is no version yet and the catalog cannot be written.
            RuntimeError: making a version behind the searches failed; said once.
        """
        view = self.unchanged()
        if view is not None:
            return view
        with self._refreshing:
            view = self._refreshed()
            self._view, self._next = view, None
        if self._worker is None and self._bound.exceeded(view) and self._database.writable:
            self._start()
        return view

    def unchanged(self) -> View | None:
        """The view that there is, if nothing has changed since; one question to the catalog.

        Raises:
            RuntimeError: as `current`.
        """
        self._raise_failure()
        generation, record = ledger.generation_and_record(self._database)
        view = self._view
        if view is None or record is None or (view.generation, view.version.token) != (generation, record.token):
            return None
        return view

    def wait(self) -> None:
        """Until nothing runs behind the searches."""
        worker = self._worker
        if worker is not None:
            worker.join()
        self._raise_failure()

    def _refreshed(self) -> View:
        while True:
            _, record = ledger.generation_and_record(self._database)
            version = None if record is None else self._loaded(record)
            view = None if version is None else self._caught_up(version)
            if view is not None:
                return view
            _, again = ledger.generation_and_record(self._database)
            if again == record:  # otherwise another process has just put another one in its place
                make_version(self._database, self._home)

    def _loaded(self, record: Record) -> Version | None:
        """The version of this record; None where its files are not sound or everything was embedded anew."""
        if self._view is not None and record.token == self._view.version.token:
            return self._view.version if record.epoch == ledger.settings(self._database).epoch else None
        if self._next is not None and self._next.token == record.token:
            return self._next
        settings = ledger.settings(self._database)
        try:
            if record.epoch != settings.epoch or damage(self._home, record, thorough=False):
                return None
            return load_version(self._home, record)
        except FileNotFoundError:
            return None

    def _caught_up(self, version: Version) -> View | None:
        """The present view of a version; None if it is not current any more, or what went since cannot be read."""
        with self._database.reading():
            generation, record = ledger.generation_and_record(self._database)
            settings = ledger.settings(self._database)
            if record is None or (record.token, settings.epoch) != (version.token, version.epoch):
                return None
            old = self._view
            view = old if old is not None and old.version is version else View.of(version, generation, settings)
            try:
                went = ledger.departures(self._database, view.position.departure, settings.width)
            except ValueError:  # it went because it was damaged: the statistics must be summed up anew
                return None
            blocks = ledger.profiles(self._database, view.position.adapter, settings.width)
            came = [profile for block in blocks for profile in block]
            position = ledger.position(self._database)
        # What was seen stays seen, also where the rows that said so are gone.
        position = Position(*map(max, position, view.position))
        return view.moved(generation, position, settings, came, went)

    def _start(self) -> None:
        self._worker = threading.Thread(target=self._rewhiten, name="re-whitening", daemon=True)
        self._worker.start()

    def _rewhiten(self) -> None:
        try:
            database = Database.open(self._path)
            try:
                previous = self._view.version if self._view is not None else None
                record = make_version(database, self._home, previous, self._closed.is_set)
                self._next = load_version(self._home, record)
            finally:
                database.close()
        except CancelledError:
            pass
        except Exception as error:
            self._failure = error
        finally:
            self._worker = None

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise RuntimeError(
                f"making the next version of the vectors in {self._home} failed ({failure}); searches go on with the "
                "one before, and it is tried again"
            ) from failure
