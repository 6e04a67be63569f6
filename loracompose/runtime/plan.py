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
