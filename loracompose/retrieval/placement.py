"""A whole index folder put in its place in one step: made aside, flushed to the disk, renamed or exchanged."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from loracompose.adapters.folder import sync
from loracompose.retrieval.catalog import Catalog
from loracompose.retrieval.copies import COPIES, foreign_copies
from loracompose.retrieval.locking import locked

CATALOG_FILE = "catalog.sqlite"
VECTORS_FILE = "vectors.faiss"

# SQLite's own files beside the catalog, and what a crash in the middle of writing the faiss file leaves.
_OWN = (
    *(CATALOG_FILE + end for end in ("", "-wal", "-shm", "-journal")),
    f"{VECTORS_FILE}*",
    f".{VECTORS_FILE}*",
    "version-*",
)

_EXCHANGE = 2  # RENAME_EXCHANGE of <linux/fs.h>
_HERE = -100  # AT_FDCWD of <fcntl.h>


@dataclass(frozen=True)
class Aside:
    """Where a folder is made: `folder` becomes it, `kept` outlives a failure and is deleted after success."""

    folder: Path
    kept: Path


@contextmanager
def made_aside(folder: Path, *, overwrite: bool) -> Iterator[Aside]:
    """Two hidden siblings to make an index folder in, which is put in its place when the block has ended well.

    After a failure nothing is left but what the block put into `kept`. A process that is killed leaves both, and the
    next one clears them: `.NAME.building` at its start, `.NAME.unfinished` at its end.

    Args:
        folder: the place.
        overwrite: replace the index that is there.

    Raises:
        FileExistsError: the place is not free, see `check_free`.
        BlockingIOError: another process is making this very folder.
    """
    check_free(folder, overwrite=overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Siblings, so that paths relative to one are right in the other.
    aside, kept = (folder.with_name(f".{folder.name}.{word}") for word in ("building", "unfinished"))
    with ExitStack() as held:
        try:
            held.enter_context(locked(kept, create=True, wait=False))
        except BlockingIOError as error:
            raise BlockingIOError(f"{folder} is being made by another process; wait for it to end") from error
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            yield Aside(aside, kept)
            check_free(folder, overwrite=overwrite)
            sync(aside)
            _put(aside, folder)
            sync(folder.parent)
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            if not any(kept.iterdir()):
                kept.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)  # where an exchange has put the old one
        shutil.rmtree(kept, ignore_errors=True)  # last, for it is the lock: from here on others may begin


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that must not be replaced.

    Raises:
        FileExistsError: it is no index, or an index without `overwrite`, or holds more than an index.
    """
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not (folder / CATALOG_FILE).is_file():
        raise FileExistsError(f"{folder} exists and is not an index; choose another place")
    if not overwrite:
        raise FileExistsError(
            f"{folder} is an index already; open it, choose another place, or build with overwrite=True"
        )
    if foreign := _foreign(folder):
        raise FileExistsError(
            f"{folder} is not replaced, for it holds what the index did not write: {', '.join(foreign[:10])}"
            f"{', ...' if len(foreign) > 10 else ''}; move that elsewhere first"
        )


def exchange(one: Path, other: Path) -> None:
    """Let two folders of one file system take each other's place, in one step where the system can (Linux).

    Elsewhere in three renames: between the first two, `other` is not there but beside itself, as `.NAME.old-<digits>`.
    """
    if _exchanged_at_once(one, other):
        return
    old = other.with_name(f".{other.name}.old-{uuid.uuid4().hex[:8]}")
    other.rename(old)
    try:
        one.rename(other)
    except OSError:
        old.rename(other)
        raise
    old.rename(one)


def displaced(folder: Path) -> list[Path]:
    """Where a folder may be that is not in its place, because an exchange in several steps was interrupted."""
    return sorted(folder.parent.glob(f".{folder.name}.old-*")) if folder.parent.is_dir() else []


def _put(fresh: Path, folder: Path) -> None:
    if not folder.exists():
        fresh.rename(folder)
        return
    with locked(folder):  # nobody is entering or deleting copies there
        exchange(fresh, folder)


def _exchanged_at_once(one: Path, other: Path) -> bool:
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    if renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):  # a file system or a kernel that cannot
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _foreign(home: Path) -> list[str]:
    """Entries of an index folder that no index writes, relative to it."""
    others = [path for path in home.iterdir() if path.is_dir() or not any(fnmatch(path.name, own) for own in _OWN)]
    copies = home / COPIES
    if copies in others and not copies.is_symlink() and _may_hold_copies(home):
        others.remove(copies)
        others += foreign_copies(copies)
    return sorted(path.relative_to(home).as_posix() for path in others)


def _may_hold_copies(home: Path) -> bool:
    """Whether the index makes copies, or nobody can say because its catalog cannot be read."""
    try:
        catalog = Catalog.open(home / CATALOG_FILE)
    except ValueError:
        return True
    try:
        return catalog.settings.copies
    finally:
        catalog.close()
