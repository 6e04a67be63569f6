"""What a decoding step with adapters spends its time on, kernel by kernel, beside a step of the base model.

    python benchmarks/step_profile.py -o benchmarks/results/step_profile.json
    python benchmarks/speed_report.py

The case is the first of `loracompose bench speed`. Steps are timed without the profiler, the base and the adapters in
turn; then the profiler says how the time of a step is shared out among kernels. It slows small ones down, so its
milliseconds are scaled to those of the timed steps. What is left is Python, and waiting for threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loracompose.benchmarks.speed.case import Case, make_adapters
from loracompose.benchmarks.speed.measure import machine, token_ids
from loracompose.benchmarks.speed.ways import Base, Ours, Step, Way, on_model
from loracompose.composers.mixture import Mixture
from loracompose.durable import write_whole
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.runtime.machine import calibrate
from loracompose.runtime.plan import floor_seconds

ROOT = Path(__file__).parent.parent
FORMS = ("shared", "gathered")
LEAST = 0.05  # milliseconds of a step; kernels below are left out


def decoding(step: Step, ids: torch.Tensor, case: Case) -> Iterator[None]:
    """One decoding step at a time, after the prompt and a first step that prepares what is kept."""
    _, cache = step(ids[:, : case.tokens], None)
    for place in range(case.tokens, ids.shape[1]):
        _, cache = step(ids[:, place : place + 1], cache)
        yield


@contextmanager
def begun(way: Way, ids: torch.Tensor, case: Case) -> Iterator[Iterator[None]]:
    """A way that has taken its first step."""
    with torch.inference_mode(), way.ready() as step:
        steps = decoding(step, ids, case)
        next(steps)
        yield steps


def timed(ways: Sequence[Way], ids: torch.Tensor, case: Case, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a step, one number a round."""
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            with begun(way, ids, case) as steps:
                start = time.perf_counter()
                for _ in range(case.steps):
                    next(steps)
                found[way.name].append(1000 * (time.perf_counter() - start) / case.steps)
    return found


def kernels(way: Way, ids: torch.Tensor, case: Case) -> dict[str, dict[str, float]]:
    """Kernel -> calls and milliseconds of a step, under the profiler."""
    with begun(way, ids, case) as steps, profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(case.steps):
            next(steps)
    return {
        event.key: {"calls": event.count / case.steps, "ms": event.self_cpu_time_total / 1000 / case.steps}
        for event in seen.key_averages()
        if event.self_cpu_time_total / 1000 / case.steps >= LEAST
    }


def measure(base: BaseModel, rounds: int) -> dict[str, Any]:
    """Both forms of a static mixture beside the base model in one dtype."""
    case = Case()
    adapters = on_model(make_adapters(case, base.model, 0), base.model)
    ids, rates = token_ids(base, case, 0), calibrate(base.device, base.dtype)
    ours = [Ours(base.model, adapters, case, Mixture(), form=form, machine=rates, name=form) for form in FORMS]
    ways: list[Way] = [Base(base.model), *ours]
    samples = timed(ways, ids, case, rounds + 1)
    reference = samples[ways[0].name][1:]  # the first round warms up
    found = {}
    for way in ways:
        own = samples[way.name][1:]
        found[way.name] = {
            "ms": statistics.median(own),
            "ratio": statistics.median(a / b for a, b in zip(own, reference, strict=True)),
            "kernels": kernels(way, ids, case),
        }
    floor = floor_seconds(ours[0].deltas(), 1, itemsize=base.dtype.itemsize, machine=rates)
    return {"floor_ms": 1000 * floor, "bandwidth": rates.bandwidth, "ways": found}


def main() -> None:
    """Measure both dtypes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=ROOT / "benchmarks" / "results" / "step_profile.json")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    result: dict[str, Any] = {"model": DEFAULT_BASE, "machine": machine(torch.device("cpu")), "rounds": given.rounds}
    result["dtypes"] = {
        dtype: measure(load_base(DEFAULT_BASE, device="cpu", dtype=dtype), given.rounds) for dtype in given.dtype
    }
    rounded = json.loads(json.dumps(result), parse_float=lambda text: float(f"{float(text):.4g}"))
    write_whole(given.output, json.dumps(rounded, indent=1) + "\n")


if __name__ == "__main__":
    main()
