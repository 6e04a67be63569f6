"""Triton kernels of the grouped product: each row multiplies its own ranks, read where the bank holds them.

No bank is gathered: a composition names its ranks by their places, and one of fewer ranks stops earlier. The oracle is
the PyTorch form, `GatheredForm`; with TRITON_INTERPRET=1 these kernels run on a CPU, for tests.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

RANKS = 16  # ranks of a block; every module of a group begins a block of its own
# Products of fewer tokens than this are sums of vectors: the matrix units take no smaller blocks.
SMALLEST = 16


@triton.jit
def _shrink(
    x,
    A,
    row_of,
    pick,
    live,
    h,
    seq,
    d_in,
    n_ranks,
    times,
    SEQ: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
):
    """One block of h[row] = x[row] A[pick[composition of row]]ᵀ."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)  # offsets may pass 2³¹
    composition = tl.load(row_of + row // times)
    own = tl.load(live + composition * (n_ranks // RANKS) + block)
    if own > 0:
        slots = tl.arange(0, RANKS)
        ranks, tokens = block * RANKS + slots, tl.program_id(2) * SEQ + tl.arange(0, SEQ)
        inside, mine = tokens < seq, slots < own
        place = tl.load(pick + composition * n_ranks + ranks, mask=mine, other=0)
        total = tl.zeros((SEQ, RANKS), dtype=h.dtype.element_ty)
        for start in range(0, d_in, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            some = columns < d_in
            at_x = (row * seq + tokens)[:, None] * d_in + columns[None, :]
            at_A = place[:, None] * d_in + columns[None, :]
            these = tl.load(x + at_x, mask=inside[:, None] & some[None, :], other=0.0)  # (SEQ, WIDTH)
            bank = tl.load(A + at_A, mask=mine[:, None] & some[None, :], other=0.0)  # (RANKS, WIDTH)
            if DOT:
                total += tl.dot(these, tl.trans(bank), input_precision="ieee")
            else:
                total += tl.sum(these[:, None, :].to(total.dtype) * bank[None, :, :].to(total.dtype), axis=2)
        at_h = (row * seq + tokens)[:, None] * n_ranks + ranks[None, :]
        tl.store(h + at_h, total, mask=inside[:, None] & mine[None, :])


@triton.jit
def _expand(
    h,
    B,
    row_of,
    pick,
    scale,
    live,
    y,
    out,
    seq,
    d_out,
    n_ranks,
    first,
    last,
    times,
    SEQ: tl.constexpr,
    RANKS: tl.constexpr,
    WIDTH: tl.constexpr,
    DOT: tl.constexpr,
):
    """One block of out[row] = y[row] + (h[row] * scale) B[pick], over the blocks of ranks of one module."""
    row = tl.program_id(0).to(tl.int64)
    columns, tokens = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH), tl.program_id(2) * SEQ + tl.arange(0, SEQ)
    composition = tl.load(row_of + row // times)
    inside, some, slots = tokens < seq, columns < d_out, tl.arange(0, RANKS)
    total = tl.zeros((SEQ, WIDTH), dtype=h.dtype.element_ty)
    for block in range(first, last):
        own = tl.load(live + composition * (n_ranks // RANKS) + block)
        if own > 0:
            ranks, mine = block * RANKS + slots, slots < own
            place = tl.load(pick + composition * n_ranks + ranks, mask=mine, other=0)
            weight = tl.load(scale + composition * n_ranks + ranks, mask=mine, other=0.0)
            at_h = (row * seq + tokens)[:, None] * n_ranks + ranks[None, :]
            weighted = tl.load(h + at_h, mask=inside[:, None] & mine[None, :], other=0.0) * weight[None, :]
            at_B = place[:, None] * d_out + columns[None, :]
            bank = tl.load(B + at_B, mask=mine[:, None] & some[None, :], other=0.0)  # (RANKS, WIDTH)
            if DOT:
                total += tl.dot(weighted.to(bank.dtype), bank, input_precision="ieee")
            else:
                total += tl.sum(weighted[:, :, None] * bank[None, :, :].to(total.dtype), axis=1)
    at_y = (row * seq + tokens)[:, None] * d_out + columns[None, :]
    mask = inside[:, None] & some[None, :]
    tl.store(out + at_y, (tl.load(y + at_y, mask=mask, other=0.0) + total).to(out.dtype.element_ty), mask=mask)


def shrink(x: Tensor, A: Tensor, row_of: Tensor, pick: Tensor, live: Tensor) -> Tensor:
    """X A[pick]ᵀ with each row's own picks, (rows, seq, n_ranks) in float32; what is not live is undefined.

    Args:
        x: (rows, seq, d_in), `times` rows in a row for each entry of row_of.
        A: (R, d_in), contiguous.
        row_of: (batch,), the composition of each prompt.
        pick: (compositions, n_ranks), places in A, in blocks of RANKS.
        live: (compositions, n_ranks / RANKS), how many ranks of each block are used, from its start.
    """
    (rows, seq, d_in), n_ranks = x.shape, pick.shape[1]
    h = torch.empty(rows, seq, n_ranks, device=x.device, dtype=torch.float32)
    tokens, width, dot = _blocks(seq)
    grid = (rows, n_ranks // RANKS, triton.cdiv(seq, tokens))
    with torch.cuda.device_of(x):  # Triton starts kernels on the thread's current GPU, wherever the tensors are
        _shrink[grid](
            x.contiguous(), A, row_of, pick, live, h, seq, d_in, n_ranks, rows // len(row_of),
            SEQ=tokens, RANKS=RANKS, WIDTH=width, DOT=dot,
        )  # fmt: skip
    return h


def expand(
    h: Tensor, B: Tensor, row_of: Tensor, pick: Tensor, scale: Tensor, live: Tensor, ranks: slice, output: Tensor
) -> Tensor:
    """Output + (h * scale) B[pick] with each row's own picks, (rows, seq, d_out), as a tensor of its own.

    Args:
        h: (rows, seq, n_ranks), from `shrink`.
        B: (R_i, d_out) of one module, contiguous, rank by rank.
        row_of: (batch,), the composition of each prompt.
        pick: (compositions, n_ranks), places in the B of the module that the rank is of.
        scale: (compositions, n_ranks), weights, float32.
        live: (compositions, n_ranks / RANKS), as for `shrink`.
        ranks: which of the n_ranks are the module's, whole blocks.
        output: (rows, seq, d_out), what the module gave.
    """
    (rows, seq, n_ranks), d_out = h.shape, B.shape[1]
    y = output.contiguous()
    out = torch.empty_like(y)
    tokens, width, dot = _blocks(seq)
    grid = (rows, triton.cdiv(d_out, width), triton.cdiv(seq, tokens))
    with torch.cuda.device_of(h):
        _expand[grid](
            h, B, row_of, pick, scale, live, y, out, seq, d_out, n_ranks, ranks.start // RANKS, ranks.stop // RANKS,
            rows // len(row_of), SEQ=tokens, RANKS=RANKS, WIDTH=width, DOT=dot,
        )  # fmt: skip
    return out


def _blocks(seq: int) -> tuple[int, int, bool]:
    """Tokens and columns of a block, and whether matrix units multiply it."""
    return (32, 64, True) if seq >= SMALLEST else (1, 128, False)
