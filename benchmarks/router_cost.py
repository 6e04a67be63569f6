"""What the shipped routers cost in time, beside the plain sum of the same adapters.

    python benchmarks/router_cost.py -o benchmarks/results/router_cost.json
    python benchmarks/response_loss_report.py

Sixteen prompts of the shipped pool's cards run three adapters each at equal weights and give answers of equal length.
Every method once a round, in turn; ratios are taken within a round.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from loracompose import Engine
from loracompose.benchmarks.shipped import engine_over, options
from loracompose.benchmarks.speed.measure import machine
from loracompose.benchmarks.speed.rounds import compared, summary
from loracompose.benchmarks.written import write_result
from loracompose.composers import Composer, get_composer
from loracompose.composers.mixture import Mixture
from loracompose.composition.router import load_router
from loracompose.models import DEFAULT_BASE

ROOT = Path(__file__).parent.parent
ROUTERS = ROOT / "index" / "routers"
ROWS, K = 16, 3
PLAIN = "mixture"


def composers() -> dict[str, Composer]:
    """The sum, and every method with a shipped router."""
    routers = [load_router(file.parent) for file in sorted(ROUTERS.glob("*/router.json"))]
    return {PLAIN: Mixture(), **{router.method: get_composer(router.method, router) for router in routers}}


def measure(engine: Engine, tokens: int, rounds: int) -> dict[str, Any]:
    """Seconds of a batch under every method, and ratios to the plain sum."""
    assert engine.index is not None
    names = [card.name for card in engine.index.cards]
    prompts = [engine.index.cards[i % len(names)].examples[i // len(names)] for i in range(ROWS)]
    sets = [{names[(i + j) % len(names)]: 1 / K for j in range(K)} for i in range(ROWS)]
    found: dict[str, list[float]] = {name: [] for name in composers()}
    for number in range(-1, rounds):
        for name, composer in composers().items():
            start = time.perf_counter()
            engine.generate(prompts, composer=composer, adapters=sets, max_new_tokens=tokens, min_new_tokens=tokens)
            if number >= 0:
                found[name].append(time.perf_counter() - start)
    return {
        name: {"seconds": summary(own), "ratio": compared(own, found[PLAIN]), "composer": repr(composers()[name])}
        for name, own in found.items()
    }


def main() -> None:
    """Measure and write."""
    parser = options(__doc__, ROOT / "benchmarks" / "results" / "router_cost.json")
    given = parser.parse_args()
    with engine_over(ROOT / "index" / "pool", given.index, given.dtype) as engine:
        result = {
            "model": DEFAULT_BASE,
            "dtype": given.dtype,
            "machine": machine(torch.device("cpu")),
            "rows": ROWS,
            "adapters": K,
            "tokens": given.tokens,
            "rounds": given.rounds,
            "methods": measure(engine, given.tokens, given.rounds),
        }
    write_result(result, given.output)


if __name__ == "__main__":
    main()
