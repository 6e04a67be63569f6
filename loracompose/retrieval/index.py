"""The index of a pool of adapters: build, open, change, search, mend.

Listing and removing need neither torch nor faiss, so what needs them is imported where it is used.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loracompose.retrieval import backup
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
from loracompose.retrieval.filtering import Exclude, Where, allowed_rows, check_request, excluded_rows
from loracompose.retrieval.placement import VECTORS_FILE
from loracompose.retrieval.scale.sized import SizedPool
from loracompose.retrieval.scoring import DEFAULT_SCORING, Scoring, check_scoring
from loracompose.retrieval.stored import StoredIndex, open_catalog
from loracompose.retrieval.tables import EXACT_LIMIT

if TYPE_CHECKING:
    from loracompose.retrieval.building import BuildReport
    from loracompose.retrieval.explanation import Explanation
    from loracompose.retrieval.repair import RepairReport
    from loracompose.retrieval.result import Retrieval
    from loracompose.retrieval.snapshot import Snapshot
    from loracompose.retrieval.verification import VerifyReport


class AdapterIndex(StoredIndex):
    """A pool of adapters that can be searched by prompt.

    Prompts and examples are embedded with and without an instruction. `scoring` says how they are compared:

    - "hybrid", the default: the discriminant and the words themselves (`lexicon.py`), weighed by how well they find
      the adapters of held-out examples; the score is the logarithm of p(adapter | prompt).
    - "discriminant": under the covariance of what varies within adapters (`discriminant.py`); likewise log p.
    - "mean": the cosine with the renormalised mean of the adapter's instructed examples (LoraRetriever,
      arXiv:2402.09997, except that the paper's code does not renormalise the mean), whatever their kinds.

    Where a card names several kinds of prompt, the first two compare with each kind, and p(adapter | prompt) is the sum
    over its kinds; a pool of more than `exact_limit` adapters has one centre an adapter.

    Weights are a softmax of the scores over the retrieved, at the temperature that fits the pool's own examples;
    LoraRetriever weighs uniformly.

    The catalog is the truth and changes in transactions; everything else is derived from it with the first search
    after a change. Threads may search while others add and remove; a search sees one generation. Other processes
    may use the same folder at the same time.

    A pool of more than `exact_limit` adapters is not held in memory (`scale/`): candidates are found by reduced vectors
    that are frozen in versions, and scored exactly; probabilities are then those among the candidates.

    Use `AdapterIndex.build` or `AdapterIndex.open`; close it, or use it in a `with` block.
    """

    def __init__(
        self, folder: Path, catalog: Catalog, embedder: Embedder | None = None, report: BuildReport | None = None
    ) -> None:
        super().__init__(folder, catalog)
        self.report = report
        self._embedder = embedder
        self._snapshot: Snapshot | None = None
        self._large = SizedPool(catalog, folder)
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
        exact_limit: int = EXACT_LIMIT,
        copy: bool = False,
        strict: bool = False,
        overwrite: bool = False,
        progress: bool = False,
    ) -> AdapterIndex:
        """Index every immediate subfolder that has an adapter_config.json.

        It is built aside and put in its place at the end: there is a whole index or none. What is left out stands in
        `index.report`. A build that is interrupted keeps the embeddings it has made in a hidden sibling of
        `index_folder`, `.NAME.unfinished`; the next one does not make them again.

        Args:
            source_folder: its subfolders are the adapters; their names are the adapters' names.
            index_folder: where the index goes.
            embedder: the encoder, by name or as an object; default is all-MiniLM-L6-v2.
            instruction: what is put before every example and every prompt, which are embedded without it, too.
            scoring: how searches compare unless they say otherwise; stored.
            exact_limit: adapters up to which all are compared with every prompt; stored.
            copy: copy the adapters into the index folder, now and with every `add`; otherwise the index refers to
                them by relative path.
            strict: raise if an adapter cannot be indexed, instead of leaving it out.
            overwrite: replace the index that is in `index_folder`; whoever has it open must open it again.
            progress: show progress bars.

        Raises:
            FileNotFoundError: there is no source folder.
            FileExistsError: `index_folder` is not free, or holds what no index wrote.
            BlockingIOError: another process is building it.
            ValueError: strict, and an adapter cannot be indexed; the embedder misbehaves; or `source_folder` is in
                `index_folder`.
        """
        from loracompose.retrieval import building

        home = Path(index_folder).resolve()
        encoder = as_embedder(embedder)
        report = building.build(
            Path(source_folder),
            home,
            encoder,
            instruction=instruction,
            scoring=check_scoring(scoring),
            exact_limit=exact_limit,
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
        """Open an index; what a search needs is loaded and derived with the first one, or with `prepare`.

        Args:
            folder: the index folder.
            embedder: the encoder it was built with; None loads it by its stored name when it is first needed.
            reembed: embed all examples anew with this embedder, instead of checking that it is the same one.

        Raises:
            FileNotFoundError: there is no index.
            ValueError: another encoder or revision than the index was built with, or an unreadable catalog.
        """
        home = Path(folder).resolve()
        catalog = open_catalog(home)
        try:
            index = cls(home, catalog, None if embedder is None else as_embedder(embedder))
            if reembed:
                index.rebuild()
            elif embedder is not None:
                check_encoder(catalog.settings, index.embedder)
        except BaseException:
            catalog.close()
            raise
        return index

    @staticmethod
    def restore(snapshot_folder: str | Path, index_folder: str | Path) -> VerifyReport:
        """Put the index of a snapshot in its place, in one step; whoever has the old one open must open it again.

        Records and copies are held against the snapshot's checksums before anything is replaced. Adapters that the
        snapshot only refers to may have changed since; what is wrong with them stands in the report.

        Raises:
            FileNotFoundError: there is no snapshot.
            FileExistsError: `index_folder` holds what no index wrote.
            ValueError: the snapshot is damaged, or of another format version; nothing is changed.
        """
        home = Path(index_folder).resolve()
        backup.restore_snapshot(Path(snapshot_folder).resolve(), home)
        with AdapterIndex.open(home) as restored:
            return restored.verify()

    def close(self) -> None:
        """Close the catalog, and end what runs behind the searches; closing twice is fine."""
        self._large.close()
        super().close()

    def __repr__(self) -> str:
        return f"AdapterIndex({str(self.folder)!r}, embedder={self._embedder or self.catalog.settings.encoder!r})"

    @property
    def embedder(self) -> Embedder:
        """The encoder: the one it was opened with, or that of the stored name, which loads when it is first called.

        Raises:
            ValueError: it was built with a callable and opened without it.
        """
        if self._embedder is None:
            settings = self.catalog.settings
            if not settings.loadable:
                raise ValueError(
                    f"{self.folder} was built with the callable {settings.encoder!r}, which cannot be loaded by name; "
                    "pass it as embedder="
                )
            self._embedder = as_embedder(settings.encoder)
        return self._embedder

    @property
    def temperature(self) -> float:
        """Temperature of the default weights: fitted on the present examples for means, 1 for probabilities."""
        return (self._large.view() or self._current()).temperature(self.scoring)

    @property
    def scoring(self) -> Scoring:
        """How searches compare unless they say otherwise."""
        return check_scoring(self.catalog.settings.scoring)

    def prepare(self) -> None:
        """Check the encoder and derive what a search needs now, instead of with the first search.

        Raises:
            ValueError: the index was embedded with another encoder or revision, or with a callable that is not given.
        """
        if self._large.view(self.embedder) is None:
            self._current()

    def add(self, folder: str | Path) -> Card:
        """Check, embed and enter one adapter; it is found by every search that starts afterwards.

        Raises:
            FileNotFoundError: there is no such adapter.
            ValueError: its name is taken, `load_adapter` refuses it, it has no examples, or it is in the index folder.
        """
        from loracompose.retrieval.entering import enter

        return enter(self.catalog, self.folder, self.embedder, folder, update=False)

    def update(self, folder: str | Path) -> Card:
        """Replace the adapter of the folder's name by what is in the folder now; nothing changed is no change.

        Raises:
            FileNotFoundError: there is no such adapter.
            LookupError: the index has no adapter of that name.
            ValueError: `load_adapter` refuses it, it has no examples, or it is in the index folder and no copy of the
                index's own.
        """
        from loracompose.retrieval.entering import enter

        return enter(self.catalog, self.folder, self.embedder, folder, update=True)

    def rebuild(self) -> None:
        """Derive everything anew from the cards, embeddings included, with this index's embedder."""
        from loracompose.retrieval import building

        building.reembed(self.catalog, self.embedder)
        self.prepare()

    def verify(self) -> VerifyReport:
        """Check that every adapter is there and unchanged, and that everything derived agrees with the catalog."""
        from loracompose.retrieval.verification import verify

        return verify(self.catalog, self.folder)

    def repair(self, look_in: Sequence[str | Path] = ()) -> RepairReport:
        """Mend what can be derived again or proved by content, and say what is left; no record is ever deleted.

        Broken embeddings are made again, and what is derived from them; left-over copies are deleted; an adapter
        whose folder is gone is referred to where its content is found. The encoder is loaded only if it is needed.

        Args:
            look_in: folders whose subfolders may be adapters that moved, beside the folders of the other adapters.

        Raises:
            PermissionError: the index cannot be written.
            ValueError: embeddings must be made again, and the encoder is not the one they were made with.
        """
        from loracompose.retrieval.repair import repair

        report = repair(self.catalog, self.folder, lambda: self.embedder, [Path(folder) for folder in look_in])
        self._snapshot = None
        return report

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
        from loracompose.retrieval.search import search_fits, search_means

        check_request(prompts, k)
        if scoring is not None:
            check_scoring(scoring)
        found = self._large.search(self.embedder, prompts, k, exclude, where, scoring)
        if found is not None:
            return found
        snapshot = self._current()
        way = check_scoring(snapshot.settings.scoring) if scoring is None else scoring
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
        from loracompose.retrieval.explanation import explain

        check_request([prompt], k)
        found = self._large.explain(self.embedder, prompt, k)
        if found is not None:
            return found
        snapshot = self._current()
        return explain(snapshot, features(self.embedder, [prompt], snapshot.settings), prompt, k)

    def _current(self) -> Snapshot:
        from loracompose.retrieval.snapshot import take_snapshot

        snapshot = self._snapshot
        if snapshot is not None and snapshot.generation == self.catalog.generation:
            return snapshot
        with self._refreshing:
            if self._snapshot is None or self._snapshot.generation != self.catalog.generation:
                check_encoder(self.catalog.settings, self.embedder)  # before anything is derived for nothing
                taken = take_snapshot(self.catalog, self.folder / VECTORS_FILE, self._snapshot)
                check_encoder(taken.settings, self.embedder)  # somebody may have embedded anew in between
                self._snapshot = taken
            return self._snapshot
