"""Is this upload safe and complete? Decided from names, sizes and headers; no tensor is mapped."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import torch

from loracompose.adapters.base import Base, check_complete
from loracompose.adapters.folder import CONFIG, RECIPE, WEIGHTS, read_json_object
from loracompose.adapters.layout import AdapterLayout, arrange, read_config, read_entries

MAX_FILES = 1000
_READ = (CONFIG, WEIGHTS, RECIPE)
_T = TypeVar("_T")


@dataclass(frozen=True)
class Inspection:
    """What an adapter folder holds and everything found wrong with it.

    Facts are filled in as far as the folder could be understood. Values of tensors are not looked at: `load_adapter`
    refuses those that are not finite.

    Attributes:
        name: of the folder.
        problems: one sentence each, naming the place and the remedy; empty if all is well.
        ranks: module path -> rank.
        dtypes: of the stored tensors.
        bytes: of the weights file.
        base_model: the base the adapter names, "" if none.
        task_type: PEFT's, or None.
        ignored: other files of the folder, which are never read.
    """

    name: str
    problems: tuple[str, ...] = ()
    ranks: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    dtypes: tuple[torch.dtype, ...] = ()
    bytes: int = 0
    base_model: str = ""
    task_type: str | None = None
    ignored: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of the adapted modules, sorted."""
        return tuple(self.ranks)


def inspect_folder(path: Path | str, *, base: Base | None = None) -> Inspection:
    """Look an adapter folder over and report every problem found, not only the first.

    The checks are those of `load_adapter`, short of reading values, and two more for uploads: no link may lead out
    of the folder and it may not hold thousands of files; where one of these fails, no file is opened.

    Args:
        path: the folder.
        base: the base model or its transformers configuration, to hold modules and shapes against.
    """
    folder = Path(path)
    name = folder.resolve().name
    problems: list[str] = []
    files = _attempt(problems, lambda: _list_files(folder, name))
    if files is None:  # nothing is read through a link that leads out: a message might quote it
        return Inspection(name, tuple(problems))
    settings = _attempt(problems, lambda: read_config(folder, name))
    entries = _attempt(problems, lambda: read_entries(folder, name)) if folder.is_dir() else None
    if (folder / RECIPE).exists():
        _attempt(problems, lambda: read_json_object(folder / RECIPE))
    layout: AdapterLayout | None = None
    if settings is not None and entries is not None:
        layout = _attempt(problems, lambda: arrange(folder, name, settings, entries))
    if layout is not None:
        found = layout
        _attempt(problems, lambda: check_complete(found, base))
    return Inspection(
        name=name,
        problems=tuple(dict.fromkeys(problems)),
        ranks=MappingProxyType({m: own.rank for m, own in layout.modules.items()} if layout else {}),
        dtypes=tuple(sorted({entry.dtype for entry in (entries or {}).values()}, key=str)),
        bytes=(folder / WEIGHTS).stat().st_size if entries is not None else 0,
        base_model=settings.base_model if settings else "",
        task_type=settings.task_type if settings else None,
        ignored=tuple(file for file in files if file not in _READ),
    )


def _attempt(problems: list[str], check: Callable[[], _T]) -> _T | None:
    """The result of a check, or None with its complaint noted."""
    try:
        return check()
    except (ValueError, LookupError, OSError) as error:
        problems.extend(str(error).splitlines())
        return None


def _list_files(folder: Path, name: str) -> tuple[str, ...]:
    """Files of the folder by relative path, none of them leading out of it.

    Raises:
        ValueError: a link that leads out of the folder, or too many files.
    """
    root, found = folder.resolve(), []
    for place, folders, files in os.walk(root):
        for entry in (*folders, *files):
            full = Path(place, entry)
            if full.is_symlink() and not full.resolve().is_relative_to(root):
                raise ValueError(f"{name}: {entry!r} is a link that leads out of the folder; replace it by the file")
        found += [Path(place, entry).relative_to(root).as_posix() for entry in files]
        if len(found) > MAX_FILES:
            raise ValueError(f"{name}: the folder holds more than {MAX_FILES} files; keep only the adapter's")
    return tuple(sorted(found))
