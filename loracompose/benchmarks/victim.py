"""The process that a crash test kills: it changes an index at random, without end, and keeps a journal."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from loracompose.benchmarks.journal import Journal, Kind, State, Step
from loracompose.benchmarks.material import word_encoder
from loracompose.retrieval.index import AdapterIndex

USED = (__name__, *(f"loracompose.retrieval.{name}" for name in ("building", "repair", "search")))
"""Modules that take long to import and are used sooner or later: who forks such processes imports them once."""

# How often each step is taken: changes most, whole rebuilds least.
_OFTEN: dict[Kind, int] = {
    "add": 6,
    "update": 4,
    "remove": 3,
    "search": 2,
    "rebuild": 1,
    "compact": 2,
    "replace": 1,
    "snapshot": 1,
    "restore": 1,
}
# About how often each calls what is in _TOUCHING, with eight adapters.
_TOUCHES: dict[Kind, int] = {
    "add": 65,
    "update": 85,
    "remove": 20,
    "search": 40,
    "rebuild": 85,
    "compact": 16,
    "replace": 670,
    "snapshot": 520,
    "restore": 600,
}
# What changes files, or is the beginning or the end of that.
_TOUCHING = frozenset(
    {"rename", "replace", "unlink", "rmdir", "mkdir", "fsync", "open", "close", "write", "sendfile"}
    | {"execute", "executescript", "backup"}
)


@dataclass(frozen=True)
class Place:
    """Where a crash test happens, all below one folder."""

    root: Path

    @property
    def pools(self) -> Path:
        """Every version of every adapter."""
        return self.root / "pools"

    @property
    def index(self) -> Path:
        """The index."""
        return self.root / "index"

    @property
    def snapshots(self) -> tuple[Path, Path]:
        """Where a snapshot is made, and where it is put before it is acknowledged."""
        return self.root / "snapshot-new", self.root / "snapshot"

    @property
    def errors(self) -> Path:
        """What the process says if it ends by itself, which it must not."""
        return self.root / "errors.txt"


def change_without_end(
    place: Place,
    journal: Path,
    state: State,
    names: tuple[str, ...],
    versions: int,
    seed: str,
    fatal: int | None,
    ready: Connection,
) -> None:
    """Take random steps until somebody kills this process.

    Args:
        place: where the index and its adapters are.
        journal: file to write the journal to.
        state: what the index holds.
        names: of all adapters.
        versions: of each adapter.
        seed: of the choice of steps.
        fatal: die in the step of this number, of the same signal by its own hand, before a call into the system or
            SQLite that the seed decides; None waits for another's hand.
        ready: told when the first step is about to begin.
    """
    try:
        chance = random.Random(seed)
        diary = Journal(journal)
        index = AdapterIndex.open(place.index, embedder=word_encoder())
        ready.send("ready")
        for number in itertools.count():
            last = number == fatal
            step = _choose(chance, state, names, versions, evenly=last)
            diary.begin(step)
            if last:
                sys.setprofile(_Countdown(chance.randint(1, _TOUCHES[step.kind])))
            index = _take(step, index, place)
            diary.end()
            state = state.after(step, names)
    except BaseException:
        place.errors.write_text(traceback.format_exc(), encoding="utf-8")
        raise


class _Countdown:
    """A profiler that kills its own process, without a word, before the call of this number that touches files."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def __call__(self, frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or getattr(function, "__name__", "") not in _TOUCHING:
            return
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def _choose(chance: random.Random, state: State, names: tuple[str, ...], versions: int, *, evenly: bool) -> Step:
    inside, outside = sorted(state.versions), sorted(set(names) - set(state.versions))
    possible: dict[Kind, int] = {
        kind: 1 if evenly else often
        for kind, often in _OFTEN.items()
        if (inside or kind not in ("update", "remove"))
        and (outside or kind != "add")
        and (kind != "restore" or state.saved is not None)
    }
    (kind,) = chance.choices(list(possible), list(possible.values()))
    version = chance.randrange(versions)
    if kind == "add":
        return Step("add", chance.choice(outside), version)
    if kind == "update":
        return Step("update", chance.choice(inside), version)
    if kind == "remove":
        return Step("remove", chance.choice(inside))
    return Step(kind, version=version) if kind == "replace" else Step(kind)


def _take(step: Step, index: AdapterIndex, place: Place) -> AdapterIndex:
    """Take one step; returns the index to go on with."""
    fresh, kept = place.snapshots
    if step.kind == "add":
        index.add(place.pools / str(step.version) / step.name)
    elif step.kind == "update":
        index.update(place.pools / str(step.version) / step.name)
    elif step.kind == "remove":
        index.remove(step.name)
    elif step.kind == "search":
        index.search(["version 1 example 2"])
    elif step.kind == "rebuild":
        index.rebuild()
    elif step.kind == "compact":
        index.compact()
    elif step.kind == "snapshot":
        index.snapshot(fresh)
        shutil.rmtree(kept, ignore_errors=True)
        fresh.rename(kept)
    else:
        return _replace(step, index, place)
    return index


def _replace(step: Step, index: AdapterIndex, place: Place) -> AdapterIndex:
    copies = index.catalog.settings.copies
    index.close()
    if step.kind == "restore":
        AdapterIndex.restore(place.snapshots[1], place.index)
        return AdapterIndex.open(place.index, embedder=word_encoder())
    source = place.pools / str(step.version)
    return AdapterIndex.build(source, place.index, embedder=word_encoder(), copy=copies, overwrite=True)
