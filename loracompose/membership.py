"""Which adapters answer each prompt and with what weight: from retrieval, or given by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.retrieval.result import Retrieval

AdapterRef: TypeAlias = str | Path | Adapter
AdapterSet: TypeAlias = Sequence[AdapterRef] | Mapping[Any, float]  # keys are AdapterRef


@dataclass(frozen=True)
class Member:
    """One adapter of one row: an index name, a folder or an adapter, its weight, and its score if retrieved."""

    ref: AdapterRef
    weight: float
    score: float | None = None


Row: TypeAlias = tuple[Member, ...]


def from_retrieval(found: Retrieval) -> list[Row]:
    """A row of members per prompt, everything that was retrieved for it included."""
    rows = []
    for scores, weights in zip(found.scores.tolist(), found.weights.tolist(), strict=True):
        hits = [
            Member(card.name, weight, score)
            for card, score, weight in zip(found.cards, scores, weights, strict=True)
            if score != -math.inf
        ]
        rows.append(tuple(hits))
    return rows


def from_hand(sets: Sequence[AdapterSet], n_prompts: int) -> list[Row]:
    """A row of members per prompt: `["a", "b"]` means 1/2 each, `{"a": 0.7}` says it, `[]` is the base model.

    Raises:
        ValueError: not one set per prompt, a set that is a bare string, or a weight that is not finite.
    """
    if isinstance(sets, str | Mapping) or len(sets) != n_prompts:
        got = type(sets).__name__ if isinstance(sets, str | Mapping) else f"{len(sets)} sets"
        raise ValueError(f'adapters holds one set per prompt: expected {n_prompts} sets such as ["a", "b"], got {got}')
    return [parse_set(given, i) for i, given in enumerate(sets)]


def parse_set(given: AdapterSet, place: int) -> Row:
    """One set as members; an adapter named twice gets the sum of its weights."""
    if isinstance(given, str | Path | Adapter):
        raise ValueError(f"adapters[{place}] must be a list or a mapping of adapters, got {given!r}; write [{given!r}]")
    if isinstance(given, Mapping):
        pairs: list[tuple[AdapterRef, float]] = [(ref, float(weight)) for ref, weight in given.items()]
    else:
        pairs = [(ref, 1 / len(given)) for ref in given]
    for ref, weight in pairs:
        if not math.isfinite(weight):
            raise ValueError(f"adapters[{place}]: the weight of {ref!r} must be a finite number, got {weight}")
    return tuple(Member(ref, weight) for ref, weight in pairs)


def weight_matrix(rows: Sequence[Row], column: Mapping[AdapterRef, int], n_adapters: int) -> Tensor:
    """The rows' weights over K adapters, (batch, K) float32; several mentions of one adapter add up."""
    weights = torch.zeros(len(rows), n_adapters)
    for i, row in enumerate(rows):
        for member in row:
            weights[i, column[member.ref]] += member.weight
    return weights
