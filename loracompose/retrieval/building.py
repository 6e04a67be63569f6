"""Building an index: every adapter of a folder is checked, embedded and entered, aside, and then renamed."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from loracompose.adapters.folder import sync
from loracompose.retrieval.admission import CONFIG_FILE, COPIES, Admitted, admitted, foreign_copies
from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog, Settings
from loracompose.retrieval.embedding import Embedder, SentenceTransformerEmbedder, features, representation
from loracompose.retrieval.scoring import Scoring, check_scoring
from loracompose.retrieval.snapshot import take_snapshot

CATALOG_FILE = "catalog.sqlite"
VECTORS_FILE = "vectors.faiss"

# SQLite's own files beside the catalog, and what a crash in the middle of writing the faiss file leaves.
_OWN = (*(CATALOG_FILE + end for end in ("", "-wal", "-shm", "-journal")), f"{VECTORS_FILE}*", f".{VECTORS_FILE}*")

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
    _check_apart([source, *folders], home)
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
        FileExistsError: the folder is there already, and `overwrite` is False, or it is not an index, or it holds
            something else besides.
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
        sync(aside)
        try:
            aside.rename(folder)
        except OSError:
            if replaced:
                old.rename(folder)
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that must not be replaced: no index, an index without `overwrite`, or more than an index."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CATALOG_FILE).is_file():
        raise FileExistsError(f"{folder} exists and is not an index; choose another place")
    if not overwrite:
        raise FileExistsError(f"{folder} is an index already; open it, or build with overwrite=True")
    if foreign := _foreign(folder):
        raise FileExistsError(
            f"{folder} is not replaced, for it holds what the index did not write: {', '.join(foreign[:10])}"
            f"{', ...' if len(foreign) > 10 else ''}; move that elsewhere first"
        )


def _foreign(home: Path) -> list[str]:
    """Entries of an index folder that no index writes, relative to it."""
    others = [path for path in home.iterdir() if path.is_dir() or not any(fnmatch(path.name, own) for own in _OWN)]
    copies = home / COPIES
    if copies in others and not copies.is_symlink():
        others.remove(copies)
        others += foreign_copies(copies)
    return sorted(path.relative_to(home).as_posix() for path in others)


def _check_apart(sources: list[Path], home: Path) -> None:
    """Refuse adapters that replacing the index would delete."""
    for place in (source.resolve() for source in sources):
        if place.is_relative_to(home.resolve()):
            raise ValueError(
                f"the adapters to index are in {place}, which is {'' if place == home.resolve() else 'in '}the index "
                f"folder {home} that would be replaced with all it holds; move them or choose another index folder"
            )


def _subfolders(source: Path) -> list[Path]:
    if not source.is_dir():
        raise FileNotFoundError(f"{source} is not a folder; give the folder whose subfolders are adapters")
    return sorted(path for path in source.iterdir() if path.is_dir())


def _shown(items: list[T], doing: str, progress: bool) -> Iterable[T]:
    if not progress:
        return items
    from rich.progress import track  # here, for only some uses show progress

    return track(items, description=doing)
