"""The copies of adapters inside an index folder: made, found to be left over, and deleted. Needs no torch.

A copy is `adapters/<12 digits>/<name>/`: the new version of an adapter lies beside the old one until the catalog has
changed. A process that dies leaves a copy that no record refers to, never a record without its copy. Whatever else lies
in the folder of copies, and all of it where the index makes none, is the user's and never cleared away.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path

from loracompose.adapters.folder import sync
from loracompose.retrieval.tables import Entry

COPIES = "adapters"

_COPIED = ("*.json", "*.safetensors", "*.md", "*.txt", "LICENSE*", "NOTICE*")


def make_copy(source: Path, home: Path) -> Path:
    """Copy an adapter's configuration, safetensors, JSON, text and licence files; no subfolders and no pickles."""
    target = home / COPIES / uuid.uuid4().hex[:12] / source.name
    copy_files(source, target)
    for folder in (target.parent, home / COPIES, home):  # each holds the name of the one before
        sync(folder)
    return target


def copy_files(source: Path, target: Path) -> None:
    """Copy what a copy consists of into a new folder, flushed to the disk."""
    target.mkdir(parents=True)
    for file in sorted({file for pattern in _COPIED for file in source.glob(pattern) if file.is_file()}):
        sync(shutil.copyfile(file, target / file.name))
    sync(target)


def is_copy(place: Path, home: Path, *, copies: bool) -> bool:
    """Whether this adapter folder is a copy in the index folder; `copies` says whether the index makes any."""
    return copies and place.parent.parent == home / COPIES and _holds_copy(place.parent)


def discard_copy(place: Path, home: Path, *, copies: bool) -> None:
    """Delete the copy of an adapter if the index folder holds it; what the index did not make is left alone."""
    if is_copy(place, home, copies=copies):
        shutil.rmtree(place.parent, ignore_errors=True)


def leftover_copies(home: Path, entries: Iterable[Entry], *, copies: bool) -> list[Path]:
    """Folders of copies that none of these adapters refers to; there are none if the index makes none."""
    used = {(home / entry.path).parent for entry in entries}
    found = (home / COPIES).glob("*") if copies else ()
    return sorted(path for path in found if path not in used and _holds_copy(path))


def foreign_copies(copies: Path) -> list[Path]:
    """What lies in the folder of copies without being one: a copy is <12 digits>/<name>/<copied files>, no more."""
    foreign = []
    for path in copies.rglob("*"):
        digits, *rest = path.relative_to(copies).parts
        copied = path.is_file() and any(fnmatch(path.name, pattern) for pattern in _COPIED)
        fits = copied if len(rest) == 2 else path.is_dir() and len(rest) < 2
        if not fits or path.is_symlink() or not _holds_copy(copies / digits):
            foreign.append(path)
    return foreign


def _holds_copy(folder: Path) -> bool:
    """Whether a folder is named as those that copies are made in."""
    return re.fullmatch("[0-9a-f]{12}", folder.name) is not None
