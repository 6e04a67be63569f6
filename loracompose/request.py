"""One batch, loaded and composed: what the engine runs and what its answers are traced to."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from loracompose.adapters.lora import Adapter
from loracompose.composers import Composer
from loracompose.composers.base import router_of
from loracompose.composers.recall import Composition, compose_batch
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.cache import CompositionCache
from loracompose.composition.delta import LowRankDelta
from loracompose.membership import AdapterRef, Row, weight_matrix
from loracompose.prompts import Prompt
from loracompose.trace import AdapterUse, Generation


@dataclass(frozen=True)
class Identity:
    """Who an adapter is, whether or not it had to be loaded."""

    name: str
    fingerprint: str
    base_model: str


@dataclass(frozen=True, eq=False)
class Request:
    """A batch of prompts with the deltas that answer them, row by row.

    Attributes:
        prompts: the batch.
        rows: the members of each prompt at the weights that the composer was given.
        composer: how it was composed.
        identities: who every reference is.
        deltas: module path -> delta.
        recalled: for each prompt, whether its composition was kept from an earlier request.
        timings: seconds by stage.
    """

    prompts: Sequence[Prompt]
    rows: Sequence[Row]
    composer: Composer
    identities: Mapping[AdapterRef, Identity]
    deltas: Mapping[str, LowRankDelta]
    recalled: Sequence[bool]
    timings: dict[str, float]

    def answer(
        self,
        i: int,
        texts: tuple[str, ...],
        base_name: str,
        never_ran: Sequence[str] = (),
        prompt_tokens: int = 0,
        new_tokens: tuple[int, ...] = (),
    ) -> Generation:
        """The i-th prompt's texts with their trace.

        Args:
            i: place in the batch.
            texts: what the model wrote.
            base_name: the base that ran.
            never_ran: modules whose delta the model never called.
            prompt_tokens: that the model read for this prompt.
            new_tokens: of each text.
        """
        members = [(self.identities[member.ref], member) for member in self.rows[i]]
        uses = [AdapterUse(who.name, who.fingerprint, m.score, m.weight) for who, m in members]
        notes = [
            f"adapter {who.name!r} names the base {who.base_model!r}, it runs on {base_name!r}"
            for who, _ in members
            if who.base_model and who.base_model != base_name
        ]
        router = router_of(self.composer)
        if router is not None and router.base_model != base_name:
            notes.append(f"the {router.method} router names the base {router.base_model!r}, it runs on {base_name!r}")
        if never_ran and any(m.weight for _, m in members):
            notes.append(f"the model never called {', '.join(never_ran)}: updates of these modules had no effect")
        ordered = tuple(sorted(uses, key=lambda use: (-use.weight, -(use.score or 0.0))))
        return Generation(
            prompt=self.prompts[i],
            texts=texts,
            composer=repr(self.composer),
            adapters=ordered,
            timings=dict(self.timings),
            notes=tuple(notes),
            added_parameters=self.added_parameters[i],
            from_cache=self.recalled[i],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
        )

    @cached_property
    def added_parameters(self) -> list[int]:
        """Numbers in the A and B of the ranks that run for each prompt; a gate may switch them off token by token."""
        shared: dict[int, tuple[Tensor, int]] = {}  # weights, and the width of all modules that have these very ones
        for delta in self.deltas.values():
            weights, width = shared.get(id(delta.weights), (delta.weights, 0))
            shared[id(weights)] = weights, width + delta.A.shape[-1] + delta.B.shape[-2]
        counts = torch.zeros(len(self.prompts), dtype=torch.int64)
        for weights, width in shared.values():
            counts += (weights != 0).sum(dim=-1).cpu() * width  # (batch,)
        return [int(count) for count in counts]


def prepare(
    prompts: Sequence[Prompt],
    rows: Sequence[Row],
    loaded: Mapping[AdapterRef, Adapter],
    identities: Mapping[AdapterRef, Identity],
    composer: Composer,
    timings: Mapping[str, float],
    device: torch.device,
    cache: CompositionCache,
) -> Request:
    """Compose the adapters of a batch; adapters are sorted by content, so no result depends on their order.

    Args:
        prompts: the batch.
        rows: the members of each prompt.
        loaded: the adapter behind every reference that has a weight in some row.
        identities: who every reference is.
        composer: how to compose.
        timings: seconds spent so far.
        device: where the weights go.
        cache: of what was composed before.

    Raises:
        LookupError: the composer runs a router that was not trained for one of the adapters.
    """
    start = time.perf_counter()
    # An adapter given as an object stands for itself: its fingerprint is the caller's word, not checked content.
    keys = {ref: id(ref) if isinstance(ref, Adapter) else (a.fingerprint, a.name) for ref, a in loaded.items()}
    distinct = {keys[ref]: adapter for ref, adapter in loaded.items()}
    keys_of, adapters = list(distinct), list(distinct.values())
    order = content_order(adapters)
    place = {key: order.index(i) for i, key in enumerate(keys_of)}
    column = {ref: place[key] for ref, key in keys.items()}
    weights = weight_matrix(rows, column, len(adapters)).to(device)  # (batch, K)
    if (router := router_of(composer)) is not None:
        router.check_serves({adapter.fingerprint: adapter.name for adapter in adapters})
    known = [isinstance(keys_of[i], tuple) for i in order]
    with torch.autocast(device.type, enabled=False):  # the caller's would round what is kept for others
        banks = gather_banks([adapters[i] for i in order])
        made = compose_batch(composer, banks, weights, cache, known) if banks else Composition({}, (False,) * len(rows))
    timings = {**timings, "compose": time.perf_counter() - start}
    return Request(prompts, rows, composer, identities, made.deltas, made.recalled, timings)
