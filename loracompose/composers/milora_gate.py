"""The gate of MiLoRA: a layer's choice of experts for a prompt, made by the first of its modules that runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from loracompose.composition.gates import GateContext, masked_softmax, once
from loracompose.composition.pooling import POOLERS, pool_attention
from loracompose.composition.prompt_gates import fit_rows
from loracompose.composition.rational import rational

Form = Literal["adapters", "modules"]
KEY = "milora."  # of decisions in a memory
PROBABILITIES, CANDIDATES = "milora.probabilities.", "milora.candidates."  # of what is noted for the loss


@dataclass(frozen=True, eq=False)
class LayerRouter:
    """How a layer decides.

    Attributes:
        experts: W_r, (E, hidden).
        query: w of the pooler, (hidden,); None for poolers that learn nothing.
        activation: coefficients of the rational activation, (12,); None for GeLU.
        pooler: "attention" or a key of POOLERS.
        top_k: experts kept.
        form: "adapters": those kept share 1; "modules": each kept counts 1.
    """

    experts: Tensor
    query: Tensor | None
    activation: Tensor | None
    pooler: str
    top_k: int
    form: Form

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerRouter:
        """The same on a device, in float32 or better."""
        dtype = torch.promote_types(dtype, torch.float32)
        query = None if self.query is None else self.query.to(device=device, dtype=dtype)
        activation = None if self.activation is None else self.activation.to(device=device, dtype=dtype)
        return replace(self, experts=self.experts.to(device=device, dtype=dtype), query=query, activation=activation)

    def logits(self, tokens: Tensor, prompt: Tensor | None) -> Tensor:
        """W_r g(pool(H)), (batch, E), from hidden states (batch, seq, hidden) and the prompt's mask (batch, seq)."""
        tokens = tokens.to(self.experts.dtype)
        if self.query is None:
            pooled = POOLERS[self.pooler](tokens, prompt)  # (batch, hidden)
        else:
            pooled = pool_attention(tokens, prompt, self.query)
        activated = F.gelu(pooled) if self.activation is None else rational(pooled, self.activation)
        return activated @ self.experts.mT

    def choose(self, logits: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts count, and their probabilities; all (batch, E)."""
        p = masked_softmax(logits, candidates)
        best = logits.masked_fill(~candidates, -torch.inf).topk(self.top_k, dim=1).indices  # (batch, k)
        kept = torch.zeros_like(candidates).scatter(1, best, True) & candidates
        if self.form == "modules":
            return torch.where(kept, 1 + (p - p.detach()), 0.0), p  # straight-through: 1 forward, p backward
        shares = torch.where(kept, p, 0.0)
        total = shares.detach().sum(dim=1, keepdim=True)
        return shares / torch.where(total > 0, total, 1.0), p


@dataclass(frozen=True, eq=False)
class MiloraGate:
    """What a rank's expert counts in this layer.

    Attributes:
        key: of the layer's decision in the memory.
        router: how the layer decides.
        expert: the expert of each rank, (R,).
        candidates: experts that a row may choose, (batch, E) bool.
    """

    key: str
    router: LayerRouter
    expert: Tensor
    candidates: Tensor

    needs_layer_input: ClassVar[bool] = True

    def to(self, device: torch.device, dtype: torch.dtype) -> MiloraGate:
        """The same gate on a device and in a dtype."""
        expert, candidates = self.expert.to(device), self.candidates.to(device)
        return replace(self, router=self.router.to(device, dtype), expert=expert, candidates=candidates)

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, 1, R)."""
        once(context.memory, self.key, lambda: self._decide(context))
        return self.multipliers(w, context.memory)[:, None, :].to(h)

    def multipliers(self, w: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """What each rank's expert counts, (batch, R), times the weights where the experts are modules."""
        if self.key not in memory:
            raise ValueError(f"milora: {self.key.removeprefix(KEY)} has not decided: the prompts have not run yet")
        chosen = fit_rows(memory[self.key], w.shape[0]).to(w.device)[:, self.expert.to(w.device)]
        return chosen * w if self.router.form == "modules" else chosen

    def _decide(self, context: GateContext) -> Tensor:
        tokens = context.layer_input
        if tokens is None:
            raise ValueError(f"milora: {context.module} was run without the hidden states that enter its layer")
        logits = self.router.logits(tokens, context.prompt(tokens.shape[1]))
        candidates = fit_rows(self.candidates, len(logits))
        chosen, p = self.router.choose(logits, candidates)
        context.scratch[PROBABILITIES + self.key], context.scratch[CANDIDATES + self.key] = p, candidates
        return chosen


def noted(scratch: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Live probabilities and candidates, both (batch, experts), of every layer that ran in a pass."""
    for key in sorted(scratch):
        if key.startswith(PROBABILITIES):
            yield scratch[key], scratch[CANDIDATES + key.removeprefix(PROBABILITIES)]


def balance_loss(probabilities: Tensor, candidates: Tensor) -> Tensor:
    """N Σ_i f_i p̄_i over the rows that have candidates, a scalar: 1 at balance, N if all rows take one expert.

    Args:
        probabilities: (batch, E), 0 for experts that are no candidates.
        candidates: (batch, E) bool.
    """
    rows = candidates.any(dim=1)  # (batch,)
    n_rows = rows.sum().clamp_min(1)
    first = F.one_hot(probabilities.argmax(dim=1), probabilities.shape[1]).to(probabilities) * rows[:, None]
    f, mean = first.sum(dim=0) / n_rows, probabilities.sum(dim=0) / n_rows  # (E,)
    return candidates.any(dim=0).sum() * (f * mean).sum()
