"""Building an index: every adapter of a folder is checked, embedded and entered, aside, and then put in its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from loracompose.retrieval.admission import CONFIG_FILE, Admitted, admitted
from loracompose.retrieval.catalog import Catalog, Settings
from loracompose.retrieval.embedding import Embedder, SentenceTransformerEmbedder
from loracompose.retrieval.entering import embedded
from loracompose.retrieval.placement import CATALOG_FILE, check_free, made_aside
from loracompose.retrieval.resuming import EmbeddedSoFar
from loracompose.retrieval.scale.sized import derive
from loracompose.retrieval.scoring import Scoring, check_scoring

_TOGETHER = 1000  # adapters per transaction: one for each would wait for the disk, one for all make a long log

T = TypeVar("T")


@dataclass(frozen=True)
class BuildReport:
    """What became of the subfolders of the source folder: names added, and the reason for each one left out.

    `resumed` is the number of adapters whose embeddings an interrupted build had left.
    """

    added: tuple[str, ...]
    skipped: Mapping[str, str]
    resumed: int = 0


def build(
    source: Path,
    home: Path,
    embedder: Embedder,
    *,
    instruction: str,
    scoring: Scoring,
    exact_limit: int,
    copies: bool,
    strict: bool,
    overwrite: bool,
    progress: bool,
) -> BuildReport:
    """Build a whole index aside and put it in its place; arguments and errors are those of `AdapterIndex.build`."""
    folders = _subfolders(source)
    _check_apart([source, *folders], home)
    check_free(home, overwrite=overwrite)  # before the encoder takes its time
    if exact_limit < 1:
        raise ValueError(f"exact_limit must be at least 1, got {exact_limit}")
    described = describe(embedder, instruction=instruction, scoring=scoring, copies=copies)
    settings = replace(described, exact_limit=exact_limit)
    with made_aside(home, overwrite=overwrite) as aside, ExitStack() as stack:
        entering, skipped = _admit(folders, aside.folder, stack, copies=copies, strict=strict, progress=progress)
        with EmbeddedSoFar(aside.kept, settings) as done:
            resumed = _embed(entering, done, embedder, settings, progress=progress)
            _write(entering, done, aside.folder, settings)
        report = BuildReport(tuple(new.card.name for new in entering), skipped, resumed)
    return report


def reembed(catalog: Catalog, embedder: Embedder) -> None:
    """Embed all examples anew with this embedder, in one step."""
    old, entries = catalog.settings, catalog.entries()
    scoring = check_scoring(old.scoring)
    settings = describe(embedder, instruction=old.instruction, scoring=scoring, copies=old.copies, epoch=old.epoch + 1)
    settings = replace(settings, exact_limit=old.exact_limit, precision=old.precision)
    embeddings = {entry.id: embedded(entry.card, embedder, settings) for entry in entries}
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


def _admit(
    folders: list[Path], home: Path, stack: ExitStack, *, copies: bool, strict: bool, progress: bool
) -> tuple[list[Admitted], dict[str, str]]:
    """Check every folder that is an adapter, in this order; strict raises, listing all that cannot be entered."""
    skipped: dict[str, str] = {}
    refused: list[str] = []
    entering: list[Admitted] = []
    for folder in _shown(folders, "checking", progress):
        if not (folder / CONFIG_FILE).is_file():
            skipped[folder.name] = f"no {CONFIG_FILE}: not an adapter"
            continue
        try:
            entering.append(stack.enter_context(admitted(folder, home, copies=copies)))
        except (ValueError, LookupError, OSError) as error:
            skipped[folder.name] = str(error)
            refused.append(folder.name)
    if strict and refused:
        reasons = "\n".join(f"  {name}: {skipped[name]}" for name in refused)
        raise ValueError(f"{len(refused)} adapters cannot be indexed:\n{reasons}")
    return entering, skipped


def _embed(
    entering: list[Admitted], done: EmbeddedSoFar, embedder: Embedder, settings: Settings, *, progress: bool
) -> int:
    """Embed what is not embedded yet, and keep each at once; returns how many were there."""
    resumed = sum(new.card.examples in done for new in entering)
    for new in _shown(entering, "embedding", progress):
        if new.card.examples not in done:
            done.put(new.card.examples, embedded(new.card, embedder, settings))
    return resumed


def _write(entering: list[Admitted], done: EmbeddedSoFar, home: Path, settings: Settings) -> None:
    """Write the catalog, and what is derived from it."""
    with _created(home / CATALOG_FILE, settings) as catalog:
        for start in range(0, len(entering), _TOGETHER):
            with catalog.writing():
                for new in entering[start : start + _TOGETHER]:
                    catalog.add(new.card, new.path, done.get(new.card.examples))
        derive(catalog, home)


@contextmanager
def _created(path: Path, settings: Settings) -> Iterator[Catalog]:
    catalog = Catalog.create(path, settings)
    try:
        yield catalog
    finally:
        catalog.close()


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
