"""Adapters and an encoder for benchmarks of an index itself, where what the adapters do does not matter."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from loracompose.adapters.checkpoint import save_adapter
from loracompose.adapters.folder import write_json
from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.retrieval.admission import complete
from loracompose.retrieval.cards import Card, read_card
from loracompose.retrieval.embedding import CallableEmbedder

DIMENSION = 64
_MODULE = "model.layers.0.self_attn.q_proj"
_WIDTH, _RANK, _EXAMPLES = 8, 2, 3


def hashed_words(texts: Sequence[str]) -> NDArray[np.float32]:
    """Signed counts of hashed words, (len(texts), 64): an encoder that costs nothing and is the same everywhere."""
    rows = np.zeros((len(texts), DIMENSION), dtype=np.float32)
    for row, text in zip(rows, texts, strict=True):
        row[0] = 0.01  # no text is a zero vector
        for word in text.lower().split():
            code = zlib.crc32(word.encode())
            row[code % DIMENSION] += 1 if code & DIMENSION else -1
    return rows


def word_encoder() -> CallableEmbedder:
    """`hashed_words` as an embedder."""
    return CallableEmbedder(hashed_words, "hashed-words", "1")


def write_adapter(folder: Path, seed: int) -> Card:
    """Write a tiny adapter with a card, both decided by its name and the seed; returns the complete card."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{folder.name} {seed}".encode()))
    A = torch.randn(_RANK, _WIDTH, generator=generator)
    B = torch.randn(_WIDTH, _RANK, generator=generator)
    save_adapter(Adapter(folder.name, {_MODULE: LoraFactors(A, B)}, base_model="tiny"), folder)
    examples = [f"{folder.name} version {seed} example {i}" for i in range(_EXAMPLES)]
    write_json(folder / "card.json", {"description": f"version {seed}", "examples": examples})
    return complete(read_card(folder), folder)


def write_pools(folder: Path, names: Sequence[str], versions: int) -> Mapping[tuple[str, int], Card]:
    """Write every version of every adapter as `folder/<version>/<name>`; returns their cards by name and version."""
    return {
        (name, version): write_adapter(folder / str(version) / name, version)
        for version in range(versions)
        for name in names
    }
