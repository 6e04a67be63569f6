"""Which adapters answer each prompt and with what weight: from retrieval, or given by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.retrieval.result import Retrieval

FLOAT32 = torch.finfo(torch.float32)

GRID = 256
"""Steps that a retrieved weight is rounded to where composing is dear: 0.4 %, what bfloat16 resolves below 1."""

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
    totals: dict[AdapterRef, float] = {}
    for ref, weight in pairs:
        if not isinstance(ref, str | Path | Adapter):
            raise TypeError(
                f"adapters[{place}]: an adapter is a name in the index, a folder or an Adapter, got {ref!r}"
            )
        check_weight(place, ref, weight)
        totals[ref] = totals.get(ref, 0.0) + weight
    for ref, weight in totals.items():
        check_weight(place, ref, weight)
    return tuple(Member(ref, weight) for ref, weight in totals.items())


def check_weight(place: int, ref: AdapterRef, weight: float) -> None:
    """Raise ValueError unless the weight is finite and, if it is not 0, neither vanishes nor overflows in float32."""
    size = abs(weight)
    if not math.isfinite(weight) or (size and not FLOAT32.tiny <= size <= FLOAT32.max):
        raise ValueError(
            f"adapters[{place}]: the weight of {ref!r} must be 0 or a finite number of magnitude "
            f"{FLOAT32.tiny:.0e} to {FLOAT32.max:.0e}, got {weight}"
        )


def rounded(rows: Sequence[Row]) -> list[Row]:
    """The rows with retrieved weights on a grid of 256 steps, rows of sum 1 again; weights given by hand stay.

    Two prompts of a kind hardly ever get equal posteriors, and what retrieval knows of a weight does not reach so far;
    on the grid their sets become equal, so that one composition answers both. Equal weights stay equal; a member
    whose weight rounds to 0 is none. A row of more than 64 members is left alone.
    """
    return [_rounded(row) for row in rows]


def _rounded(row: Row) -> Row:
    steps = [round(member.weight * GRID) for member in row]
    if len(row) > GRID // 4 or not any(steps) or any(member.score is None for member in row):
        return row
    return tuple(replace(member, weight=step / sum(steps)) for member, step in zip(row, steps, strict=True))


def weight_matrix(rows: Sequence[Row], column: Mapping[AdapterRef, int], n_adapters: int) -> Tensor:
    """The rows' weights over K adapters, (batch, K) float32; several mentions of one adapter add up.

    Args:
        rows: the members of each prompt.
        column: column of every reference that is loaded; members without one have weight 0.
        n_adapters: K.
    """
    weights = torch.zeros(len(rows), n_adapters)
    for i, row in enumerate(rows):
        for member in row:
            if member.ref in column:
                weights[i, column[member.ref]] += member.weight
    return weights
