"""What happens to an adapter folder before it enters an index: loaded, hashed, its card read, copied if wanted."""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from loracompose.adapters.checkpoint import load_adapter
from loracompose.adapters.folder import sync
from loracompose.retrieval.cards import Card, read_card

CONFIG_FILE = "adapter_config.json"
COPIES = "adapters"

_COPIED = ("*.json", "*.safetensors", "*.md", "*.txt", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Admitted:
    """An adapter that may enter: its complete card, and its folder relative to the index folder."""

    card: Card
    path: str


def absolute(folder: str | Path) -> Path:
    """The folder with its parents resolved but its own name kept, for the name is the adapter's."""
    plain = Path(os.path.abspath(folder))  # resolve() would follow a link and lose its name
    return plain.parent.resolve() / plain.name


@contextmanager
def admitted(folder: str | Path, home: Path, *, copies: bool) -> Iterator[Admitted]:
    """The checked adapter; a copy made of it is removed again if the block fails.

    Args:
        folder: the adapter's folder.
        home: the index folder.
        copies: copy the adapter into the index folder; then the copy is what is checked and hashed. Copied are
            its configuration, safetensors, JSON, text and licence files, no subfolders and no pickles.

    Raises:
        FileNotFoundError: there is no such adapter.
        ValueError: the adapter is refused by `load_adapter`, or has no card or no examples.
        LookupError: the adapter is incomplete.
    """
    source = absolute(folder)
    if not (source / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} is no adapter folder: it has no {CONFIG_FILE}")
    card = read_card(source)
    place = _copy(source, home) if copies else source
    try:
        yield Admitted(_complete(card, place), Path(os.path.relpath(place, home)).as_posix())
    except BaseException:
        if copies:
            discard_copy(place, home)
        raise


def discard_copy(place: Path, home: Path) -> None:
    """Delete the copy of an adapter if the index folder holds it; anything outside is left alone."""
    if place.parent.parent == home / COPIES:
        shutil.rmtree(place.parent, ignore_errors=True)


def foreign_copies(copies: Path) -> list[Path]:
    """What lies in the folder of copies without being one: a copy is <12 digits>/<name>/<copied files>, no more."""
    foreign = []
    for path in copies.rglob("*"):
        digits, *rest = path.relative_to(copies).parts
        copied = path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COPIED)
        fits = copied if len(rest) == 2 else path.is_dir() and len(rest) < 2
        if not fits or path.is_symlink() or not re.fullmatch("[0-9a-f]{12}", digits):
            foreign.append(path)
    return foreign


def _complete(card: Card, place: Path) -> Card:
    adapter = load_adapter(place)  # freed at once: a build admits many
    return replace(card, fingerprint=adapter.fingerprint, base_model=adapter.base_model)


def _copy(source: Path, home: Path) -> Path:
    # A folder of its own: the new version of an adapter lies beside the old one until the catalog has changed.
    target = home / COPIES / uuid.uuid4().hex[:12] / source.name
    target.mkdir(parents=True)
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}):
        sync(shutil.copyfile(file, target / file.name))
    for folder in (target, target.parent, home / COPIES, home):  # each holds the name of the one before
        sync(folder)
    return target
