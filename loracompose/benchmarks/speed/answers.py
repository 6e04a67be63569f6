"""What an answer's time is made of: finding adapters, loading them, composing them, and the model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loracompose.benchmarks.speed.measure import machine
from loracompose.benchmarks.speed.rounds import summary
from loracompose.engine import Engine

STAGES = ("retrieve", "load", "compose", "generate")
BEFORE = STAGES[:3]  # what comes before the model


@dataclass(frozen=True)
class Asked:
    """What is asked of an index.

    Attributes:
        composers: each answers the same prompts.
        k: adapters of a prompt, at equal weights, so that all of them act.
        rows: prompts that run together.
        new_tokens: of every answer.
        rounds: measurements of each composer, with other prompts each.

    Raises:
        ValueError: a number that is out of range, or no composer.
    """

    composers: tuple[str, ...] = ("mixture", "rank_gating", "linear", "lego")
    k: int = 3
    rows: int = 16
    new_tokens: int = 64
    rounds: int = 7

    def __post_init__(self) -> None:
        for field in ("k", "rows", "new_tokens", "rounds"):
            if getattr(self, field) < 1:
                raise ValueError(f"Asked: {field} must be at least 1, got {getattr(self, field)}")
        if not self.composers:
            raise ValueError("Asked: there is no composer to time; name at least one")


def measure(engine: Engine, asked: Asked, tell: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Seconds of every stage, of every composer: with sets that it composes anew, and with those it has composed.

    The pool is warm: every adapter has been read, and the encoder has run. The prompts are examples of the index's
    cards, the adapters of a batch those that are found for them.

    Args:
        engine: with an index.
        asked: what of it.
        tell: is told what goes on.

    Raises:
        ValueError: the engine has no index, or its cards have no examples.
    """
    batches = list(_batches(engine, asked))
    tell(f"reading {len(engine.index or ())} adapters")
    for composer in asked.composers:
        _stages(engine, asked, composer, batches[0])
    found: dict[str, dict[str, list[dict[str, float]]]] = {c: {"anew": [], "again": []} for c in asked.composers}
    for number, prompts in enumerate(batches[1:]):
        tell(f"round {number + 1} of {asked.rounds}")
        turn = number % len(asked.composers)
        for composer in (*asked.composers[turn:], *asked.composers[:turn]):
            engine.cache.clear()
            for pass_ in ("anew", "again"):
                found[composer][pass_].append(_stages(engine, asked, composer, prompts))
    return {
        "question": "what an answer's time is made of",
        "model": engine.base.name,
        "dtype": str(engine.base.dtype).removeprefix("torch."),
        "machine": machine(engine.base.device),
        "adapters": len(engine.index or ()),
        "asked": asdict(asked),
        "composers": {name: {p: _summed(passes[p]) for p in passes} for name, passes in found.items()},
    }


def _batches(engine: Engine, asked: Asked) -> Iterator[list[str]]:
    """One batch to warm up with and one a round: examples of all cards in turn, so that a batch mixes tasks."""
    if engine.index is None:
        raise ValueError("the time of answers is measured with retrieval: the engine needs an index")
    cards = [card.examples for card in engine.index.cards if card.examples]
    if not cards:
        raise ValueError("no card of the index has examples, which are the prompts: build it from cards that have")
    place = 0
    for _ in range(asked.rounds + 1):
        batch = []
        for _ in range(asked.rows):
            examples = cards[place % len(cards)]
            batch.append(examples[place // len(cards) % len(examples)])
            place += 1
        yield batch


def _stages(engine: Engine, asked: Asked, composer: str, prompts: Sequence[str]) -> dict[str, float]:
    """Seconds of every stage of one batch, by the clock from before the search to after the answers."""
    start = time.perf_counter()
    found = engine.retrieve(prompts, k=asked.k)
    sets = [[match.card.name for match in found.for_prompt(i)] for i in range(len(found))]
    retrieved = time.perf_counter() - start
    answers = engine.generate(
        prompts,
        composer=composer,
        adapters=sets,
        batch_size=len(prompts),
        max_new_tokens=asked.new_tokens,
        min_new_tokens=asked.new_tokens,
    )
    total = time.perf_counter() - start
    before = {"retrieve": retrieved, **{stage: answers[0].timings[stage] for stage in ("load", "compose")}}
    return {**before, "generate": total - sum(before.values())}


def _summed(rounds: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Median and quartiles of every stage, and of what comes before the model as a part of the whole."""
    share = [sum(stages[stage] for stage in BEFORE) / sum(stages.values()) for stages in rounds]
    return {
        "seconds": {stage: summary([stages[stage] for stages in rounds]) for stage in STAGES},
        "share_before_the_model": summary(share),
    }
