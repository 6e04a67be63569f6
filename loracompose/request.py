"""One batch, loaded and composed: what the engine runs and what its answers are traced to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loracompose.adapters.lora import Adapter
from loracompose.composers import Composer
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.delta import LowRankDelta
from loracompose.membership import AdapterRef, Row, weight_matrix
from loracompose.prompts import Prompt
from loracompose.trace import AdapterUse, Generation


@dataclass(frozen=True, eq=False)
class Request:
    """A batch of prompts with the deltas that answer them, row by row."""

    prompts: Sequence[Prompt]
    rows: Sequence[Row]
    composer: Composer
    loaded: Mapping[AdapterRef, Adapter]
    deltas: Mapping[str, LowRankDelta]
    timings: dict[str, float]

    def answer(self, i: int, texts: tuple[str, ...], base_name: str) -> Generation:
        """The i-th prompt's texts with their trace."""
        members = [(self.loaded[member.ref], member) for member in self.rows[i]]
        uses = [AdapterUse(a.name, a.fingerprint, m.score, m.weight) for a, m in members]
        notes = tuple(
            f"adapter {adapter.name!r} names the base {adapter.base_model!r}, it runs on {base_name!r}"
            for adapter, _ in members
            if adapter.base_model and adapter.base_model != base_name
        )
        ordered = tuple(sorted(uses, key=lambda use: (-use.weight, -(use.score or 0.0))))
        return Generation(self.prompts[i], texts, repr(self.composer), ordered, dict(self.timings), notes)


def prepare(
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    loaded: Mapping[AdapterRef, Adapter],
    composer: Composer,
    timings: Mapping[str, float],
    device: torch.device,
) -> Request:
    """Compose the adapters of a batch; adapters are sorted by content, so no result depends on their order.

    Args:
        prompts: the batch.
        rows: the members of each prompt.
        loaded: the adapter behind every reference in the rows.
        composer: how to compose.
        timings: seconds spent so far.
        device: where the weights go.
    """
    start = time.perf_counter()
    by_content = {(a.fingerprint, a.name): a for a in loaded.values()}
    adapters = list(by_content.values())
    adapters = [adapters[i] for i in content_order(adapters)]
    place = {(a.fingerprint, a.name): i for i, a in enumerate(adapters)}
    column = {ref: place[a.fingerprint, a.name] for ref, a in loaded.items()}
    weights = weight_matrix(rows, column, len(adapters)).to(device)  # (batch, K)
    banks = gather_banks(adapters)
    deltas = composer.compose(banks, weights) if banks else {}
    return Request(prompts, rows, composer, loaded, deltas, {**timings, "compose": time.perf_counter() - start})
