"""Updates entry by entry, a bounded block of rows at a time, and back to ranks.

Methods that look at single entries of delta_W (trimming, sign election, dropping) cannot stay factored. Here they
see delta_W as blocks of rows that are made from the factors, used, and forgotten: memory is bounded by a budget
and by the factors handed back, not by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from loracompose.composition.grouping import ModuleGroup
from loracompose.composition.linalg import truncate

BLOCK_BYTES = 1 << 28
"""Default budget of dense entries in memory at once: 256 MiB holds the largest matrix of an 8B model in float32."""

BLOCK_ENTRIES = 1 << 16  # of one block: small enough to stay in the cache between the operations on it
CHUNK_BYTES = 1 << 20  # of the modules treated together on a CPU: what is merged is compressed while it is in the cache

OVERSAMPLING = 8
POWER_ITERATIONS = 2

Block = tuple[slice, Tensor]  # rows, (G, rows, d_in)
Blocks = Callable[[], Iterable[Block]]  # makes the blocks of all rows anew, in order


def chunks(groups: Sequence[ModuleGroup], block_bytes: int) -> list[ModuleGroup]:
    """Groups cut so that the updates of each fit in the budget and, on a CPU, its cache, or it is a single module."""
    parts: list[ModuleGroup] = []
    for group in groups:
        room = min(block_bytes, CHUNK_BYTES) if group.A[0].device.type == "cpu" else block_bytes
        parts += group.split(max(1, room // (_row_bytes(group) * group.d_out)))
    return parts


def row_blocks(chunk: ModuleGroup, block_bytes: int) -> Iterator[slice]:
    """The rows of a chunk in slices that fit the budget and the cache, at least one row each."""
    budget = min(block_bytes, BLOCK_ENTRIES * chunk.working_dtype.itemsize)
    height = max(1, budget // (_row_bytes(chunk) * len(chunk.modules)))
    for start in range(0, chunk.d_out, height):
        yield slice(start, min(start + height, chunk.d_out))


def _row_bytes(group: ModuleGroup) -> int:
    return group.d_in * group.working_dtype.itemsize


def member_updates(chunk: ModuleGroup, rows: slice) -> list[Tensor]:
    """Rows of each member's delta_W, one (G, rows, d_in) per member; bit-equal each time it is called."""
    dtype = chunk.working_dtype
    return [B[:, rows].to(dtype) @ A.to(dtype) for A, B in zip(chunk.A, chunk.B, strict=True)]


def picked_entries(chunk: ModuleGroup, member: int, stride: int) -> Tensor:
    """Every stride-th entry of a member's delta_W, row after row through all modules; no other entry is computed."""
    A, B = (factor[member].to(chunk.working_dtype) for factor in (chunk.A, chunk.B))
    entry = torch.arange(0, len(chunk.modules) * chunk.d_out * chunk.d_in, stride, device=A.device)
    row, column = entry // chunk.d_in, entry % chunk.d_in
    module = row // chunk.d_out
    return (B.flatten(0, 1)[row] * A.mT[module, column]).sum(dim=-1)


def compress(chunk: ModuleGroup, blocks: Blocks, rank: int, seed: int, block_bytes: int) -> tuple[Tensor, Tensor]:
    """Factors of at most `rank` ranks for modules given as blocks of rows.

    Randomised range finder with 8 ranks of oversampling and 2 power iterations (Halko, Martinsson and Tropp,
    arXiv:0909.4061, algorithms 4.4 and 5.1): exact where the rank of the update is at most `rank`, otherwise within
    a per mille or so of the best error. From rank = min(d_in, d_out) on, the update itself is handed back
    with the identity as its other factor: exact, and no larger than what a decomposition would return.

    Args:
        chunk: the modules; only their widths, dtype and device are used.
        blocks: makes the blocks; called once if the updates fit in the budget, six times otherwise.
        rank: ranks to keep.
        seed: of the random test matrix, which all modules share.
        block_bytes: budget within which the updates are kept instead of being made again.

    Returns:
        A (G, rank', d_in) and B (G, d_out, rank') with rank' = min(rank, d_in, d_out).
    """
    narrow = min(chunk.d_in, chunk.d_out)
    if rank >= narrow:
        return _identity_factors(_whole(chunk, blocks))
    if _row_bytes(chunk) * chunk.d_out * len(chunk.modules) <= block_bytes:
        blocks = _kept(_whole(chunk, blocks))
    P = _test_matrix(chunk, min(rank + OVERSAMPLING, narrow), seed)  # (d_in, l)
    Q = _range(blocks, P)  # (G, d_out, l)
    for _ in range(POWER_ITERATIONS):
        Q = _range(blocks, torch.linalg.qr(_pull(chunk, blocks, Q)).Q)
    return truncate(_pull(chunk, blocks, Q).mT, Q, rank)


def _kept(update: Tensor) -> Blocks:
    def blocks() -> Iterable[Block]:
        return [(slice(None), update)]

    return blocks


def _whole(chunk: ModuleGroup, blocks: Blocks) -> Tensor:
    """The updates of the chunk, (G, d_out, d_in)."""
    shape = (len(chunk.modules), chunk.d_out, chunk.d_in)
    update = torch.empty(shape, dtype=chunk.working_dtype, device=chunk.A[0].device)
    for rows, block in blocks():
        update[:, rows] = block
    return update


def _identity_factors(update: Tensor) -> tuple[Tensor, Tensor]:
    groups, d_out, d_in = update.shape
    eye = torch.eye(min(d_in, d_out), dtype=update.dtype, device=update.device).expand(groups, -1, -1)
    return (update, eye) if d_out <= d_in else (eye, update)


def _test_matrix(chunk: ModuleGroup, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    test = torch.randn(chunk.d_in, columns, generator=generator, dtype=torch.float64)
    return test.to(chunk.A[0].device, chunk.working_dtype)


def _range(blocks: Blocks, P: Tensor) -> Tensor:
    """An orthonormal basis of delta_W P, (G, d_out, l)."""
    basis: Tensor = torch.linalg.qr(torch.cat([block @ P for _, block in blocks()], dim=1)).Q
    return basis


def _pull(chunk: ModuleGroup, blocks: Blocks, Q: Tensor) -> Tensor:
    """delta_Wᵀ Q, (G, d_in, l)."""
    pulled = torch.zeros(Q.shape[0], chunk.d_in, Q.shape[-1], dtype=Q.dtype, device=Q.device)
    for rows, block in blocks():
        pulled += block.mT @ Q[:, rows]
    return pulled
