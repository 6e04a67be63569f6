"""Which way an index is searched: a snapshot that holds all of it in memory, or a large pool behind a version.

Nothing heavy is imported before it is needed.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.embedding import Embedder, check_encoder, features
from loracompose.retrieval.filtering import Exclude, Where, excluded_rows
from loracompose.retrieval.placement import VECTORS_FILE
from loracompose.retrieval.scoring import Scoring, check_scoring
from loracompose.retrieval.upkeep import forget_derived

if TYPE_CHECKING:
    from loracompose.retrieval.explanation import Explanation
    from loracompose.retrieval.result import Retrieval
    from loracompose.retrieval.scale.pool import LargePool
    from loracompose.retrieval.scale.shelf import CardShelf
    from loracompose.retrieval.scale.view import View


def is_large(catalog: Catalog) -> bool:
    """Whether there are more adapters than are compared exactly."""
    limit = catalog.settings.exact_limit
    return bool(catalog.database.rows("SELECT 1 FROM adapters LIMIT 1 OFFSET ?", limit))  # counting all takes longer


def derive(catalog: Catalog, home: Path) -> None:
    """Derive from the catalog what searches read, where that is missing, stale or damaged."""
    if is_large(catalog):
        from loracompose.retrieval.scale.pool import LargePool

        pool = LargePool(catalog.path, home)
        try:
            pool.current()
        finally:
            pool.close()
    else:
        from loracompose.retrieval.snapshot import take_snapshot

        take_snapshot(catalog, home / VECTORS_FILE)


def broken_files(catalog: Catalog, home: Path) -> list[str]:
    """What is wrong with the files that searches of a large pool read; every byte is hashed."""
    if not catalog.database.rows("SELECT 1 FROM sqlite_master WHERE name = 'version'"):
        return []
    from loracompose.retrieval.scale import ledger, version

    _, record = ledger.generation_and_record(catalog.database)
    if record is None or record.epoch != catalog.settings.epoch:  # the next search makes one
        return []
    return version.damage(home, record, thorough=True)


class SizedPool:
    """Searches of the pool of one index while it is large; `view` is None while it is not."""

    def __init__(self, catalog: Catalog, home: Path) -> None:
        self._catalog, self._home = catalog, home
        self._pool: LargePool | None = None
        self._small = self._big = -1  # the last generation that was found to be so
        self._opening = threading.Lock()
        self._cards: CardShelf | None = None

    def close(self) -> None:
        """Stop what runs behind the searches; closing twice is fine."""
        if self._pool is not None:
            self._pool.close()

    def wait(self) -> None:
        """Until nothing runs behind the searches."""
        if self._pool is not None:
            self._pool.wait()

    def view(self, embedder: Embedder | None = None) -> View | None:
        """The present view of a large pool, None of a small one.

        Raises:
            ValueError: the index was embedded with another encoder than the one given.
        """
        view = None if self._pool is None else self._pool.unchanged()
        if view is None:
            if not self._is_large():  # asked first: of a pool that was emptied no version can be made
                return None
            view = self._opened().current()
        if embedder is not None:
            check_encoder(view.settings, embedder)
        return view if len(view) > view.settings.exact_limit else None

    def _opened(self) -> LargePool:
        with self._opening:
            if self._pool is None:
                from loracompose.retrieval.scale.pool import LargePool

                self._pool = LargePool(self._catalog.path, self._home)
            return self._pool

    def search(
        self,
        embedder: Embedder,
        prompts: Sequence[str],
        k: int,
        exclude: Exclude | None,
        where: Where | None,
        scoring: Scoring | None,
    ) -> Retrieval | None:
        """As `AdapterIndex.search`, None where the pool is small."""
        view = self.view(embedder)
        if view is None:
            return None
        from loracompose.retrieval.scale.searching import Request, search_view
        from loracompose.retrieval.scale.shelf import MovedError

        given = features(embedder, prompts, view.settings)
        while view is not None:
            excluded = self._excluded(view, exclude, len(prompts))
            if excluded is not None:
                way = check_scoring(view.settings.scoring) if scoring is None else scoring
                try:
                    return search_view(view, self._shelf(), prompts, given, Request(k, way, where, excluded))
                except MovedError:
                    self._doubt(view)
            view = self.view(embedder)
        return None

    def _doubt(self, view: View) -> None:
        """Let the version be made anew if it has an adapter that is gone unrecorded: its examples were lost before."""
        if self._catalog.generation == view.generation:
            forget_derived(self._catalog)

    def _excluded(self, view: View, exclude: Exclude | None, batch: int) -> list[set[int]] | None:
        """As `excluded_rows`, of this view; None if names may stand for other row ids by now, as after an update."""
        with self._catalog.reading():
            rows = excluded_rows(exclude, batch, _Ids(self._catalog))
            return rows if exclude is None or self._catalog.generation == view.generation else None

    def explain(self, embedder: Embedder, prompt: str, k: int) -> Explanation | None:
        """As `AdapterIndex.explain`, None where the pool is small."""
        view = self.view(embedder)
        if view is None:
            return None
        from loracompose.retrieval.scale.explaining import explain_view

        return explain_view(view, self._catalog, features(embedder, [prompt], view.settings), prompt, k)

    def _shelf(self) -> CardShelf:
        from loracompose.retrieval.scale.shelf import CardShelf

        if self._cards is None:
            self._cards = CardShelf(self._catalog)
        return self._cards

    def _is_large(self) -> bool:
        generation = self._catalog.generation
        if generation not in (self._small, self._big):
            if is_large(self._catalog):
                self._big = generation
            else:
                self._small = generation
                self._give_up()
        return generation != self._small

    def _give_up(self) -> None:
        """Forget the version of a pool that has shrunk to half of what is large: it may not soon be so again."""
        database = self._catalog.database
        if not database.rows("SELECT 1 FROM sqlite_master WHERE name = 'departing'") or not database.writable:
            return
        half = self._catalog.settings.exact_limit // 2
        if not database.rows("SELECT 1 FROM adapters LIMIT 1 OFFSET ?", half):
            from loracompose.retrieval.scale.making import give_up

            give_up(database, self._home)


class _Ids(Mapping[str, int]):
    """Row ids by name, read where they are asked for."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def __getitem__(self, name: str) -> int:
        found = self._catalog.database.rows("SELECT id FROM adapters WHERE name = ?", name)
        if not found:
            raise KeyError(name)
        return int(found[0][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._catalog.names())

    def __len__(self) -> int:
        return len(self._catalog)
