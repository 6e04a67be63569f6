"""The index of a pool of adapters: build, open, change, search, verify."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from loracompose.retrieval import building
from loracompose.retrieval.admission import admitted, discard_copy
from loracompose.retrieval.building import CATALOG_FILE, VECTORS_FILE, BuildReport
from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.embedding import (
    INSTRUCTION,
    Embedder,
    as_embedder,
    check_encoder,
    features,
    unit_vectors,
)
from loracompose.retrieval.explanation import Explanation, explain
from loracompose.retrieval.filtering import Exclude, Where, allowed_rows, check_request, excluded_rows
from loracompose.retrieval.result import Retrieval
from loracompose.retrieval.scoring import DEFAULT_SCORING, Scoring, check_scoring
from loracompose.retrieval.search import search_fits, search_means
from loracompose.retrieval.snapshot import Snapshot, take_snapshot
from loracompose.retrieval.verification import VerifyReport, verify


class AdapterIndex:
    """A pool of adapters that can be searched by prompt.

    Prompts and examples are embedded with and without an instruction. `scoring` says how they are compared:

    - "hybrid", the default: the discriminant and the words themselves (`lexicon.py`), weighed by how well they find
      the adapters of held-out examples; the score is the logarithm of p(adapter | prompt).
    - "discriminant": under the covariance of what varies within adapters (`discriminant.py`); likewise log p.
    - "mean": the cosine with the renormalised mean of the adapter's instructed examples (LoraRetriever,
      arXiv:2402.09997, except that the paper's code does not renormalise the mean).

    Weights are a softmax of the scores over the retrieved, at the temperature that fits the pool's own examples;
    LoraRetriever weighs uniformly.

    The catalog is the truth and changes in transactions; everything else is derived from it with the first search
    after a change. Threads may search while others add and remove; a search sees one generation. Other processes
    may use the same folder at the same time.

    Use `AdapterIndex.build` or `AdapterIndex.open`; close it, or use it in a `with` block.
    """

    def __init__(self, folder: Path, catalog: Catalog, embedder: Embedder, report: BuildReport | None = None) -> None:
        self.folder = folder
        self.catalog = catalog
        self.embedder = embedder
        self.report = report
        self._snapshot: Snapshot | None = None
        self._refreshing = threading.Lock()

    @classmethod
    def build(
        cls,
        source_folder: str | Path,
        index_folder: str | Path,
        *,
        embedder: Embedder | str | None = None,
        instruction: str = INSTRUCTION,
        scoring: Scoring = DEFAULT_SCORING,
        copy: bool = False,
        strict: bool = False,
        overwrite: bool = False,
        progress: bool = False,
    ) -> AdapterIndex:
        """Index every immediate subfolder that has an adapter_config.json.

        It is built in a temporary sibling of `index_folder` and renamed at the end: there is a whole index or none.
        What is left out stands in `index.report`.

        Args:
            source_folder: its subfolders are the adapters; their names are the adapters' names.
            index_folder: where the index goes.
            embedder: the encoder, by name or as an object; default is all-MiniLM-L6-v2.
            instruction: what is put before every example and every prompt, which are embedded without it, too.
            scoring: how searches compare unless they say otherwise; stored.
            copy: copy the adapters into the index folder, now and with every `add`; otherwise the index refers to
                them by relative path.
            strict: raise if an adapter cannot be indexed, instead of leaving it out.
            overwrite: replace the index that is in `index_folder`; whoever has it open must open it again.
            progress: show progress bars.

        Raises:
            FileNotFoundError: there is no source folder.
            FileExistsError: `index_folder` is not free, or holds what no index wrote.
            ValueError: strict, and an adapter cannot be indexed; the embedder misbehaves; or `source_folder` is in
                `index_folder`.
        """
        home = Path(index_folder).resolve()
        encoder = as_embedder(embedder)
        report = building.build(
            Path(source_folder),
            home,
            encoder,
            instruction=instruction,
            scoring=check_scoring(scoring),
            copies=copy,
            strict=strict,
            overwrite=overwrite,
            progress=progress,
        )
        index = cls.open(home, embedder=encoder)
        index.report = report
        return index

    @classmethod
    def open(cls, folder: str | Path, *, embedder: Embedder | str | None = None, reembed: bool = False) -> AdapterIndex:
        """Open an index; the faiss file is derived anew if it is missing, stale or damaged.

        Args:
            folder: the index folder.
            embedder: the encoder it was built with; None loads it by its stored name.
            reembed: embed all examples anew with this embedder, instead of checking that it is the same one.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: another encoder or revision than the index was built with, or an unreadable catalog.
        """
        home = Path(folder).resolve()
        catalog = Catalog.open(home / CATALOG_FILE)
        try:
            settings = catalog.settings
            if embedder is None and not settings.loadable:
                raise ValueError(
                    f"{folder} was built with the callable {settings.encoder!r}, which cannot be loaded by name; "
                    "pass it as embedder="
                )
            index = cls(home, catalog, as_embedder(settings.encoder if embedder is None else embedder))
            if reembed:
                index.rebuild()
            index._current()
        except BaseException:
            catalog.close()
            raise
        return index

    def close(self) -> None:
        """Close the catalog; closing twice is fine."""
        self.catalog.close()

    def __enter__(self) -> AdapterIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"AdapterIndex({str(self.folder)!r}, embedder={self.embedder!r})"

    def __len__(self) -> int:
        return len(self.catalog)

    def __contains__(self, name: object) -> bool:
        return name in self.catalog

    @property
    def cards(self) -> tuple[Card, ...]:
        """The cards of all adapters, in index order."""
        return tuple(entry.card for entry in self.catalog.entries())

    def card(self, name: str) -> Card:
        """The card of one adapter.

        Raises:
            LookupError: no adapter has this name.
        """
        return self.catalog.entry(name).card

    def path(self, name: str) -> Path:
        """The folder of one adapter.

        Raises:
            LookupError: no adapter has this name.
            FileNotFoundError: the folder is gone.
        """
        entry = self.catalog.entry(name)
        folder = Path(os.path.normpath(self.folder / entry.path))
        if not folder.is_dir():
            raise FileNotFoundError(
                f"the folder of {name!r} is gone: {folder}; the index refers to it by the path {entry.path!r}. "
                "Put it back, or tell the index the new place with update(folder)"
            )
        return folder

    @property
    def temperature(self) -> float:
        """Temperature of the default weights: fitted on the present examples for means, 1 for probabilities."""
        return self._current().temperature(self.scoring)

    @property
    def scoring(self) -> Scoring:
        """How searches compare unless they say otherwise."""
        return check_scoring(self.catalog.settings.scoring)

    def add(self, folder: str | Path) -> Card:
        """Check, embed and enter one adapter; it is found by every search that starts afterwards.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: its name is taken, `load_adapter` refuses it, or it has no examples.
        """
        return self._enter(folder, update=False)

    def update(self, folder: str | Path) -> Card:
        """Replace the adapter of the folder's name by what is in the folder now; nothing changed is no change.

        Raises:
            FileNotFoundError: there is no such adapter.
            LookupError: the index has no adapter of that name.
            ValueError: `load_adapter` refuses it, or it has no examples.
        """
        return self._enter(folder, update=True)

    def remove(self, name: str) -> Card:
        """Remove one adapter, and its copy if the index made one; a tombstone stays in the catalog.

        Raises:
            LookupError: no adapter has this name.
        """
        old = self.catalog.remove(name)
        discard_copy(self.folder / old.path, self.folder)
        return old.card

    def rebuild(self) -> None:
        """Derive everything anew from the cards, embeddings included, with this index's embedder."""
        building.reembed(self.catalog, self.embedder)
        self._current()

    def verify(self) -> VerifyReport:
        """Check that every adapter is there and unchanged, and that everything derived agrees with the catalog."""
        return verify(self.catalog, self.folder)

    def search(
        self,
        prompts: Sequence[str],
        k: int = 3,
        exclude: Exclude | None = None,
        where: Where | None = None,
        scoring: Scoring | None = None,
    ) -> Retrieval:
        """The k best adapters for each prompt, all of them if there are fewer than k.

        Args:
            prompts: the users' texts.
            k: adapters a prompt.
            exclude: for each prompt a collection of names it must not get, or None.
            where: only adapters whose card passes: a mapping such as {"tags": "translation", "license": ["mit"]},
                or a callable on the card.
            scoring: how to compare; None is the index's own.

        Raises:
            ValueError: no prompts, k < 1, exclude of another length, or an unknown scoring.
            LookupError: a name in `exclude` or a key in `where` that the index does not have.
        """
        check_request(prompts, k)
        way = self.scoring if scoring is None else check_scoring(scoring)
        snapshot = self._current()
        allowed = allowed_rows(snapshot.cards, where)
        excluded = excluded_rows(exclude, len(prompts), snapshot.rows)
        if way == "mean":  # which needs one of the two embeddings
            texts = [snapshot.settings.instruction + prompt for prompt in prompts]
            queries = unit_vectors(self.embedder, texts, snapshot.settings.dimension)
            return search_means(snapshot, queries, k, allowed, excluded)
        fits = snapshot.fits(way, features(self.embedder, prompts, snapshot.settings), prompts)
        return search_fits(snapshot, way, fits, k, allowed, excluded)

    def explain(self, prompt: str, k: int = 3) -> Explanation:
        """Why the hybrid scoring finds what it finds for one prompt: its k best adapters, channel by channel.

        Raises:
            ValueError: the prompt is no string, or k < 1.
        """
        check_request([prompt], k)
        snapshot = self._current()
        return explain(snapshot, features(self.embedder, [prompt], snapshot.settings), prompt, k)

    def _enter(self, folder: str | Path, *, update: bool) -> Card:
        settings = self.catalog.settings
        check_encoder(settings, self.embedder)  # somebody may have embedded anew since this index was opened
        with admitted(folder, self.folder, copies=settings.copies) as new:
            old = self.catalog.entry(new.card.name) if update else None
            if old is not None and old.card == new.card and (settings.copies or old.path == new.path):
                discard_copy(self.folder / new.path, self.folder)
                return old.card
            building.enter(self.catalog, self.embedder, settings, new, update=update)
        if old is not None:
            discard_copy(self.folder / old.path, self.folder)
        return new.card

    def _current(self) -> Snapshot:
        snapshot = self._snapshot
        if snapshot is not None and snapshot.generation == self.catalog.generation:
            return snapshot
        with self._refreshing:
            if self._snapshot is None or self._snapshot.generation != self.catalog.generation:
                check_encoder(self.catalog.settings, self.embedder)
                self._snapshot = take_snapshot(self.catalog, self.folder / VECTORS_FILE, self._snapshot)
            return self._snapshot
