"""Linear algebra on factored updates: a d_out x d_in matrix is never formed.

Everything takes leading batch axes, so that the modules of a model can be treated in one call, and works
in float32 or, for float64 input, in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float32, or float64 if a tensor is: decompositions are not made in half precision."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def factored_svd(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of B @ A by QR of both factors and an SVD of the small core, which is made in float64.

    In single precision the core would lose most: where two singular values lie close together, its rounding turns
    their directions, and a truncation between them keeps another one. The core is small, so this costs little.

    Args:
        A: (..., r, d_in).
        B: (..., d_out, r).

    Returns:
        U (..., d_out, q), S (..., q) descending, Vt (..., q, d_in) with q = min(r, d_in, d_out). The sign of
        each pair is fixed: the entry of Vt with the largest magnitude is positive.
    """
    dtype = working_dtype(A, B)
    Qb, Rb = torch.linalg.qr(B.to(dtype))  # (..., d_out, p), (..., p, r)
    Qa, Ra = torch.linalg.qr(A.to(dtype).mT)  # (..., d_in, q), (..., q, r)
    precise = dtype if A.device.type == "mps" else torch.float64  # which Metal does not have
    U, S, Vt = torch.linalg.svd(Rb.to(precise) @ Ra.to(precise).mT, full_matrices=False)
    U, S, Vt = Qb @ U.to(dtype), S.to(dtype), Vt.to(dtype) @ Qa.mT
    peak = Vt.abs().argmax(dim=-1, keepdim=True)
    sign = torch.where(Vt.gather(-1, peak) < 0, -1.0, 1.0).to(dtype)  # (..., q, 1)
    return U * sign.mT, S, Vt * sign


def canonical(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """The same B @ A with singular directions as ranks, largest first and balanced: ‖a_i‖ = ‖b_i‖ = √s_i.

    Keeps the number of ranks: directions of singular value 0 are zero ranks. What a rank-wise method makes of
    these does not depend on the gauge (A, B) -> (M⁻¹A, BM), except between equal singular values.
    """
    U, S, Vt = factored_svd(A, B)
    floor = S.amax(dim=-1, keepdim=True) * torch.finfo(S.dtype).eps * max(A.shape[-1], B.shape[-2])
    root = torch.where(S > floor, S, torch.zeros_like(S)).sqrt()
    pad = A.shape[-2] - S.shape[-1]
    A_out = torch.nn.functional.pad(root[..., None] * Vt, (0, 0, 0, pad))
    B_out = torch.nn.functional.pad(U * root[..., None, :], (0, pad))
    return A_out.to(A.dtype), B_out.to(B.dtype)


def truncate(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B @ A of at most `rank` ranks, balanced.

    Raises:
        ValueError: rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    A, B = canonical(A, B)
    return A[..., :rank, :], B[..., :rank]


def frobenius(A: Tensor, B: Tensor) -> Tensor:
    """‖B A‖_F, (...), free of the cancellation that a Gram matrix would suffer."""
    dtype = working_dtype(A, B)
    Rb = torch.linalg.qr(B.to(dtype), mode="r").R
    Ra = torch.linalg.qr(A.to(dtype).mT, mode="r").R
    core: Tensor = Rb @ Ra.mT
    norm: Tensor = torch.linalg.vector_norm(core, dim=(-2, -1))
    return norm
