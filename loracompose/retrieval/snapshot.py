"""One generation of an index in memory: what a search reads, derived from the catalog in one go.

Adding and removing only change the catalog; the snapshot, its faiss file and what is fitted on the examples follow
with the next search. The statistics of the discriminant are brought up to date by what came and what went; what is
chosen by holding out examples is kept while the pool is nearly the same (`fit_note.py`). The faiss file belongs to a
generation by a sha256 that the catalog keeps for that generation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from loracompose.durable import whole_file
from loracompose.retrieval.cards import Card
from loracompose.retrieval.catalog import Catalog, Entry, Settings
from loracompose.retrieval.centres import Centres
from loracompose.retrieval.discriminant import Spectrum, Statistics
from loracompose.retrieval.embedding import edges, representation, whole
from loracompose.retrieval.fit_note import FitNote
from loracompose.retrieval.fitting import Fitted, Shaped, Spectra, fit, present_hybrid
from loracompose.retrieval.hybrid import Hybrid
from loracompose.retrieval.lexicon import Keys, Lexicon, read_profile
from loracompose.retrieval.scoring import Scoring
from loracompose.retrieval.shape import SHAPE_WIDTH, shapes

VECTORS_KEY, FITTED_KEY = "vectors", "fitted"


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The adapters of one generation, and all that searches derive from them.

    `vectors` is a faiss.IndexFlatIP whose row i represents entries[i]; `examples[i]` are the stored embeddings of its
    examples, (examples, width). `centres` are the kinds of prompt of the adapters; `statistics`, of whole prompts, of
    their edges and of their shapes, and `hybrid` are of these, `vectors` and `fitted` of whole adapters.
    """

    generation: int
    settings: Settings
    entries: tuple[Entry, ...]
    vectors: Any
    examples: tuple[NDArray[np.float32], ...]
    centres: Centres
    statistics: tuple[Statistics, Statistics, Statistics]
    hybrid: Hybrid
    fitted: Fitted

    def fits(self, scoring: Scoring, features: NDArray[np.float32], prompts: Sequence[str]) -> NDArray[np.float64]:
        """How well prompts and their features, (batch, width), fit each adapter, (batch, N).

        Softmax is p(adapter | prompt), the sum over the adapter's kinds. `scoring` is "hybrid" or "discriminant".
        """
        hybrid = scoring == "hybrid"
        fits = self.hybrid.fits(features, prompts) if hybrid else self.hybrid.discriminant.fits(whole(features))
        return self.centres.joined(fits)

    def typicality(self, scoring: Scoring, fits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Conformal p-values, (batch,), of the best fits of prompts: the share of the examples that fit no better.

        Each example is counted as it fits when it is held out, and the prompt itself as one more. Of prompts like the
        examples at most a share alpha has a value of alpha or less.
        """
        known = np.asarray(self.fitted.calibration[scoring])
        return np.asarray((1 + np.searchsorted(known, fits, side="right")) / (1 + len(known)))

    def temperature(self, scoring: Scoring) -> float:
        """The temperature at which the scores of this scoring fit the examples."""
        return self.fitted.mean_temperature if scoring == "mean" else 1.0

    @cached_property
    def cards(self) -> tuple[Card, ...]:
        """Cards in index order."""
        return tuple(entry.card for entry in self.entries)

    @cached_property
    def rows(self) -> Mapping[str, int]:
        """Row of each name."""
        return {card.name: row for row, card in enumerate(self.cards)}


def take_snapshot(catalog: Catalog, file: Path, previous: Snapshot | None = None) -> Snapshot:
    """The catalog's present generation; writes the faiss file where it is missing, stale or damaged.

    Args:
        catalog: the truth.
        file: the faiss file.
        previous: an earlier snapshot; what it shares with this one is not read again.
    """
    with catalog.reading():
        generation, settings = catalog.generation, catalog.settings
        if previous is not None and previous.settings.epoch != settings.epoch:
            previous = None
        entries = _entries(catalog, previous)
        examples = _examples(catalog, entries, previous)
        vectors = read_vectors(file, catalog.noted(VECTORS_KEY, generation), len(entries), settings.dimension)
        present, last = catalog.noted(FITTED_KEY, generation), catalog.last_noted(FITTED_KEY)
    if vectors is None:
        vectors = faiss.IndexFlatIP(settings.dimension)
        vectors.add(_matrix(entries, examples, settings, previous))
        _keep_vectors(catalog, generation, file, vectors)
    centres = Centres.of([entry.card for entry in entries])
    statistics = _statistics(entries, examples, settings, previous)
    lexicon = _lexicon(entries, centres, previous)
    note = None if last is None else FitNote.read(last)
    ids = [entry.id for entry in entries]
    if note is None or not note.serves(ids, settings.epoch):
        note = FitNote.of(_fit(vectors, entries, examples, centres, statistics, lexicon), ids, settings.epoch)
    if present is None:
        catalog.note(FITTED_KEY, generation, note.text())
    hybrid = present_hybrid(statistics, lexicon, note.fitted)
    return Snapshot(generation, settings, entries, vectors, examples, centres, statistics, hybrid, note.fitted)


def _fit(
    vectors: Any,
    entries: Sequence[Entry],
    examples: Sequence[NDArray[np.float32]],
    centres: Centres,
    statistics: Sequence[Statistics],
    lexicon: Lexicon,
) -> Fitted:
    first, second, third = map(Spectrum.of, statistics)
    shaped = Shaped(third, centres.split([entry.card.examples for entry in entries]))
    return fit(all_vectors(vectors), examples, Spectra(first, second), lexicon, shaped, centres)


def all_vectors(vectors: Any) -> NDArray[np.float32]:
    """All rows of a faiss index, (N, dimension)."""
    rows: NDArray[np.float32] = vectors.reconstruct_n(0, vectors.ntotal)
    return rows


def read_vectors(file: Path, digest: str | None, count: int, dimension: int) -> Any | None:
    """The faiss index in the file, None unless it is the one that the catalog's digest stands for."""
    if digest is None or not file.is_file():
        return None
    content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != digest:  # never parse what we did not write
        return None
    vectors = faiss.deserialize_index(np.frombuffer(content, dtype=np.uint8))
    return vectors if (vectors.ntotal, vectors.d) == (count, dimension) else None


def _keep_vectors(catalog: Catalog, generation: int, file: Path, vectors: Any) -> None:
    if not catalog.writable:
        return
    with catalog.writing():  # so that nobody takes the file aside for a leftover, nor writes over a later generation's
        if catalog.generation == generation:
            catalog.note(VECTORS_KEY, generation, _write_vectors(file, vectors))


def _write_vectors(file: Path, vectors: Any) -> str:
    content = faiss.serialize_index(vectors).tobytes()
    with whole_file(file) as out:
        out.write(content)
    return hashlib.sha256(content).hexdigest()


def _entries(catalog: Catalog, previous: Snapshot | None) -> tuple[Entry, ...]:
    known = {} if previous is None else {entry.id: entry for entry in previous.entries}
    ids = catalog.ids()
    fresh = {entry.id: entry for entry in catalog.entries([id for id in ids if id not in known])}
    return tuple(known.get(id) or fresh[id] for id in ids)


def _examples(
    catalog: Catalog, entries: tuple[Entry, ...], previous: Snapshot | None
) -> tuple[NDArray[np.float32], ...]:
    """Embeddings of each entry's examples, each (examples, width)."""
    known: dict[int, NDArray[np.float32]] = {}
    if previous is not None:
        known = {entry.id: group for entry, group in zip(previous.entries, previous.examples, strict=True)}
    return tuple(known[entry.id] if entry.id in known else catalog.embeddings(entry.id) for entry in entries)


def _matrix(
    entries: tuple[Entry, ...],
    examples: tuple[NDArray[np.float32], ...],
    settings: Settings,
    previous: Snapshot | None,
) -> NDArray[np.float32]:
    """Representations of the entries, (N, dimension)."""
    known: dict[int, NDArray[np.float32]] = {}
    if previous is not None:
        old = all_vectors(previous.vectors)
        known = {entry.id: old[row] for row, entry in enumerate(previous.entries)}
    matrix = np.empty((len(entries), settings.dimension), dtype=np.float32)
    for row, (entry, group) in enumerate(zip(entries, examples, strict=True)):
        vector = known.get(entry.id)
        matrix[row] = representation(group, entry.card.name) if vector is None else vector
    return matrix


def _statistics(
    entries: tuple[Entry, ...],
    examples: tuple[NDArray[np.float32], ...],
    settings: Settings,
    previous: Snapshot | None,
) -> tuple[Statistics, Statistics, Statistics]:
    """The previous statistics without the centres of what has gone and with those of what has come, at the end."""
    known = previous.entries if previous is not None else ()
    nothing = Statistics.of((), settings.width // 2)
    before = previous.statistics if previous is not None else (nothing, nothing, Statistics.of((), SHAPE_WIDTH))
    present, past = {entry.id for entry in entries}, {entry.id for entry in known}
    gone = [row for row, entry in enumerate(known) if entry.id not in present]
    come = [row for row, entry in enumerate(entries) if entry.id not in past]
    left, left_texts = _of_centres(known, previous.examples if previous is not None else (), gone)
    new, new_texts = _of_centres(entries, examples, come)
    columns = np.flatnonzero(np.isin(previous.centres.owner, gone)).tolist() if previous is not None else []
    first, second = (
        old.removing(columns, [half(group) for group in left]).adding([half(group) for group in new])
        for old, half in zip(before[:2], (whole, edges), strict=True)
    )
    without = before[2].removing(columns, [shapes(texts) for texts in left_texts])
    return first, second, without.adding([shapes(texts) for texts in new_texts])


def _of_centres(
    entries: Sequence[Entry], examples: Sequence[NDArray[np.float32]], rows: Sequence[int]
) -> tuple[list[NDArray[np.float32]], list[tuple[str, ...]]]:
    """Features and texts of the examples of each centre of the entries in these rows."""
    cards = [entries[row].card for row in rows]
    centres = Centres.of(cards)
    return centres.split([examples[row] for row in rows]), centres.split([card.examples for card in cards])


def _lexicon(entries: tuple[Entry, ...], centres: Centres, previous: Snapshot | None) -> Lexicon:
    known: dict[tuple[int, str], tuple[Keys, ...]] = {}
    if previous is not None:
        before = _named(previous.entries, previous.centres)
        known = dict(zip(before, previous.hybrid.lexicon.profiles, strict=True))
    texts = centres.split([entry.card.examples for entry in entries])
    places = zip(_named(entries, centres), texts, strict=True)
    return Lexicon(tuple(known.get(place) or read_profile(group) for place, group in places))


def _named(entries: Sequence[Entry], centres: Centres) -> Iterator[tuple[int, str]]:
    """Row id and kind of each centre: what its examples are known by."""
    return ((entries[row].id, kind) for row, kind in zip(centres.owner.tolist(), centres.kinds, strict=True))
