"""All ways on all cases, with what they must agree on, as plain JSON values."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from loracompose.benchmarks.speed.case import Case, make_adapters, write_adapters
from loracompose.benchmarks.speed.peft_ways import PeftLoop, PeftNames, PeftOne, merged, peft_model
from loracompose.benchmarks.speed.published import Einsum, MergeAndRestore
from loracompose.benchmarks.speed.rounds import PHASES, Samples, compared, logits_of, summary, time_rounds
from loracompose.benchmarks.speed.ways import Base, Ours, Way, on_model
from loracompose.composers.mixture import Mixture
from loracompose.composers.rank_gating import RankGating
from loracompose.models import BaseModel
from loracompose.runtime.machine import Machine, calibrate
from loracompose.runtime.plan import Wanted, floor_seconds

ANSWER = 64  # tokens of the answer that the cost of a whole answer is stated for

MAIN = Case()
CASES: Mapping[str, Case] = {
    "16 rows, 3 adapters each": MAIN,
    "1 row": Case(rows=1, distinct=1),
    "8 rows": Case(rows=8, distinct=8),
    "64 rows": Case(rows=64, distinct=64, tokens=16, steps=4),
    "16 rows, one set": Case(distinct=1),
    "16 rows, 1 adapter each": Case(k=1),
    "16 rows, 8 adapters each": Case(k=8),
    "rank 16 on every linear": Case(ranks=(16,), targets="all"),
}

# Largest difference of logits, relative to the largest logit, that is rounding: between two ways, and of 16 bits from
# what the same code gives in float32.
TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-9, torch.float32: 2e-4}
COARSE = 6e-2  # of bfloat16 and float16


@dataclass(frozen=True)
class Setting:
    """How long to measure.

    Attributes:
        rounds: measurements of each way and case.
        slow: whether to time the ways that run row by row, and PEFT's merge by SVD; on the first case only.
        seed: of adapters and tokens.
    """

    rounds: int = 7
    slow: bool = True
    seed: int = 0


def measure(
    base: BaseModel,
    cases: Mapping[str, Case] = CASES,
    setting: Setting | None = None,
    tell: Callable[[str], None] = lambda text: None,
    keep: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Time every way on every case.

    Args:
        base: the model.
        cases: name -> case; the slow ways run on the first.
        setting: how long.
        tell: is told what goes on.
        keep: is given the result up to now after each case, for the next may fail or be stopped.

    Raises:
        ArithmeticError: two ways that must agree do not; that case is not timed then.
    """
    setting = setting or Setting()
    rates = calibrate(base.device, base.dtype)
    result: dict[str, Any] = {
        "question": "what a batch of different compositions costs beside the base model",
        "model": base.name,
        "dtype": str(base.dtype).removeprefix("torch."),
        "machine": machine(base.device),
        "rates": asdict(rates),
        "setting": asdict(setting),
        "cases": {},
    }
    for place, (name, case) in enumerate(cases.items()):
        tell(f"{name}: preparing")
        result["cases"][name] = measure_case(base, case, setting, rates, slow=setting.slow and place == 0, tell=tell)
        keep(result)
    return result


def measure_case(
    base: BaseModel,
    case: Case,
    setting: Setting,
    rates: Machine,
    *,
    slow: bool,
    tell: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Time every way on one case; the plan and the floor count with `rates`."""
    ids = token_ids(base, case, setting.seed)
    exact = exact_logits(base, case, setting.seed, rates, ids[:, : case.tokens + 1])
    with opened(base, case, setting.seed, rates, slow=slow) as ways:
        differences = agree(ways, ids[:, : case.tokens + 1], exact)
        tell(f"  {len(ways)} ways agree where they must; timing {setting.rounds} rounds")
        samples = time_rounds(ways, ids, case.steps, setting.rounds)
        once = {way.name: way.once for way in ways}
        computes = {way.name: way.computes for way in ways}
        deltas = next(way for way in ways if isinstance(way, Ours)).deltas()
        passes = {"first_token": case.tokens, "decode": 1}
        floor = {
            phase: floor_seconds(deltas, tokens, itemsize=base.dtype.itemsize, machine=rates)
            for phase, tokens in passes.items()
        }
    reference = samples[ways[0].name]
    return {
        "case": asdict(case),
        "adapters": case.adapters,
        "floor_seconds": floor,
        "ratio_to_floor": to_floor(samples[ways[1].name], reference, floor),
        "ways": {
            name: described(found, reference, once[name], case.rows)
            | {"computes": computes[name], "difference": differences.get(name)}
            for name, found in samples.items()
        },
    }


def to_floor(found: Samples, base: Samples, floor: Mapping[str, float]) -> dict[str, Any]:
    """Times over those of the base model and the least that the adapters can add, within a round."""
    return {
        phase: compared(getattr(found, phase), [seconds + least for seconds in getattr(base, phase)])
        for phase, least in floor.items()
    }


def described(found: Samples, base: Samples, once: float, rows: int) -> dict[str, Any]:
    """Seconds, ratios to the base model within a round, and milliseconds a prompt for whole answers."""
    values: dict[str, Any] = {phase: summary(getattr(found, phase)) for phase in PHASES}
    ratios = {phase: compared(getattr(found, phase), getattr(base, phase)) for phase in ("first_token", "decode")}
    middle = {phase: values[phase]["median"] for phase in PHASES}
    answer = middle["setup"] + middle["first_token"] + (ANSWER - 1) * middle["decode"]
    return {
        "seconds": values,
        "ratio_to_base": ratios,
        "once_seconds": once,
        "ms_a_prompt": 1000 * answer / rows,
        "ms_a_prompt_first_batch": 1000 * (answer + once) / rows,
    }


@contextmanager
def opened(base: BaseModel, case: Case, seed: int, rates: Machine, *, slow: bool) -> Iterator[list[Way]]:
    """Every way for one case; the base model is the first."""
    made = make_adapters(case, base.model, seed)
    adapters = on_model(made, base.model)
    with TemporaryDirectory() as folder:
        peft = peft_model(base.model, write_adapters(made, Path(folder)), case.k)
    names = [adapter.name for adapter in made]
    ways: list[Way] = [Base(base.model)]
    forms: list[Wanted] = ["shared", "gathered"]
    if case.distinct == 1:
        forms.append("folded")
    ways += [Ours(base.model, adapters, case, Mixture(), machine=rates)]
    ways += [Ours(base.model, adapters, case, Mixture(), form=form, name=f"loracompose, {form}") for form in forms]
    ways += [Ours(base.model, adapters, case, RankGating(), name="loracompose, rank_gating", computes="something else")]
    ways += [Einsum(base.model, adapters, case, "mixture"), Einsum(base.model, adapters, case, "fusion")]
    ways += [PeftOne(peft, names[0]), PeftNames(peft, [names[members[0]] for members in case.sets()])]
    ways.append(merged(peft, case, names, "cat")[0])
    if slow:
        ways.append(merged(peft, case, names, "svd", at_most=1)[0])
        ways.append(PeftLoop(peft, [[names[i] for i in members] for members in case.sets()]))
        ways.append(MergeAndRestore(base.model, adapters, case))
    yield ways


def exact_logits(base: BaseModel, case: Case, seed: int, rates: Machine, ids: Tensor) -> tuple[Tensor, Tensor] | None:
    """What the mixture predicts in float32, for a model of 16 bits; None for one that is as exact.

    Ways round in different places, which 16 bits show and 32 hardly do. So the same code runs on a float32 copy of the
    model first, where all ways must agree as closely as float32 does.

    Raises:
        ArithmeticError: they do not.
    """
    if base.dtype in TOLERANCE:
        return None
    copy = replace(base, model=deepcopy(base.model).float(), dtype=torch.float32)
    with opened(copy, case, seed, rates, slow=False) as ways:
        agree(ways, ids)
        return logits_of(next(way for way in ways if way.computes == "the mixture"), ids)


def agree(ways: Sequence[Way], ids: Tensor, exact: tuple[Tensor, Tensor] | None = None) -> dict[str, float]:
    """Largest difference of each way's logits from `exact`, relative to the largest logit.

    Args:
        ways: of which those that compute the mixture count.
        ids: prompts and one token more, (rows, tokens + 1).
        exact: what `logits_of` must give; that of the first way if None.

    Raises:
        ArithmeticError: one differs by more than rounding.
    """
    reference, against = exact, "float32"
    found: dict[str, float] = {}
    for way in ways:
        if way.computes != "the mixture":
            continue
        own = logits_of(way, ids)
        if reference is None:
            reference, against = own, repr(way.name)
        pairs = zip(own, reference, strict=True)
        found[way.name] = max(float((a.to(b.dtype) - b).abs().max() / b.abs().max()) for a, b in pairs)
        allowed = TOLERANCE.get(own[0].dtype, COARSE)
        if not found[way.name] <= allowed:
            raise ArithmeticError(
                f"{way.name!r} differs from {against} by {found[way.name]:.1e} of the largest logit, "
                f"allowed are {allowed:.0e}: they do not compute the same thing, so their times mean nothing"
            )
    return found


def token_ids(base: BaseModel, case: Case, seed: int) -> Tensor:
    """Random tokens, (rows, tokens + steps + 1): prompts, and what is fed while decoding."""
    random = torch.Generator().manual_seed(seed)
    size = (case.rows, case.tokens + case.steps + 1)
    vocabulary = int(base.model.config.get_text_config().vocab_size)
    return torch.randint(100 if vocabulary > 1000 else 0, vocabulary, size, generator=random).to(base.device)


def machine(device: torch.device) -> dict[str, Any]:
    """What the times depend on."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        # what torch compiled for: two machines of one name may differ in whether they multiply 16-bit numbers
        "processor": gpu or f"{processor()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def processor() -> str:
    """The name that the CPU gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
