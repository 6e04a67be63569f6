"""Building an index: every adapter of a folder is checked, embedded and entered, aside, and then renamed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.admission import CONFIG_FILE, Admitted, admitted
from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog, Settings
from loracompose.retrieval.embedding import Embedder, SentenceTransformerEmbedder, features, representation
from loracompose.retrieval.scoring import Scoring, check_scoring
from loracompose.retrieval.snapshot import take_snapshot

CATALOG_FILE = "catalog.sqlite"
VECTORS_FILE = "vectors.faiss"

T = TypeVar("T")


@dataclass(frozen=True)
class BuildReport:
    """What became of the subfolders of the source folder: names added, and the reason for each one left out."""

    added: tuple[str, ...]
    skipped: Mapping[str, str]


def build(
    source: Path,
    home: Path,
    embedder: Embedder,
    *,
    instruction: str,
    scoring: Scoring,
    copies: bool,
    strict: bool,
    overwrite: bool,
    progress: bool,
) -> BuildReport:
    """Build a whole index aside and rename it to `home`; arguments and errors are those of `AdapterIndex.build`."""
    folders = _subfolders(source)
    check_free(home, overwrite=overwrite)  # before the encoder takes its time
    settings = describe(embedder, instruction=instruction, scoring=scoring, copies=copies)
    with built_aside(home, overwrite=overwrite) as aside:
        catalog = Catalog.create(aside / CATALOG_FILE, settings)
        try:
            report = _fill(folders, aside, catalog, embedder, strict=strict, progress=progress)
            take_snapshot(catalog, aside / VECTORS_FILE)
        finally:
            catalog.close()
    return report


def reembed(catalog: Catalog, embedder: Embedder) -> None:
    """Embed all examples anew with this embedder, in one step."""
    old, entries = catalog.settings, catalog.entries()
    scoring = check_scoring(old.scoring)
    settings = describe(embedder, instruction=old.instruction, scoring=scoring, copies=old.copies, epoch=old.epoch + 1)
    embeddings = {entry.id: _embedded(entry.card, embedder, settings) for entry in entries}
    catalog.replace_embeddings(settings, embeddings)


def describe(embedder: Embedder, *, instruction: str, scoring: Scoring, copies: bool, epoch: int = 0) -> Settings:
    """The settings of an index made with this embedder."""
    return Settings(
        encoder=embedder.name,
        revision=embedder.revision,
        dimension=embedder.dimension,
        instruction=instruction,
        scoring=scoring,
        loadable=isinstance(embedder, SentenceTransformerEmbedder),
        copies=copies,
        epoch=epoch,
    )


def _fill(
    folders: list[Path], home: Path, catalog: Catalog, embedder: Embedder, *, strict: bool, progress: bool
) -> BuildReport:
    """Enter every folder that is an adapter, in this order; strict raises, listing all that cannot be entered."""
    settings = catalog.settings
    skipped: dict[str, str] = {}
    refused: list[str] = []
    entering: list[Admitted] = []
    with ExitStack() as stack:
        for folder in _shown(folders, "checking", progress):
            if not (folder / CONFIG_FILE).is_file():
                skipped[folder.name] = f"no {CONFIG_FILE}: not an adapter"
                continue
            try:
                entering.append(stack.enter_context(admitted(folder, home, copies=settings.copies)))
            except (ValueError, LookupError, OSError) as error:
                skipped[folder.name] = str(error)
                refused.append(folder.name)
        if strict and refused:
            reasons = "\n".join(f"  {name}: {skipped[name]}" for name in refused)
            raise ValueError(f"{len(refused)} adapters cannot be indexed:\n{reasons}")
        for new in _shown(entering, "embedding", progress):
            enter(catalog, embedder, settings, new)
    return BuildReport(tuple(new.card.name for new in entering), skipped)


def enter(catalog: Catalog, embedder: Embedder, settings: Settings, new: Admitted, *, update: bool = False) -> None:
    """Embed the examples of one adapter and write it to the catalog."""
    embeddings = _embedded(new.card, embedder, settings)
    write = catalog.replace if update else catalog.add
    write(new.card, new.path, embeddings, epoch=settings.epoch)


def _embedded(card: Card, embedder: Embedder, settings: Settings) -> NDArray[np.float32]:
    embeddings = features(embedder, card.examples, settings)
    representation(embeddings, card.name)  # refuses what could not be searched
    return embeddings


@contextmanager
def built_aside(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` at the end, or disappears if the block fails.

    Raises:
        FileExistsError: the folder is there already, and `overwrite` is False or it is not an index.
    """
    check_free(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex[:8]
    aside, old = (folder.with_name(f".{folder.name}.{word}-{token}") for word in ("building", "old"))
    aside.mkdir()
    try:
        yield aside
        check_free(folder, overwrite=overwrite)
        replaced = folder.exists()
        if replaced:
            folder.rename(old)
        try:
            aside.rename(folder)
        except OSError:
            if replaced:
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that must not be replaced."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CATALOG_FILE).is_file():
        raise FileExistsError(f"{folder} exists and is not an index; choose another place")
    if not overwrite:
        raise FileExistsError(f"{folder} is an index already; open it, or build with overwrite=True")


def _subfolders(source: Path) -> list[Path]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder; give the folder whose subfolders are adapters")
    return sorted(path for path in source.iterdir() if path.is_dir())


def _shown(items: list[T], doing: str, progress: bool) -> Iterable[T]:
    if not progress:
        return items
    from rich.progress import track  # here, for only some uses show progress

    return track(items, description=doing)
