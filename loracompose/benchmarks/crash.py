"""Does an index survive being killed? A process that changes one at random is killed, again and again.

After each kill the index must open, be sound but for leftovers, and hold exactly what was acknowledged: every record
whose step was acknowledged, in its version and with its embeddings, none of a step that never began, and of the one
step that was in flight either all or nothing. At the end `repair` must leave nothing to complain about.
"""

from __future__ import annotations

import multiprocessing
import platform
import random
import shutil
import signal
import sqlite3
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np

import loracompose
from loracompose.benchmarks import victim
from loracompose.benchmarks.journal import KINDS, Record, State, Step, read_journal
from loracompose.benchmarks.material import word_encoder, write_pools
from loracompose.benchmarks.victim import Place
from loracompose.retrieval.cards import Card
from loracompose.retrieval.embedding import features
from loracompose.retrieval.index import AdapterIndex

NAMES = tuple(f"adapter{i}" for i in range(8))
VERSIONS = 3
_LONGEST = 3.0  # seconds until a kill by the clock
_STEPS = 5  # before the one in which a kill by the call comes, at most
_PATIENCE = 120.0  # seconds for a process to begin or to die


@dataclass(frozen=True)
class CrashReport:
    """What a crash test did and found.

    `acknowledged` counts steps by kind; `in_flight` the steps that were under way when the kill came, and `survived`
    those of them that took effect nevertheless. `failures` is empty if every index was whole.
    """

    kills: int
    by_clock: int
    seed: int
    operations: int
    acknowledged: Mapping[str, int]
    in_flight: Mapping[str, int]
    survived: Mapping[str, int]
    leftovers: int
    failures: tuple[str, ...]
    seconds: float
    machine: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        return asdict(self)


def crash_test(
    kills: int = 200, seed: int = 0, *, by_clock: float = 0.5, tick: Callable[[], None] = lambda: None
) -> CrashReport:
    """Kill so often, and look after each kill; ends at the first failure.

    Args:
        kills: how often.
        seed: decides the steps and the kills by the call; where one by the clock lands, the machine decides.
        by_clock: share of the kills that come after a random time, anywhere, also in the middle of a system call. The
            others come before a random call into the system or SQLite, evenly over all kinds of steps; with 0, the
            same seed gives the same steps and kills again.
        tick: called after each kill.

    Raises:
        ValueError: `kills` is below 1 or `by_clock` not between 0 and 1.
        OSError: this system knows no SIGKILL, or no fork.
    """
    if kills < 1 or not 0 <= by_clock <= 1:
        raise ValueError(f"kills must be at least 1 and by_clock between 0 and 1, got {kills} and {by_clock}")
    if "forkserver" not in multiprocessing.get_all_start_methods():
        raise OSError("the crash test needs a system with fork and SIGKILL, such as Linux")
    with tempfile.TemporaryDirectory(prefix="crash-") as root:
        return _Ordeal(Place(Path(root)), seed, by_clock).run(kills, tick)


class _Ordeal:
    """One crash test under way."""

    def __init__(self, place: Place, seed: int, by_clock: float) -> None:
        self._place = place
        self._seed = seed
        self._chance = random.Random(seed)
        self._by_clock = by_clock
        self._cards = write_pools(place.pools, NAMES, VERSIONS)
        # The server imports the library once, in a process of one thread; each victim is forked from it.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["__main__", *victim.USED])
        self._acknowledged, self._in_flight, self._survived = Counter[str](), Counter[str](), Counter[str]()
        self._leftovers = 0

    def run(self, kills: int, tick: Callable[[], None]) -> CrashReport:
        began = time.perf_counter()
        AdapterIndex.build(self._place.pools / "0", self._place.index, embedder=word_encoder(), copy=True).close()
        state, done, clocked = State(dict.fromkeys(NAMES, 0)), 0, 0
        failures: list[str] = []
        while done < kills and not failures:
            clock = self._chance.random() < self._by_clock
            clocked += clock
            journal = self._place.root / f"journal-{done}"
            failures += self._kill_one(journal, state, clock, f"{self._seed} {done}")
            record = read_journal(journal)
            journal.unlink(missing_ok=True)
            state, found = self._settle(record, state)
            failures += found
            done += 1
            tick()
        failures += [] if failures else _mended(self._place)
        return CrashReport(
            kills=done,
            by_clock=clocked,
            seed=self._seed,
            operations=sum(self._acknowledged.values()) + sum(self._in_flight.values()),
            acknowledged=_in_order(self._acknowledged),
            in_flight=_in_order(self._in_flight),
            survived=_in_order(self._survived),
            leftovers=self._leftovers,
            failures=tuple(failures),
            seconds=round(time.perf_counter() - began, 1),
            machine=_machine(),
        )

    def _kill_one(self, journal: Path, state: State, clock: bool, seed: str) -> list[str]:
        """Start a victim and see it die; returns what is wrong with the way it died."""
        fatal = None if clock else self._chance.randint(0, _STEPS)
        delay = self._chance.uniform(0, _LONGEST)
        ours, theirs = self._context.Pipe(duplex=False)
        arguments = (self._place, journal, state, NAMES, VERSIONS, seed, fatal, theirs)
        process = self._context.Process(target=victim.change_without_end, args=arguments, daemon=True)
        process.start()
        theirs.close()
        if not ours.poll(_PATIENCE):
            process.kill()
        if clock:
            time.sleep(delay)
            process.kill()
        process.join(_PATIENCE)
        ours.close()
        return self._wrong(process)

    def _wrong(self, process: BaseProcess) -> list[str]:
        if process.exitcode == -signal.SIGKILL:
            return []
        process.kill()
        told = self._place.errors.read_text(encoding="utf-8") if self._place.errors.exists() else "it said nothing"
        return [f"the process ended by itself, with {process.exitcode}: {told}"]

    def _settle(self, record: Record, before: State) -> tuple[State, list[str]]:
        """The state the index is in after a kill, and what is wrong with it."""
        state = before
        for step in record.acknowledged:
            state = state.after(step, NAMES)
            self._acknowledged[step.kind] += 1
        possible = [state]
        if record.in_flight is not None:
            self._in_flight[record.in_flight.kind] += 1
            possible.append(state.after(record.in_flight, NAMES))
        held, failures = self._look(possible)
        if record.in_flight is not None:
            if held.versions != state.versions:
                self._survived[record.in_flight.kind] += 1
            held = replace(held, saved=self._saved(record.in_flight, state))
        return held, failures

    def _look(self, possible: list[State]) -> tuple[State, list[str]]:
        try:
            with AdapterIndex.open(self._place.index, embedder=word_encoder()) as index:
                problems = index.verify().problems
                self._leftovers += sum(problem.kind == "leftover" for problem in problems)
                failures = [f"{p.adapter}: {p.what}" for p in problems if p.kind != "leftover"]
                failures += _wrong_embeddings(index)
                held = {card.name: card for card in index.cards}
                index.search(["version 1 example 2"])
        except Exception as error:  # whatever it is: an index that cannot be used is the failure looked for
            return possible[0], [f"{type(error).__name__}: {error}"]
        fitting = [state for state in possible if held == self._expected(state)]
        if not fitting:
            wanted = " or ".join(str(dict(state.versions)) for state in possible)
            told = {name: card.description for name, card in held.items()}
            return possible[0], [*failures, f"the index holds {told}, expected {wanted}"]
        return fitting[0], failures

    def _expected(self, state: State) -> dict[str, Card]:
        return {name: self._cards[name, number] for name, number in state.versions.items()}

    def _saved(self, in_flight: Step, state: State) -> Mapping[str, int] | None:
        """What the last snapshot holds; one that was being replaced is given up."""
        if in_flight.kind != "snapshot":
            return state.saved
        for folder in self._place.snapshots:
            shutil.rmtree(folder, ignore_errors=True)
        return None


def _wrong_embeddings(index: AdapterIndex) -> list[str]:
    settings = index.catalog.settings
    return [
        f"{entry.card.name}: its embeddings are not those of its examples"
        for entry in index.catalog.entries()
        if not np.allclose(
            index.catalog.embeddings(entry.id), features(index.embedder, entry.card.examples, settings), atol=1e-6
        )
    ]


def _mended(place: Place) -> list[str]:
    """What a repair at the end leaves, or a build that begins again does."""
    with AdapterIndex.open(place.index, embedder=word_encoder()) as index:
        failures = [f"not mended: {problem.what}" for problem in index.repair().remaining]
    AdapterIndex.build(place.pools / "0", place.index, embedder=word_encoder(), overwrite=True).close()
    hidden = [path.name for path in place.root.glob(f".{place.index.name}.*")]
    return failures + [f"left beside the index: {name}" for name in hidden]


def _in_order(counts: Counter[str]) -> dict[str, int]:
    return {kind: counts[kind] for kind in KINDS}


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "sqlite": sqlite3.sqlite_version,
        "loracompose": loracompose.__version__,
        **{package: version(package) for package in ("torch", "faiss-cpu", "numpy", "safetensors")},
    }
