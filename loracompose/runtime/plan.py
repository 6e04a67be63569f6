"""Which of the equal forms of a delta is cheapest for one call, from counted bytes and operations."""

from __future__ import annotations

from typing import Literal

Form = Literal["shared", "gathered"]

# How many operations a machine makes while it reads one byte. Small on CPUs (a few), large on GPUs (hundreds);
# only the order of magnitude matters here, because the two forms rarely come close.
OPERATIONS_PER_BYTE = 4.0


def choose_form(rows: int, seq: int, shared_ranks: int, row_ranks: int, itemsize: int) -> Form:
    """The cheaper of one bank for all rows and a bank for each row.

    Both cost time for bytes read and for operations, per unit of module width. The shared bank is read once but
    every row multiplies all of it; the gathered bank is read row by row but holds only what the row uses.

    Args:
        rows: rows of the batch.
        seq: tokens per row in this call (1 when decoding).
        shared_ranks: ranks of the shared bank.
        row_ranks: the most ranks that one row uses.
        itemsize: bytes per number.
    """
    if rows == 1 and row_ranks < shared_ranks:
        return "gathered"
    shared = shared_ranks * (itemsize + 2 * rows * seq / OPERATIONS_PER_BYTE)
    gathered = rows * row_ranks * (itemsize + 2 * seq / OPERATIONS_PER_BYTE)
    return "gathered" if gathered < shared else "shared"


# What gathering ranks token by token costs beyond its products: every number gathered is read, written and read again,
# and small products run at half the speed of one large one, together six times its bytes; and some calls, worth as
# much time as reading so many bytes.
GATHERING = 6.0
CALLS = 200_000.0


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
