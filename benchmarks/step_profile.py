"""What a pass with adapters spends its time on, kernel by kernel, beside one of the base model.

    python benchmarks/step_profile.py -o benchmarks/results/step_profile.json
    python benchmarks/speed_report.py

The case is the first of `loracompose bench speed`, the passes are that of the prompts and a decoding step. They are
timed without the profiler, the base and the adapters in turn; then the profiler says what kernels took. It slows small
ones down. What is left is Python, and waiting for threads.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from loracompose.benchmarks.speed.case import Case, make_adapters
from loracompose.benchmarks.speed.measure import machine, token_ids
from loracompose.benchmarks.speed.ways import Base, Ours, Step, Way, on_model
from loracompose.benchmarks.written import write_result
from loracompose.composers.mixture import Mixture
from loracompose.models import DEFAULT_BASE, BaseModel, load_base
from loracompose.runtime.machine import calibrate
from loracompose.runtime.plan import floor_seconds

ROOT = Path(__file__).parent.parent
FORMS = ("shared", "gathered")
LEAST = 0.05  # milliseconds of a pass; kernels below are left out


def decoding(step: Step, ids: torch.Tensor, case: Case) -> Iterator[None]:
    """One decoding step at a time, after the prompt and a first step that prepares what is kept."""
    _, cache = step(ids[:, : case.tokens], None)
    for place in range(case.tokens, ids.shape[1]):
        _, cache = step(ids[:, place : place + 1], cache)
        yield


def prompting(step: Step, ids: torch.Tensor, case: Case) -> Iterator[None]:
    """The pass of the prompts, again and again."""
    while True:
        step(ids[:, : case.tokens], None)
        yield


# phase -> (its passes, how many of them, tokens a row)
PHASES: dict[str, tuple[Callable[[Step, torch.Tensor, Case], Iterator[None]], int, int]] = {
    "first_token": (prompting, 2, Case().tokens),
    "decode": (decoding, Case().steps, 1),
}


@contextmanager
def begun(way: Way, ids: torch.Tensor, case: Case, phase: str) -> Iterator[Iterator[None]]:
    """A way that has made its first pass."""
    with torch.inference_mode(), way.ready() as step:
        passes = PHASES[phase][0](step, ids, case)
        next(passes)
        yield passes


def timed(ways: Sequence[Way], ids: torch.Tensor, case: Case, rounds: int, phase: str) -> dict[str, list[float]]:
    """Milliseconds of a pass, one number a round."""
    found: dict[str, list[float]] = {way.name: [] for way in ways}
    count = PHASES[phase][1]
    for _ in range(rounds):
        for way in ways:
            with begun(way, ids, case, phase) as passes:
                start = time.perf_counter()
                for _ in range(count):
                    next(passes)
                found[way.name].append(1000 * (time.perf_counter() - start) / count)
    return found


def kernels(way: Way, ids: torch.Tensor, case: Case, phase: str) -> dict[str, dict[str, float]]:
    """Kernel -> calls and milliseconds of a pass, under the profiler."""
    count = PHASES[phase][1]
    with begun(way, ids, case, phase) as passes, profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(count):
            next(passes)
    return {
        event.key: {"calls": event.count / count, "ms": event.self_cpu_time_total / 1000 / count}
        for event in seen.key_averages()
        if event.self_cpu_time_total / 1000 / count >= LEAST
    }


def measure(base: BaseModel, rounds: int) -> dict[str, Any]:
    """Both forms of a static mixture beside the base model in one dtype, in both phases."""
    case = Case()
    adapters = on_model(make_adapters(case, base.model, 0), base.model)
    ids, rates = token_ids(base, case, 0), calibrate(base.device, base.dtype)
    ours = [Ours(base.model, adapters, case, Mixture(), form=form, machine=rates, name=form) for form in FORMS]
    ways: list[Way] = [Base(base.model), *ours]
    found = {}
    for phase, (_, _, tokens) in PHASES.items():
        samples = timed(ways, ids, case, rounds + 1, phase)
        reference = samples[ways[0].name][1:]  # the first round warms up
        floor = floor_seconds(ours[0].deltas(), tokens, itemsize=base.dtype.itemsize, machine=rates)
        found[phase] = {
            "floor_ms": 1000 * floor,
            "ways": {
                way.name: {
                    "ms": statistics.median(own := samples[way.name][1:]),
                    "ratio": statistics.median(a / b for a, b in zip(own, reference, strict=True)),
                    "kernels": kernels(way, ids, case, phase),
                }
                for way in ways
            },
        }
    return {"rates": asdict(rates), "phases": found}


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
    write_result(result, given.output)


if __name__ == "__main__":
    main()
