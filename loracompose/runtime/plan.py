"""Which of the equal forms of a delta is cheapest for one call, from counted bytes and operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.machine import DEFAULT, Machine

Form = Literal["shared", "gathered"]
Wanted = Literal["auto", "shared", "gathered", "folded"]


def check_form(form: str) -> None:
    """Raise unless it is a form that `attach` knows."""
    if form not in get_args(Wanted):
        raise ValueError(f"form must be one of {', '.join(get_args(Wanted))}, got {form!r}")


def choose_form(
    rows: int,
    seq: int,
    shared: int,
    own: int,
    itemsize: int,
    *,
    distinct: int | None = None,
    machine: Machine = DEFAULT,
) -> Form:
    """The cheaper of one bank for all rows and a bank for each distinct composition.

    Both cost time for bytes read and for operations. The shared bank is read once but every row multiplies all of it;
    a gathered bank is read composition by composition but holds only what it uses, and is made anew for a pass of many
    tokens: its numbers are then read, written and read again.

    Args:
        rows: rows of the batch.
        seq: tokens per row in this call (1 when decoding).
        shared: numbers in the shared bank, or its ranks: both banks are counted in the same unit.
        own: the most that one row uses of it.
        itemsize: bytes per number.
        distinct: how many compositions differ; all rows if None.
        machine: what an operation and a byte cost.
    """
    if rows == 1 and own < shared:
        return "gathered"
    banks = rows if distinct is None else distinct
    reads = 1 if seq == 1 else 3
    all_of_it = shared * (itemsize / machine.bandwidth + 2 * rows * seq / machine.gemm(rows * seq))
    row_by_row = banks * own * reads * itemsize / machine.bandwidth + 2 * rows * own * seq / machine.bmm(
        rows * seq // banks
    )
    return "gathered" if row_by_row < all_of_it else "shared"


def stack_pays(own: int, filled: int, machine: Machine = DEFAULT) -> bool:
    """Whether many tokens of rows with ranks of their own are faster in one batched product than row by row.

    Args:
        own: numbers that the rows use, all rows together.
        filled: as many with every row filled up to the widest.
        machine: its rates for both.
    """
    return filled / machine.large_stack <= own / machine.large_bmm


# What gathering ranks token by token costs beyond its products: every number gathered is read, written and read again,
# and small products run at half the speed of one large one, together six times its bytes; and some calls, worth as
# much time as reading so many bytes.
GATHERING = 6.0
CALLS = 200_000.0
OPERATIONS_PER_BYTE = DEFAULT.large_gemm / DEFAULT.bandwidth


def active_pays(tokens: int, ranks: int, active: int, width: int, itemsize: int) -> bool:
    """Whether gathering the few ranks that act on each token is cheaper than multiplying all ranks and masking.

    Fitted to one CPU thread and float32: with 8 active of 64 ranks it pays for a single token at widths of 4,096, not
    at 576; of 256 ranks for up to about ten tokens. A prefill is always dense.

    Args:
        tokens: of all rows together in this call.
        ranks: all ranks of the bank.
        active: ranks that act on a token.
        width: d_in + d_out.
        itemsize: bytes per number.
    """
    dense = ranks * (itemsize + 2 * tokens / OPERATIONS_PER_BYTE)
    gathered = tokens * active * GATHERING * itemsize + CALLS / width
    return gathered < dense


CALLS_ADDED = 3  # two products and a hook, of a module that runs its delta beside its weight


def fold_pays(
    steps: int, rows: int, d_in: int, d_out: int, ranks: int, itemsize: int, machine: Machine = DEFAULT
) -> bool:
    """Whether adding a delta to the weight once is cheaper than running it at every step.

    Folding multiplies B by A, reads the weight and writes another. Every step then saves the delta's bytes,
    operations and calls.

    Args:
        steps: decoding steps that are expected.
        rows: rows of the batch, all with this one composition.
        d_in: width of the module's input.
        d_out: width of its output.
        ranks: ranks of the composition.
        itemsize: bytes per number.
        machine: what an operation and a byte cost.
    """
    numbers = ranks * (d_in + d_out)
    once = 3 * d_in * d_out * itemsize / machine.bandwidth + 2 * ranks * d_in * d_out / machine.large_gemm
    step = numbers * (itemsize / machine.bandwidth + 2 * rows / machine.gemm(rows)) + CALLS_ADDED * machine.call
    return once < steps * step


def floor_seconds(
    deltas: Mapping[str, LowRankDelta], seq: int, *, itemsize: int | None = None, machine: Machine = DEFAULT
) -> float:
    """The least time that the deltas of a batch can take in one pass, counted from bytes and operations alone.

    Of every module, each rank that some row uses is read once, and each row multiplies the ranks that it uses; the
    slower of the two counts. What is not counted: starting operations, activations, masks and gates.

    Args:
        deltas: as for `attach`.
        seq: tokens per row in the pass, 1 when decoding.
        itemsize: bytes per number in the model's dtype; that of the deltas if None.
        machine: its bandwidth and the faster of its rates for products.
    """
    rate = max(machine.small_gemm, machine.large_gemm, machine.small_bmm, machine.large_bmm, machine.large_stack)
    total = 0.0
    for delta in deltas.values():
        used = delta.weights != 0  # (batch, R)
        width = delta.B.shape[-2] + (delta.A.shape[-1] if delta.kind == "linear" else 0)
        read = int(used.sum()) if delta.per_row else int(used.any(dim=0).sum())
        multiplied = int(used.sum()) * seq
        total += max(read * width * (itemsize or delta.A.itemsize) / machine.bandwidth, 2 * multiplied * width / rate)
    return total
