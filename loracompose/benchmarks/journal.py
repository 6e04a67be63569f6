"""What a process says it is about to do to an index, and what it says it has done: written at once, read after it died.

The journal is the witness of a crash: a step whose end is written was acknowledged and must have taken effect; one
whose begin alone is written was in flight, and may have taken effect or not, but not halfway.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

Kind = Literal["add", "update", "remove", "search", "rebuild", "compact", "replace", "snapshot", "restore"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Step:
    """One use of an index: what is done, to which adapter, in which version of it.

    "replace" builds a whole index anew from all adapters of one version; "restore" goes back to the last snapshot.
    """

    kind: Kind
    name: str = ""
    version: int = 0


@dataclass(frozen=True)
class State:
    """What an index must hold: the version of each adapter; and what its last snapshot holds, if there is one."""

    versions: Mapping[str, int] = field(default_factory=dict)
    saved: Mapping[str, int] | None = None

    def after(self, step: Step, names: tuple[str, ...]) -> State:
        """The state that a step leads to; `names` are all adapters that a new index is built from."""
        versions = dict(self.versions)
        if step.kind in ("add", "update"):
            versions[step.name] = step.version
        elif step.kind == "remove":
            del versions[step.name]
        elif step.kind == "replace":
            versions = dict.fromkeys(names, step.version)
        elif step.kind == "snapshot":
            return replace(self, saved=versions)
        elif step.kind == "restore":
            versions = dict(self.saved or {})
        return replace(self, versions=versions)


@dataclass(frozen=True)
class Record:
    """What a journal tells: the steps that were acknowledged, in order, and the one that was in flight, if any."""

    acknowledged: tuple[Step, ...]
    in_flight: Step | None


class Journal:
    """A journal to write. A line reaches the system before the call returns, so a killed process leaves whole lines."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def begin(self, step: Step) -> None:
        """Say what is done next."""
        self._write({"begin": asdict(step)})

    def end(self) -> None:
        """Acknowledge it."""
        self._write({"end": True})

    def _write(self, line: object) -> None:
        os.write(self._descriptor, json.dumps(line).encode() + b"\n")


def read_journal(path: Path) -> Record:
    """The steps of a journal; there is none if the process died before its first step."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    done: list[Step] = []
    under_way: Step | None = None
    for line in map(json.loads, lines):
        if "begin" in line:
            under_way = Step(**line["begin"])
        elif under_way is not None:
            done.append(under_way)
            under_way = None
    return Record(tuple(done), under_way)
