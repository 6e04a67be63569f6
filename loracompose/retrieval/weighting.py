"""From scores to weights: posterior, softmax, uniform or all on the best, and the temperature that fits an index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Weighting = Literal["posterior", "softmax", "uniform", "top1", "cautious"]
WEIGHTINGS: tuple[str, ...] = get_args(Weighting)

DEFAULT_TEMPERATURE = 0.05
"""Used where there is nothing to fit: one adapter, or one example each."""

CAUTIOUS_TEMPERATURE, TYPICAL = 4.0, 0.05

SHARPEST, FLATTEST = 0.002, 1.0

_NOTHING = 60.0
"""Temperatures below the best at which a score adds e^-60 of it to a sum: nothing, even a million times."""


def softmax_weights(scores: Tensor, temperature: float) -> Tensor:
    """softmax(scores / temperature) over the retrieved of each row.

    Args:
        scores: (batch, K), -inf where not retrieved.
        temperature: above 0; the smaller, the sharper.

    Returns:
        (batch, K) float32, rows sum to 1, or to 0 where nothing was retrieved.
    """
    return torch.softmax(scores.double() / temperature, dim=-1).nan_to_num(0.0).float()


def uniform_weights(scores: Tensor) -> Tensor:
    """The same weight for each retrieved adapter, (batch, K) float32; the weights of LoraRetriever's mixture."""
    retrieved = torch.isfinite(scores).float()
    return retrieved / retrieved.sum(dim=-1, keepdim=True).clamp(min=1.0)


def top1_weights(scores: Tensor) -> Tensor:
    """Weight 1 on the best retrieved adapter, the first of equals, (batch, K) float32."""
    weights = torch.zeros_like(scores, dtype=torch.float32)
    if scores.shape[-1]:
        best = scores.argmax(dim=-1, keepdim=True)  # (batch, 1)
        weights.scatter_(-1, best, 1.0)
    return weights * torch.isfinite(scores)


def cautious_weights(
    posterior: Tensor,
    scores: Tensor,
    typicality: Tensor | None,
    *,
    temperature: float = CAUTIOUS_TEMPERATURE,
    alpha: float = TYPICAL,
) -> Tensor:
    """The posterior where a prompt is typical of what it may get, and a flatter one elsewhere.

    Ours: a posterior says which adapter fits best and is sure of it even where none fits; how usual a prompt is says
    whether to believe it.

    Args:
        posterior: weights of the retrieved, (batch, K).
        scores: logarithms of p(adapter | prompt), (batch, K), -inf where not retrieved.
        typicality: conformal p-value of each prompt, (batch,).
        temperature: of the others' scores; 1 is the posterior.
        alpha: a prompt is typical above this.

    Returns:
        (batch, K) float32.

    Raises:
        ValueError: nobody knows how typical the prompts are.
    """
    if typicality is None:
        raise ValueError("weighting 'cautious' needs an index whose searches tell how typical a prompt is")
    usual = (typicality > alpha).to(posterior.device)[:, None]
    return torch.where(usual, posterior, softmax_weights(scores, temperature))


def fit_temperature(means: NDArray[np.float32], examples: Sequence[NDArray[np.float32]], rows: Sequence[int]) -> float:
    """The temperature under which held-out example prompts choose their own adapter with the best likelihood.

    Each example is held out in turn: the mean of its own adapter is taken without it. The mean negative log
    likelihood of the own adapter, under a softmax over all adapters, is minimised over [0.002, 1]. Ours;
    LoraRetriever weighs uniformly.

    Args:
        means: representations of all N adapters, (N, dimension), unit.
        examples: unit embeddings of the examples of some adapters, each (examples, dimension).
        rows: the row of `means` that each of them belongs to.

    Returns:
        The temperature; `DEFAULT_TEMPERATURE` if there are fewer than two adapters or nothing to hold out.
    """
    scores, own = held_out_cosines(means, examples, rows)
    if len(means) < 2 or not len(own):
        return DEFAULT_TEMPERATURE
    temperature, _ = likeliest_temperature(scores, own, SHARPEST, FLATTEST)
    return temperature


def held_out_cosines(
    means: NDArray[np.float32], examples: Sequence[NDArray[np.float32]], rows: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Cosines of examples with all means, (queries, N), their own mean without them; and their own column.

    Arguments as for `fit_temperature`. An adapter of one example gives no query.
    """
    held_out = [_held_out(means, own, row) for own, row in zip(examples, rows, strict=True) if len(own) > 1]
    if not held_out:
        return np.zeros((0, len(means)), dtype=np.float32), np.zeros(0, dtype=np.int64)
    return np.concatenate([part for part, _ in held_out]), np.concatenate([own for _, own in held_out])


def likeliest_temperature(
    scores: NDArray[Any], own: NDArray[np.int64], sharpest: float = 1e-3, flattest: float = 1e3
) -> tuple[float, float]:
    """The temperature in a range that gives the own adapters the best likelihood, and its mean logarithm.

    The mean negative log likelihood under softmax(scores / temperature) is convex in 1 / temperature; the sign of
    its derivative, E_p[score] - own score, is bisected.

    Args:
        scores: (queries, N), at least one query.
        own: the column of each query's own adapter, (queries,).
        sharpest: lower end of the range.
        flattest: upper end of the range.
    """
    below = scores - scores.max(axis=1, keepdims=True)  # shifted once, for exp at any temperature
    gap = below[np.arange(len(own)), own]
    low, high = np.log(sharpest), np.log(flattest)
    left = _Left(below.ravel(), np.arange(0, below.size, below.shape[1]))
    for _ in range(20):
        middle = (low + high) / 2
        p = np.exp(left.values / np.exp(middle).astype(below.dtype))
        expected = left.sums(p * left.values) / left.sums(p)
        if float(np.mean(expected - gap)) > 0:  # the likelihood falls with 1 / temperature: too sharp
            low = middle
        else:
            high = middle
            left = left.above(-_NOTHING * np.exp(high))
    temperature = float(np.exp((low + high) / 2))
    total = np.log(left.sums(np.exp(left.values / temperature)))
    return temperature, float(np.mean(gap / temperature - total))


class _Left(NamedTuple):
    """Of scores below the best of their row those that still count: row after row, and where each row starts."""

    values: NDArray[Any]
    starts: NDArray[np.int64]

    def sums(self, values: NDArray[Any]) -> NDArray[Any]:
        """The sum of each row of so many values, (rows,)."""
        return np.asarray(np.add.reduceat(values, self.starts))

    def above(self, least: float) -> _Left:
        """Without those that are lower; the same where few are."""
        kept = self.values >= least  # the best of each row always is
        if 2 * np.count_nonzero(kept) > len(kept):
            return self
        return _Left(self.values[kept], np.concatenate([[0], np.cumsum(kept)])[self.starts])


def log_softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Logarithm of the softmax of each row, (batch, N)."""
    if not scores.shape[-1]:
        return scores
    below = scores - scores.max(axis=-1, keepdims=True)
    return np.asarray(below - np.log(np.exp(below).sum(axis=-1, keepdims=True)))


def _held_out(
    means: NDArray[np.float32], own: NDArray[np.float32], row: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores of one adapter's examples, (m, N), with its own mean leaving each out; and its own column, (m,)."""
    rest = own.sum(axis=0) - own  # (m, dimension), the sum over the other examples
    norms = np.linalg.norm(rest, axis=1)
    usable = norms > 1e-6
    kept, rest = own[usable], rest[usable] / norms[usable, None]
    scores = kept @ means.T  # (m, N)
    scores[:, row] = np.einsum("md,md->m", kept, rest)
    return scores, np.full(len(scores), row)
