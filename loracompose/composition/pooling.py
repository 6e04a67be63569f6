"""Pooling: one vector for a prompt from the vectors of its tokens, padding and answers left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from loracompose.composition.gates import masked_softmax


def pool_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the tokens of the mask.

    Args:
        tokens: (batch, seq, width).
        mask: (batch, seq) bool, True for the tokens that count; None if all do.

    Returns:
        (batch, width); zeros for a row without tokens.
    """
    if mask is None:
        return tokens.mean(dim=1)
    kept = torch.where(mask[..., None], tokens, 0.0)
    return kept.sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp_min(1)


def pool_max(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Largest value of every feature; shapes as for `pool_mean`."""
    if mask is None:
        return tokens.amax(dim=1)
    least = torch.finfo(tokens.dtype).min
    return torch.where(mask.any(dim=1, keepdim=True), tokens.masked_fill(~mask[..., None], least).amax(dim=1), 0.0)


def pool_last(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The last token of the mask; shapes as for `pool_mean`."""
    if mask is None:
        return tokens[:, -1]
    places = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, places, 0).amax(dim=1)  # (batch,)
    return torch.where(mask.any(dim=1, keepdim=True), tokens[torch.arange(len(last), device=last.device), last], 0.0)


def pool_attention(tokens: Tensor, mask: Tensor | None, query: Tensor) -> Tensor:
    """Σ_t a_t h_t with a = softmax over the tokens of ⟨h_t, query⟩; query (width,), other shapes as for `pool_mean`."""
    scores = tokens @ query  # (batch, seq)
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    attention = masked_softmax(scores, mask)
    kept = torch.where(mask[..., None], tokens, 0.0)
    return (attention[:, None, :] @ kept).squeeze(1)


POOLERS: Mapping[str, Callable[[Tensor, Tensor | None], Tensor]] = MappingProxyType(
    {"mean": pool_mean, "max": pool_max, "last": pool_last}
)
