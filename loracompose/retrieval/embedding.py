"""Embedders: from texts to unit vectors. A sentence-transformers model by name, or any callable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from inspect import getattr_static
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.segments import closing, opening
from loracompose.retrieval.tables import Settings

INSTRUCTION = "Represent the sentence for similar task retrieval: "
"""What is put before example prompts and searched prompts alike (Zhao et al., LoraRetriever, arXiv:2402.09997)."""

ON_CPU, ELSEWHERE = 8, 32  # texts per forward pass
DTYPES = ("float32", "bfloat16", "float16")


class Embedder(Protocol):
    """Turns texts into vectors. `name` and `revision` together say which function it is, now and next year."""

    @property
    def name(self) -> str:
        """Name of the encoder."""

    @property
    def revision(self) -> str:
        """Version of the encoder: equal name and revision mean equal vectors."""

    @property
    def dimension(self) -> int:
        """Length of a vector."""

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of the texts, (len(texts), dimension); any norm but zero."""


class SentenceTransformerEmbedder:
    """A sentence-transformers model by name or path, loaded on first use.

    Several threads may call it; they take turns, since a fast tokenizer cannot serve two at once.

    In bfloat16 it is about twice as fast on a CPU that has it, and its vectors are slightly others. So
    the dtype is part of the name, and an index stays with the one that it was embedded with.

    Args:
        name: a Hub name or a folder; None is the default encoder of this package. `NAME:bfloat16` and `NAME:float16`
            run it in that dtype, and `:bfloat16` the default one.
        device: where it runs.
        batch_size: texts per forward pass; 8 on a CPU and 32 elsewhere if None. Texts of a pass are filled up to its
            longest, which a CPU pays for, and the texts of one search are few and of unlike length.

    Raises:
        ValueError: the batch size is not positive, or what follows the name's colon is no such dtype.
    """

    def __init__(self, name: str | None = None, *, device: str = "cpu", batch_size: int | None = None) -> None:
        if batch_size is None:
            batch_size = ON_CPU if device == "cpu" else ELSEWHERE
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._encoder, self.dtype = _named(name or "")
        self.name = self._encoder if self.dtype == "float32" else f"{self._encoder}:{self.dtype}"
        self.device = device
        self.batch_size = batch_size
        self._turn = threading.RLock()

    def __repr__(self) -> str:
        return f"SentenceTransformerEmbedder({self.name!r}, device={self.device!r}, batch_size={self.batch_size})"

    @cached_property
    def revision(self) -> str:
        """Revision of the encoder's files; loads the model only if they are not on this machine yet."""
        from loracompose.encoders import encoder_revision

        try:
            return encoder_revision(self._encoder)
        except LookupError:  # a Hub name: loading fetches it, or says what to install
            with self._turn:
                _ = self._model
            return encoder_revision(self._encoder)

    @cached_property
    def dimension(self) -> int:
        """Length of a vector; loads the model."""
        return int(self(["dimension"]).shape[1])

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of the texts, (len(texts), dimension)."""
        with self._turn:
            vectors = self._model.encode(
                list(texts), batch_size=self.batch_size, convert_to_numpy=True, show_progress_bar=False
            )
        return np.asarray(vectors, dtype=np.float32)

    @cached_property
    def _model(self) -> Any:
        from loracompose.encoders import load_encoder  # here, for it takes seconds and not every use of an index embeds

        return load_encoder(self._encoder, self.device, self.dtype)


def _named(name: str) -> tuple[str, str]:
    """An encoder and its dtype, of a name that may end with one."""
    from loracompose.locating import DEFAULT_ENCODER  # here, as what reads an index needs no model hub

    encoder, colon, dtype = name.rpartition(":")
    if not colon or "/" in dtype or "\\" in dtype or Path(name).exists():  # a folder's name may have a colon
        return name or DEFAULT_ENCODER, "float32"
    if dtype not in DTYPES:
        raise ValueError(f"encoder {name!r} ends with {dtype!r}, expected a dtype: {', '.join(DTYPES)}, or no colon")
    return encoder or DEFAULT_ENCODER, dtype


class CallableEmbedder:
    """Any function from a list of texts to a (len(texts), dimension) array, under a name of your choice.

    Args:
        function: the function.
        name: what the index stores and checks on opening.
        revision: change it whenever the function's vectors change.
    """

    def __init__(self, function: Callable[[list[str]], Any], name: str, revision: str = "") -> None:
        if not name:
            raise ValueError("an embedder needs a name: the index stores it and checks it on opening")
        self.function = function
        self.name = name
        self.revision = revision

    def __repr__(self) -> str:
        return f"CallableEmbedder({self.function!r}, {self.name!r}, {self.revision!r})"

    @cached_property
    def dimension(self) -> int:
        """Length of a vector; found by one call."""
        return int(unit_vectors(self, ["dimension"]).shape[1])

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of the texts, (len(texts), dimension)."""
        return np.asarray(self.function(list(texts)), dtype=np.float32)


def as_embedder(given: Embedder | str | None) -> Embedder:
    """The embedder itself, or the sentence-transformers model of that name; None is the default encoder.

    Raises:
        ValueError: it is neither; a bare function has no name that could be checked on opening.
    """
    if given is None or isinstance(given, str):
        return SentenceTransformerEmbedder(given)
    # Statically: reading `revision` or `dimension` would load the model.
    missing = [part for part in ("name", "revision", "dimension") if getattr_static(given, part, None) is None]
    if not callable(given) or missing:
        raise ValueError(
            f"embedder {given!r} has no {', '.join(missing) or '__call__'}; wrap a function as "
            "CallableEmbedder(function, name), or give the name of a sentence-transformers model"
        )
    return given


def unit_vectors(embedder: Embedder, texts: Sequence[str], dimension: int | None = None) -> NDArray[np.float32]:
    """Checked unit vectors of the texts, (len(texts), dimension); each distinct text is embedded once.

    Raises:
        ValueError: the embedder returned another shape, a value that is not finite, or a zero vector.
    """
    distinct = list(dict.fromkeys(texts))
    vectors = np.asarray(embedder(distinct), dtype=np.float32)
    if vectors.ndim != 2 or len(vectors) != len(distinct) or vectors.shape[1] != (dimension or vectors.shape[1]):
        raise ValueError(
            f"embedder {embedder.name!r} returned shape {vectors.shape} for {len(distinct)} texts, "
            f"expected ({len(distinct)}, {dimension or 'dimension'})"
        )
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)  # (distinct, 1)
    broken = ~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)
    if broken.any():
        text = distinct[int(np.argmax(broken))]
        raise ValueError(f"embedder {embedder.name!r} returned a zero or non-finite vector for {text[:80]!r}")
    unit: NDArray[np.float32] = vectors / norms
    if len(distinct) == len(texts):
        return unit
    place = {text: row for row, text in enumerate(distinct)}
    return unit[[place[text] for text in texts]]


def features(embedder: Embedder, texts: Sequence[str], settings: Settings) -> NDArray[np.float32]:
    """What is kept of each text: four unit vectors side by side, (len(texts), width).

    Of the text, of the text under the instruction, of its opening and of its closing (`segments.py`).

    Raises:
        ValueError: the embedder misbehaves, see `unit_vectors`.
    """
    views = [*texts, *(settings.instruction + text for text in texts), *map(opening, texts), *map(closing, texts)]
    vectors, count = unit_vectors(embedder, views, settings.dimension), len(texts)
    return np.concatenate([vectors[part * count : (part + 1) * count] for part in range(4)], axis=1)


def whole(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The half of the features that was embedded of whole texts, with and without instruction, (texts, width / 2)."""
    return features[:, : features.shape[1] // 2]


def edges(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The half of the features that was embedded of openings and closings, (texts, width / 2)."""
    return features[:, features.shape[1] // 2 :]


def instructed(features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The quarter of the features that was embedded under the instruction, (texts, dimension)."""
    dimension = features.shape[1] // 4
    return features[:, dimension : 2 * dimension]


def representation(examples: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """The vector that stands for an adapter, (dimension,): the renormalised mean of its instructed examples.

    Raises:
        ValueError: the examples cancel out.
    """
    mean = instructed(examples).mean(axis=0, dtype=np.float64)
    norm = float(np.linalg.norm(mean))
    if not norm > 1e-6:
        raise ValueError(
            f"{name}: the embeddings of its examples are not finite or cancel out (mean of norm {norm:.1e}); "
            "give other examples, or embed again with AdapterIndex.open(folder, reembed=True)"
        )
    unit: NDArray[np.float32] = (mean / norm).astype(np.float32)
    return unit


def check_encoder(settings: Settings, embedder: Embedder) -> None:
    """Refuse an embedder that is not the one an index was embedded with.

    Raises:
        ValueError: its name or its revision differs from the stored one.
    """
    stored, given = (settings.encoder, settings.revision), (embedder.name, embedder.revision)
    if stored != given:
        raise ValueError(
            f"the index was embedded with {stored[0]!r} (revision {stored[1]!r}), this embedder is {given[0]!r} "
            f"(revision {given[1]!r}); their vectors do not compare. Pass the encoder it was embedded with, or "
            "embed everything anew: AdapterIndex.open(folder, embedder=..., reembed=True)"
        )
