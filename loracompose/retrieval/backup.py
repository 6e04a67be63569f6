"""A copy of a whole index in another folder, and the way back.

A snapshot is itself an index folder, which can be opened and searched, with a `snapshot.json` that sums it up. Copies
of adapters are copied; adapters that the index only refers to are referred to from the new place.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import file_digest
from pathlib import Path
from typing import Any

from loracompose.adapters.folder import parse_json_object, sync, write_json
from loracompose.retrieval.catalog import Catalog, Entry
from loracompose.retrieval.compaction import folder_bytes
from loracompose.retrieval.copies import copy_files, is_copy, leftover_copies
from loracompose.retrieval.placement import CATALOG_FILE, check_free, made_aside
from loracompose.retrieval.upkeep import content_digest, forget_derived, refer

MANIFEST_FILE = "snapshot.json"
_FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """What a snapshot holds: sha256 over its records and of each copied file, and where it was made and when (UTC)."""

    format: int
    place: str
    made_at: str
    adapters: int
    records: str
    files: dict[str, str]


@dataclass(frozen=True)
class SnapshotReport:
    """A snapshot that was made: its folder, the number of its adapters, and the bytes of all its files.

    `missing` names adapters whose copy in the index is gone: their records are in the snapshot, their weights are not.
    """

    folder: Path
    adapters: int
    bytes: int
    missing: tuple[str, ...]


def save_snapshot(catalog: Catalog, home: Path, folder: Path) -> SnapshotReport:
    """Copy one state of an index to `folder`; errors are those of `AdapterIndex.snapshot`."""
    if folder.is_relative_to(home):
        raise ValueError(f"{folder} is in the index folder {home}; choose a place outside of it")
    check_free(folder, overwrite=False)
    with made_aside(folder, overwrite=False) as aside:
        copied = _copied(catalog, home, aside.folder)
        try:
            forget_derived(copied)
            entries = copied.entries()
            inside, outside = _by_place(entries, home, copies=copied.settings.copies)
            missing = tuple(entry.card.name for entry in inside if not (aside.folder / entry.path).is_dir())
            refer(copied, {entry.id: _referred(home / entry.path, folder) for entry in outside})
            files = {path.relative_to(aside.folder).as_posix(): _sha256(path) for path in _copied_files(aside.folder)}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            manifest = Manifest(_FORMAT, str(folder), now, len(entries), content_digest(copied), files)
        finally:
            copied.close()
        sync(aside.folder / CATALOG_FILE)
        write_json(aside.folder / MANIFEST_FILE, asdict(manifest))
        sync(aside.folder / MANIFEST_FILE)
    return SnapshotReport(folder, len(entries), folder_bytes(folder), missing)


def restore_snapshot(snapshot: Path, home: Path) -> int:
    """Put the index of a snapshot in its place; returns the number of adapters; errors as `AdapterIndex.restore`."""
    if home.is_relative_to(snapshot) or snapshot.is_relative_to(home):
        raise ValueError(f"the snapshot {snapshot} and the index {home} must lie apart; choose another place")
    manifest = _read_manifest(snapshot)
    check_free(home, overwrite=True)
    with made_aside(home, overwrite=True) as aside:
        for name in manifest.files:
            _copy_checked(snapshot / name, aside.folder / name, manifest.files[name])
        catalog = _checked_catalog(snapshot, aside.folder, manifest)
        try:
            forget_derived(catalog)  # somebody may have searched in the snapshot
            _, outside = _by_place(catalog.entries(), snapshot, copies=catalog.settings.copies)
            refer(catalog, {entry.id: _referred(_found(entry, snapshot, manifest), home) for entry in outside})
        finally:
            catalog.close()
        sync(aside.folder / CATALOG_FILE)
        for folder in aside.folder.rglob("*/"):
            sync(folder)
    return manifest.adapters


def _copied(catalog: Catalog, home: Path, aside: Path) -> Catalog:
    """An open copy of the catalog, and beside it the copies of the adapters that it records.

    While copies are copied others may remove theirs: then the catalog is copied again, and what is new to it. A copy
    whose record is still there after it was read cannot have been deleted meanwhile, for the record goes first.
    """
    while True:
        (aside / CATALOG_FILE).unlink(missing_ok=True)
        catalog.database.copy_to(aside / CATALOG_FILE)
        copied = Catalog.open(aside / CATALOG_FILE)
        entries, copies = copied.entries(), copied.settings.copies
        for entry in entries:
            if is_copy(home / entry.path, home, copies=copies):
                _copy_once(home / entry.path, aside / entry.path)
        if set(copied.ids()) <= set(catalog.ids()):
            break
        copied.close()
    for folder in leftover_copies(aside, entries, copies=copies):
        shutil.rmtree(folder)
    for folder in aside.rglob("*/"):
        sync(folder)
    return copied


def _copy_once(place: Path, target: Path) -> None:
    if target.exists() or not place.is_dir():
        return
    try:
        copy_files(place, target)
    except FileNotFoundError:  # its record went meanwhile, or it is noticed that it did not
        shutil.rmtree(target)


def _by_place(entries: list[Entry], home: Path, *, copies: bool) -> tuple[list[Entry], list[Entry]]:
    """The adapters that are copies in the index folder, and those that it refers to."""
    inside = [entry for entry in entries if is_copy(home / entry.path, home, copies=copies)]
    return inside, [entry for entry in entries if not is_copy(home / entry.path, home, copies=copies)]


def _copied_files(folder: Path) -> list[Path]:
    """The files of a snapshot beside its catalog."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.parent != folder)


def _checked_catalog(snapshot: Path, aside: Path, manifest: Manifest) -> Catalog:
    """An open copy of the snapshot's catalog that holds the records it was made with."""
    try:
        source = Catalog.open(snapshot / CATALOG_FILE)
        try:
            source.database.copy_to(aside / CATALOG_FILE)
        finally:
            source.close()
        catalog = Catalog.open(aside / CATALOG_FILE)
        damage = catalog.damage()
        found = "" if damage else content_digest(catalog)
    except (sqlite3.DatabaseError, FileNotFoundError) as error:
        raise ValueError(f"the snapshot {snapshot} is damaged: {error}; nothing was restored") from error
    if found != manifest.records:
        catalog.close()
        what = "; ".join(damage) or "its records are not those it was made with"
        raise ValueError(f"the snapshot {snapshot} is damaged: {what}; nothing was restored")
    return catalog


def _copy_checked(source: Path, target: Path, digest: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_symlink() or not source.is_file():
        raise ValueError(f"the snapshot is damaged: {source} is missing; nothing was restored")
    sync(shutil.copyfile(source, target))
    if _sha256(target) != digest:
        raise ValueError(f"the snapshot is damaged: {source} is not the file it was made with; nothing was restored")


def _read_manifest(snapshot: Path) -> Manifest:
    path = snapshot / MANIFEST_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{snapshot} is no snapshot: it has no {MANIFEST_FILE}; make one with snapshot(folder)")
    content: dict[str, Any] = parse_json_object(path.read_bytes(), str(path))
    if content.get("format") != _FORMAT:
        raise ValueError(
            f"{path} has format version {content.get('format')!r}, this loracompose reads version {_FORMAT}; "
            "restore it with the loracompose that made it"
        )
    try:
        manifest = Manifest(**content)
    except TypeError as error:
        raise ValueError(f"the snapshot {snapshot} is damaged: {MANIFEST_FILE}: {error}") from error
    wrong = [
        name
        for name in manifest.files
        if not is_copy((snapshot / name).parent, snapshot, copies=True) or ".." in Path(name).parts
    ]
    if wrong:
        raise ValueError(f"the snapshot {snapshot} is damaged: {MANIFEST_FILE} names {wrong[0]!r}, which is no copy")
    return manifest


def _found(entry: Entry, snapshot: Path, manifest: Manifest) -> Path:
    """Where an adapter outside is: seen from where the snapshot is now, or else from where it was made."""
    here, there = (Path(os.path.normpath(Path(place) / entry.path)) for place in (snapshot, manifest.place))
    return there if there.is_dir() and not here.is_dir() else here


def _referred(place: Path, home: Path) -> str:
    return Path(os.path.relpath(os.path.normpath(place), home)).as_posix()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return file_digest(stream, "sha256").hexdigest()
