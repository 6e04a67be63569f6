"""Machine: how fast this one reads, multiplies and starts an operation; measured once, kept in the cache."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from loracompose.durable import write_whole
from loracompose.unpacking import cache_folder

# Raised when what is measured changes; part of the file's name, so that older measurements are left alone.
FORMAT = 6

# Ranks of a step's banks: what a batch uses together, and what one row uses; products of more ranks are faster.
STEP_SHARED, STEP_OWN = 96, 16
EACH = 64  # tokens a row of a prefill
STEP_BYTES = 2**26  # of a step's banks, so that each comes from memory

BEYOND_CACHES = 2**28  # bytes: a step reads the whole model between two uses of a bank, so banks come from memory


@dataclass(frozen=True)
class Machine:
    """Rates that the plan counts with. The defaults are of no machine: only their ratios matter, and they never change.

    Attributes:
        bandwidth: bytes read a second from memory, beyond all caches.
        small_gemm: operations a second of one product of a few tokens, as in decoding, once its bank is read.
        large_gemm: of one product of many tokens, as in a prefill.
        small_bmm: operations a second of one product per row, of one token each, once its banks are read.
        large_bmm: of one product per row, of many tokens each, row by row.
        call: seconds to start one operation.
        large_stack: as `large_bmm`, of all rows in one batched product.
        wide: whether adapters of a model in 16 bits are multiplied in float32, with these rates: a CPU without
            products of 16-bit numbers takes tens of times as long for them, conversions counted.
    """

    bandwidth: float = 1e10
    small_gemm: float = 4e10
    large_gemm: float = 4e10
    small_bmm: float = 4e10
    large_bmm: float = 4e10
    call: float = 1e-5
    large_stack: float = 4e10
    wide: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.wide, bool):
            raise ValueError(f"wide must be true or false, got {self.wide!r}")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name != "wide" and not (isinstance(value, float) and 0 < value < float("inf")):
                raise ValueError(f"{field.name} must be a positive number, got {value!r}")

    def gemm(self, tokens: int) -> float:
        """Operations a second of one product over that many tokens."""
        return self.small_gemm if tokens < MANY else self.large_gemm

    def bmm(self, tokens: int) -> float:
        """Operations a second of products per row, that many tokens a row, the faster way."""
        return self.small_bmm if tokens < FEW else max(self.large_bmm, self.large_stack)


FEW = 16  # tokens from which on a product per row is a matrix product and no longer vector by vector
MANY = 128  # tokens from which on one product is large
# Filling rows up by more than half does not pay: with two threads one batched product is far faster than row by row,
# with one hardly.
DEFAULT = Machine(large_bmm=2.5e10)
# CPUs multiply 16-bit numbers in tiles that they pack anew for every product, which neither one token pays back nor the
# few ranks of one row, unless all rows are one product.
DEFAULT_HALF = Machine(small_bmm=5e9, large_bmm=4e9, large_stack=2.7e10)
DEFAULT_WIDE = replace(DEFAULT, wide=True)


def machine_file(device: torch.device, dtype: torch.dtype) -> Path:
    """Where the measurement of a device and dtype is kept, with this torch and this number of threads."""
    name = device.type if device.type != "cuda" else torch.cuda.get_device_name(device)
    parts = (name, str(dtype).removeprefix("torch."), f"t{torch.get_num_threads()}", f"torch{torch.__version__}")
    plain = "".join(c if c.isalnum() or c in ".+" else "-" for c in "_".join(parts))
    return cache_folder() / "machine" / f"{plain}_v{FORMAT}.json"


def known_machine(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """The measurement of this device and dtype; None if there is none.

    Raises:
        ValueError: the file is there but does not hold one.
    """
    file = machine_file(device, dtype)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return Machine(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{file} holds no measurement of this machine ({error}): delete it, or run loracompose doctor --calibrate"
        ) from error


def assumed_machine(device: torch.device, dtype: torch.dtype) -> Machine:
    """What the plan counts with where nothing was measured."""
    if device.type != "cpu" or dtype.itemsize != 2:
        return DEFAULT
    multiplies = dtype == torch.bfloat16 and "AVX512" in torch.backends.cpu.get_cpu_capability()
    return DEFAULT_HALF if multiplies else DEFAULT_WIDE


class Machines:
    """What one request counts with, looked up once for each device and dtype."""

    def __init__(self, given: Machine | None = None) -> None:
        """Take `given` for all of them; None is what was measured, or else assumed."""
        self._given = given
        self._known: dict[tuple[torch.device, torch.dtype], Machine] = {}

    def of(self, device: torch.device, dtype: torch.dtype) -> Machine:
        """The rates of one device and dtype."""
        if self._given is not None:
            return self._given
        place = device, dtype
        if place not in self._known:
            self._known[place] = known_machine(*place) or assumed_machine(*place)
        return self._known[place]

    def multiplied(self, device: torch.device, dtype: torch.dtype) -> torch.dtype:
        """The dtype that adapters are multiplied in beside modules of this one."""
        half = device.type == "cpu" and dtype.itemsize == 2
        return torch.float32 if half and self.of(device, dtype).wide else dtype


def save_machine(machine: Machine, device: torch.device, dtype: torch.dtype) -> Path:
    """Keep a measurement; the file appears in one step, complete."""
    file = machine_file(device, dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(asdict(machine), indent=1))
    return file


@torch.inference_mode()
def calibrate(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """Measure this machine, in a few seconds; nothing is written, see `save_machine`.

    Rates are the best of several short runs, so other work on the machine shows as little as can be. Numbers of 16 bits
    on a CPU are multiplied as they are and in float32, and the rates are those of the way that answers sooner.
    """
    place = torch.device(device)
    as_they_are = _measured(place, dtype, dtype)
    if place.type != "cpu" or dtype.itemsize != 2:
        return as_they_are[1]
    wide = _measured(place, dtype, torch.float32)
    return as_they_are[1] if as_they_are[0] <= wide[0] else replace(wide[1], wide=True)


WIDE, RANKS, ROWS = 1024, 64, 16  # of the products that are timed


def _measured(place: torch.device, dtype: torch.dtype, multiplied: torch.dtype) -> tuple[float, Machine]:
    """The rates of products in one dtype, of states in another or the same, and what an answer took with them.

    Of an answer, the products of one module are counted: a prompt of many tokens, and as many steps after it.
    """

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=place, dtype=dtype)

    large = torch.ones(BEYOND_CACHES // multiplied.itemsize, device=place, dtype=multiplied)
    A = numbers(WIDE, RANKS).to(multiplied)
    many = numbers(1024, WIDE)
    tiny = numbers(1, 8)
    seconds = {
        "sum": _best(lambda: large.sum(), place),
        "many": _best(lambda: many.to(multiplied) @ A, place),
        "call": _best(lambda: tiny.add(tiny), place, runs=64),
    }
    bandwidth = large.nbytes / seconds["sum"]
    work = 2.0 * WIDE * RANKS
    rows, row = numbers(ROWS, EACH, WIDE), numbers(ROWS, WIDE)
    step, own_step = _step_seconds(row, STEP_SHARED, multiplied), _step_seconds(row[:, None], STEP_OWN, multiplied)
    machine = Machine(
        bandwidth=bandwidth,
        small_gemm=_step_rate(row, STEP_SHARED, step, bandwidth / multiplied.itemsize),
        large_gemm=1024 * work / seconds["many"],
        small_bmm=_step_rate(row[:, None], STEP_OWN, own_step, bandwidth / multiplied.itemsize),
        large_bmm=_rowwise_rate(rows, STEP_OWN, multiplied, at_once=place.type == "cuda"),
        call=seconds["call"],
        large_stack=_rowwise_rate(rows, STEP_OWN, multiplied, at_once=True),
    )
    prompt = 4.0 * ROWS * EACH * WIDE * STEP_OWN / max(machine.large_bmm, machine.large_stack)
    return EACH * step + prompt, machine


def _step_rate(x: torch.Tensor, ranks: int, seconds: float, numbers: float) -> float:
    """Operations a second of the two products of a decoding step, whose banks come from memory.

    What reading takes is taken off, since the plan counts it by itself: at most nine tenths, so that a rate is left.

    Args:
        x: (rows, width) for one bank, (rows, 1, width) for a bank each.
        ranks: of a bank.
        seconds: of such a step.
        numbers: that are read a second.
    """
    reading = 2 * x.shape[-1] * ranks * _n_banks(x) / numbers
    return float(4 * x.shape[0] * x.shape[-1] * ranks / max(seconds - reading, seconds / 10))


def _n_banks(x: torch.Tensor) -> int:
    """One for rows side by side, one for each row of a batch."""
    return x.shape[0] if x.ndim == 3 else 1


def _step_seconds(x: torch.Tensor, ranks: int, multiplied: torch.dtype) -> float:
    """Seconds of the two products of a step; `x` and `ranks` as for `_step_rate`, `multiplied` the banks' dtype."""
    banks, wide = x.shape[:-2], x.shape[-1]
    each = 2 * wide * ranks * _n_banks(x)  # numbers that a turn reads
    turns = max(2, STEP_BYTES // (each * multiplied.itemsize))

    def bank(*shape: int) -> torch.Tensor:
        return torch.randn(*banks, *shape, device=x.device, dtype=multiplied)

    A = [bank(wide, ranks) for _ in range(turns)]
    B = [bank(ranks, wide) for _ in range(turns)]
    output = torch.zeros_like(x)

    def step() -> None:
        for shrink, expand in zip(A, B, strict=True):
            h, into = torch.matmul(x.to(multiplied), shrink), output.to(multiplied)
            added = torch.addmm(into, h, expand) if not banks else torch.baddbmm(into, h, expand)
            added.to(x.dtype)

    return _best(step, x.device, runs=1) / turns


def _rowwise_rate(x: torch.Tensor, ranks: int, multiplied: torch.dtype, *, at_once: bool) -> float:
    """Operations a second of the two products of a prefill, for every row with few ranks of its own, calls included.

    Row by row the calls take longer than the products where there are several threads, or numbers of 16 bits.

    Args:
        x: (rows, tokens, width).
        ranks: of every row.
        multiplied: dtype of the ranks.
        at_once: all rows in one batched product, instead of row by row.
    """
    rows, tokens, wide = x.shape

    def bank(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, device=x.device, dtype=multiplied)

    A, B = bank(wide, ranks), bank(ranks, wide)
    output = torch.zeros_like(x)

    def rowwise(states: torch.Tensor, outputs: torch.Tensor) -> None:
        for into, row, shrink, expand in zip(outputs, states, A, B, strict=True):
            into.addmm_(row @ shrink, expand)

    def stacked(states: torch.Tensor, outputs: torch.Tensor) -> None:
        outputs.baddbmm_(torch.bmm(states, A), B)

    def run() -> None:
        outputs = output.to(multiplied)
        (stacked if at_once else rowwise)(x.to(multiplied), outputs)
        outputs.to(x.dtype)

    return float(4 * rows * tokens * wide * ranks / _best(run, x.device))


def _best(run: Callable[[], object], device: torch.device, *, runs: int = 4, budget: float = 0.15) -> float:
    """Seconds of one run: the best of as many rounds as fit the budget, three at least."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    wait()
    best, begin = float("inf"), time.perf_counter()
    rounds = 0
    while rounds < 3 or time.perf_counter() - begin < budget:
        start = time.perf_counter()
        for _ in range(runs):
            run()
        wait()
        best = min(best, (time.perf_counter() - start) / runs)
        rounds += 1
    return best
