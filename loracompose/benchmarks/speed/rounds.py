"""Timing in rounds: every way once a round, in an order that rotates, so that what the machine does hits all alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loracompose.benchmarks.speed.ways import Step, Way, cropped

PHASES = ("setup", "first_token", "decode")


@dataclass(frozen=True)
class Samples:
    """Seconds of one way, one entry a round.

    Attributes:
        setup: until tokens can run: composing, stacking, putting on and taking off.
        first_token: one pass over all prompts, what is prepared at first use included.
        decode: one decoding step.
    """

    setup: list[float] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = np.quantile(np.asarray(values), (0.25, 0.5, 0.75))
    return {"median": float(middle), "low": float(low), "high": float(high)}


def compared(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratios within a round."""
    return summary([value / other for value, other in zip(values, base, strict=True)])


def time_rounds(
    ways: Sequence[Way], ids: Tensor, steps: int, rounds: int, tick: Callable[[], None] = lambda: None
) -> Mapping[str, Samples]:
    """Seconds of every way and phase.

    Args:
        ways: with different names; each is run once before anything is timed.
        ids: the prompts, (rows, tokens + steps + 1); what follows the first tokens is what is decoded.
        steps: decoding steps that are timed together; two for slow ways.
        rounds: measurements of each way.
        tick: called after each way of each round.
    """
    found = {way.name: Samples() for way in ways}
    length = ids.shape[1] - steps - 1
    for number in range(-1, rounds):
        gc.collect()  # now, so that it does not happen inside of a measurement
        turn = number % len(ways)
        for way in (*ways[turn:], *ways[:turn]):
            timed = min(2, steps) if way.slow else steps
            sample = one_round(way, ids[:, : length + timed + 1], timed)  # the same prompts for all
            if number >= 0:
                for phase, seconds in zip(PHASES, sample, strict=True):
                    getattr(found[way.name], phase).append(seconds)
            tick()
    return found


def one_round(way: Way, ids: Tensor, steps: int) -> tuple[float, float, float]:
    """Seconds to set up, to the first token, and of one decoding step."""
    length = ids.shape[1] - steps - 1
    with torch.inference_mode():
        clock = Clock(ids.device)
        with way.ready() as step:
            ready = clock.read()
            _, cache = step(ids[:, :length], None)
            first = clock.read()
            cache = decoded(step, ids[:, length : length + 1], cache)  # what is prepared at the first step, and caches
            clock.read()
            for place in range(length + 1, length + 1 + steps):
                cache = decoded(step, ids[:, place : place + 1], cache)
            last = clock.read()
            cropped(cache, 0)
            clock.read()
        return ready + clock.read(), first, last / steps


def decoded(step: Step, ids: Tensor, cache: Any) -> Any:
    """The cache after one more token."""
    return step(ids, cache)[1]


class Clock:
    """Seconds since it was last read; waits for an accelerator before it looks."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = time.perf_counter()

    def read(self) -> float:
        """Seconds since the last reading."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        since, self._last = now - self._last, now
        return since


def logits_of(way: Way, ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a way predicts after the prompts and after one more token, (rows, vocabulary) each."""
    with torch.inference_mode(), way.ready() as step:
        first, cache = step(ids[:, :-1], None)
        second, _ = step(ids[:, -1:], cache)
    return first, second
