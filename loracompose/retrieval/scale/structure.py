"""The faiss structure of a version, and how wide it looks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

_FAISS: Any = faiss  # its stubs know the constructors of C++, not those of Python

Singles = NDArray[np.float32]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Breadth:
    """How wide a structure looks: lists or graph nodes visited, candidates wanted, and how many more it weighs."""

    probes: int
    candidates: int
    factor: float = 1.0

    def at_least(self, candidates: int) -> Breadth:
        """Wider, in proportion, so that there are this many candidates."""
        times = -(-max(candidates, self.candidates) // max(self.candidates, 1))
        return Breadth(times * self.probes, max(candidates, self.candidates), self.factor)

    def doubled(self) -> Breadth:
        """Twice as wide."""
        return Breadth(2 * self.probes, 2 * self.candidates, self.factor)


@dataclass(frozen=True, eq=False)
class Structure:
    """A faiss index over the reduced vectors of a version, row i being adapter i, and how wide it looks."""

    spec: str
    index: Any
    breadth: Breadth

    def near(self, queries: Singles, breadth: Breadth | None = None) -> tuple[Rows, Singles]:
        """Rows of candidates, (n, candidates), and squared distances; row -1 where there are no more."""
        wanted = self.breadth if breadth is None else breadth
        count = min(wanted.candidates, self.index.ntotal)
        if not count:
            return np.zeros((len(queries), 0), dtype=np.int64), np.zeros((len(queries), 0), dtype=np.float32)
        options = self._usual if wanted is self.breadth else _parameters(self.spec, wanted)
        distances, rows = self.index.search(queries, count, params=options)
        return rows, distances

    @cached_property
    def _usual(self) -> Any:
        return _parameters(self.spec, self.breadth)  # to make them takes a fifth of a search


def write_structure(structure: Structure, path: Path) -> None:
    """Write the faiss index to a file, durably."""
    faiss.write_index(structure.index, str(path))
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_structure(spec: str, path: Path, breadth: Breadth) -> Structure:
    """A structure from the file of its faiss index; only of a file that we wrote."""
    try:
        return Structure(spec, faiss.read_index(str(path)), breadth)
    except RuntimeError as error:  # which faiss raises for a missing file as well
        if not path.exists():
            raise FileNotFoundError(f"{path} is gone") from error
        raise


def _parameters(spec: str, breadth: Breadth) -> Any:
    if spec == "Flat":
        return None
    if spec.startswith("HNSW"):
        return _FAISS.SearchParametersHNSW(efSearch=max(breadth.probes, breadth.candidates))
    inner = _FAISS.SearchParametersIVF(nprobe=breadth.probes)
    if "Refine" not in spec:
        return inner
    return _FAISS.IndexRefineSearchParameters(k_factor=float(breadth.factor), base_index_params=inner)
