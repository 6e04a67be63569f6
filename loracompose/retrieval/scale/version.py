"""A version: what a large pool freezes, in files that belong to it by their sha256."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.fitting import Fitted
from loracompose.retrieval.scale.drift import Floats
from loracompose.retrieval.scale.ledger import Position, Record
from loracompose.retrieval.scale.metric import Frame
from loracompose.retrieval.scale.rows import FileWriter, HeldRows, Rows, StoredFile, file_digest, spot_digest
from loracompose.retrieval.scale.structure import Breadth, Structure, read_structure
from loracompose.retrieval.scale.wordings import Frequencies, WordingFile

MEANS, EDGES, WORDS, COUNTS, VECTORS, NUMBERS = "means", "edges", "words", "counts", "faiss", "npz"
SHAPES = "shapes"  # no file of its own: few numbers an adapter, in memory

KINDS = (MEANS, EDGES, WORDS, COUNTS, VECTORS, NUMBERS)
PATTERNS = tuple(f"version-*.{kind}" for kind in KINDS)
"""The files of versions in an index folder."""

_LOADED = (VECTORS, NUMBERS)  # read as a whole when a version is loaded; of the others parts are read later


@dataclass(frozen=True, eq=False)
class Part:
    """One of the parts (`parts.py`) of N adapters, frozen.

    `frame`; `scatter` (D, D), of the frame's freedom; `means` (N, D), centred; `squares` (N,) squared lengths of the
    whitened means.
    """

    frame: Frame
    scatter: Floats
    means: Rows | HeldRows
    squares: NDArray[np.float32]

    def arrays(self, prefix: str) -> dict[str, NDArray[Any]]:
        """What of it stands in the file of numbers."""
        frame = self.frame
        arrays: dict[str, NDArray[Any]] = {
            "centre": frame.centre,
            "whitening": frame.whitening,
            "directions": frame.directions,
            "scatter": self.scatter,
            "squares": self.squares,
        }
        return {prefix + name: array for name, array in arrays.items()}

    def notes(self) -> dict[str, float]:
        """The plain values of its frame."""
        frame = self.frame
        return {"freedom": frame.freedom, "shrinkage": frame.shrinkage, "temperature": frame.temperature}

    @classmethod
    def loaded(
        cls, prefix: str, arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, Any], means: Rows | HeldRows
    ) -> Part:
        """From the file of numbers, and its means."""
        frame = Frame(arrays[prefix + "centre"], arrays[prefix + "whitening"], arrays[prefix + "directions"], **notes)
        return cls(frame, arrays[prefix + "scatter"], means, arrays[prefix + "squares"])


@dataclass(frozen=True, eq=False)
class Version:
    """Everything frozen of the N adapters of one generation.

    `ids` (N,) their row ids, ascending; `sizes` (N,) examples of each; `parts` what is kept of whole prompts, which
    faiss searches, of their edges and of the shapes of their subjects, which rescore; `position` how far it goes.
    """

    token: str
    epoch: int
    position: Position
    ids: NDArray[np.int64]
    sizes: NDArray[np.int64]
    parts: tuple[Part, ...]
    fitted: Fitted
    frequencies: Frequencies
    structure: Structure
    words: WordingFile

    @cached_property
    def calibration(self) -> Mapping[str, NDArray[np.float64]]:
        """For each scoring the best fits of held-out examples, ascending."""
        return {scoring: np.asarray(values) for scoring, values in self.fitted.calibration.items()}


def file_of(home: Path, token: str, kind: str) -> Path:
    """Where a file of a version lies."""
    return home / f"version-{token}.{kind}"


def write_numbers(path: Path, arrays: Mapping[str, NDArray[Any]], notes: Mapping[str, Any]) -> tuple[int, str]:
    """Write arrays and notes to one file; returns its size and sha256."""
    out = io.BytesIO()
    np.savez(out, allow_pickle=False, **arrays, notes=np.frombuffer(json.dumps(notes).encode(), dtype=np.uint8))
    writer = FileWriter(path)
    writer.write(out.getbuffer())
    return writer.size, writer.close()


def recorded(home: Path, token: str, epoch: int, digests: Mapping[str, str]) -> Record:
    """The record of a version whose files are written."""
    files = {kind: file_of(home, token, kind) for kind in KINDS}
    return Record(
        token, epoch, {kind: (path.stat().st_size, spot_digest(path), digests[kind]) for kind, path in files.items()}
    )


def damage(home: Path, record: Record, *, thorough: bool) -> list[str]:
    """What is wrong with the files of a version; thorough hashes all of each, otherwise of large ones parts."""
    found = []
    for kind, (size, spots, digest) in record.files.items():
        path = file_of(home, record.token, kind)
        if not path.is_file():
            found.append(f"{path.name} is missing")
            continue
        whole = thorough or kind in _LOADED
        if path.stat().st_size != size or spot_digest(path) != spots or (whole and file_digest(path) != digest):
            found.append(f"{path.name} is damaged")
    return found


def load_version(home: Path, record: Record) -> Version:
    """A version from its files, which `damage` found sound."""
    with np.load(file_of(home, record.token, NUMBERS), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    notes = json.loads(arrays["notes"].tobytes())
    means: dict[str, Rows | HeldRows] = {
        MEANS: Rows(file_of(home, record.token, MEANS), len(arrays[MEANS + "centre"])),
        EDGES: Rows(file_of(home, record.token, EDGES), len(arrays[EDGES + "centre"])),
        SHAPES: HeldRows(arrays[SHAPES]),
    }
    words, counts = (StoredFile(file_of(home, record.token, kind)) for kind in (WORDS, COUNTS))
    return Version(
        token=record.token,
        epoch=record.epoch,
        position=Position(*notes["position"]),
        ids=arrays["ids"],
        sizes=arrays["sizes"].astype(np.int64),
        parts=tuple(
            Part.loaded(kind, arrays, note, rows)
            for (kind, rows), note in zip(means.items(), notes["parts"], strict=True)
        ),
        fitted=Fitted(**(notes["fitted"] | {"weights": tuple(notes["fitted"]["weights"])})),
        frequencies=Frequencies(arrays["keys"], arrays["counts"], notes["examples"]),
        structure=read_structure(notes["spec"], file_of(home, record.token, VECTORS), Breadth(**notes["breadth"])),
        words=WordingFile(words, counts, arrays["starts"]),
    )


def notes_of(
    position: Position, parts: Sequence[Part], fitted: Fitted, examples: int, structure: Structure
) -> dict[str, Any]:
    """The plain values of a version, as `load_version` reads them."""
    return {
        "position": list(position),
        "parts": [part.notes() for part in parts],
        "fitted": asdict(fitted),
        "examples": examples,
        "spec": structure.spec,
        "breadth": asdict(structure.breadth),
    }
