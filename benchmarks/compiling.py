"""Whether torch.compile pays for decoding on a CPU: the base model and the model with adapters on it, both ways.

python benchmarks/compiling.py --layers 4 -o benchmarks/results/compiling.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, PreTrainedModel, StaticCache

from loracompose.benchmarks.speed.case import Case, make_adapters
from loracompose.benchmarks.speed.measure import machine
from loracompose.benchmarks.speed.rounds import summary
from loracompose.benchmarks.speed.ways import Ours
from loracompose.composers import get_composer
from loracompose.durable import write_whole
from loracompose.models import load_base
from loracompose.runtime.attach import attach
from loracompose.runtime.first_pass import CACHE

CASE = Case(rows=16, k=3, distinct=16)
WARM = 3  # steps that are not counted: the compiler runs in the first


def measure(model: PreTrainedModel, steps: int) -> dict[str, Any]:
    """Seconds of a decoding step of every way, and of its first steps together."""
    ids = torch.randint(0, 1000, (CASE.rows, CASE.tokens + WARM + steps), generator=torch.Generator().manual_seed(0))
    ours = Ours(model, make_adapters(CASE, model), CASE, get_composer("mixture"))
    found: dict[str, Any] = {}
    with torch.no_grad():  # torch.compile does not trace inference mode
        deltas = ours.deltas()
        found["base model, growing cache"] = decode(model, model.forward, DynamicCache(config=model.config), ids)
        found["base model, static cache"] = decode(model, model.forward, static(model, ids), ids)
        found["base model, compiled"] = decode(model, torch.compile(model.forward), static(model, ids), ids)
        torch._dynamo.reset()
        with attach(model, deltas, form="shared"):
            found["loracompose, growing cache"] = decode(model, model.forward, DynamicCache(config=model.config), ids)
            found["loracompose, static cache"] = decode(model, model.forward, static(model, ids), ids)
            counters.clear()
            compiled = decode(model, torch.compile(model.forward), static(model, ids), ids)
            found["loracompose, compiled"] = compiled | {"graph_breaks": sum(counters["graph_break"].values())}
    return found


def static(model: PreTrainedModel, ids: torch.Tensor) -> StaticCache:
    """A cache with room for all the tokens."""
    return StaticCache(config=model.config, max_cache_len=ids.shape[1] + 1)


def decode(model: PreTrainedModel, forward: Callable[..., Any], cache: Any, ids: torch.Tensor) -> dict[str, Any]:
    """Seconds of a step, after a prompt that runs as it is."""
    extra = {CACHE: cache, "use_cache": True, "logits_to_keep": 1}
    model(input_ids=ids[:, : CASE.tokens], **extra)
    seconds = []
    for place in range(CASE.tokens, ids.shape[1]):
        start = time.perf_counter()
        forward(input_ids=ids[:, place : place + 1], **extra)
        seconds.append(time.perf_counter() - start)
    return {"first_steps_seconds": sum(seconds[:WARM]), "step_seconds": summary(seconds[WARM:])}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--layers", type=int, default=4, help="of the model; compiling all takes minutes")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    base = load_base(given.base, device="cpu", dtype="float32")
    del base.model.model.layers[given.layers :]
    base.model.config.num_hidden_layers = given.layers
    result = {
        "question": "whether torch.compile pays for decoding on a CPU",
        "model": f"{base.name}, {given.layers} layers",
        "machine": machine(base.device),
        "ways": measure(base.model, given.steps),
    }
    write_whole(given.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
