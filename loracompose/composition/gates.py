"""Gates: per-token multipliers of the ranks, and what a gate may look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class GateContext:
    """What a gate may see beside its module's own input.

    Attributes:
        module: path of the module that is running.
        layer_input: input of the enclosing transformer layer before its norm, (batch, seq, hidden);
            captured only for gates that set `needs_layer_input`. For the keys and values of cross-attention, which read
            the encoder's tokens, the encoder's states: they are then the module's own input.
        attention_mask: the mask of the tokens that the module reads, (batch, total_seq), 1 for real ones, as it was
            given to the model, or to its encoder or decoder; None if none was.
        prompt_mask: (batch, seq), True for the tokens of the prompts, where a call holds prompts and answers
            (training); None where it does not.
        memory: this request's own store; what a gate writes at prefill it finds again at every decoding step.
        scratch: the store of one forward pass of the model, emptied before the next: for what the modules of a layer
            share, and for the live gates that a training loss is made of.
        base_states: last hidden states of the base without any delta, of the tokens that the module reads,
            (batch, seq, hidden), in the model's dtype; made only for gates that set `needs_base_states`.
    """

    module: str
    layer_input: Tensor | None = None
    attention_mask: Tensor | None = None
    prompt_mask: Tensor | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    scratch: dict[str, Tensor] = field(default_factory=dict)
    base_states: Tensor | None = None

    def valid(self, seq: int) -> Tensor | None:
        """Which of the `seq` tokens of this call are real, (batch, seq) bool; None if all are."""
        mask = self.attention_mask
        if mask is None or mask.ndim == 2:
            return None if mask is None else mask[:, -seq:] != 0
        # For a static cache `generate` makes it (batch, heads, queries, keys), True or 0 where a query reads a key,
        # with room for the keys to come. A real token reads itself.
        reads = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        end = int(reads.flatten(0, 1).any(dim=0).nonzero().max()) + 1
        return reads.diagonal(offset=end - seq, dim1=1, dim2=2)[:, :seq]

    def prompt(self, seq: int) -> Tensor | None:
        """Which of the `seq` tokens of the first call belong to the prompt, (batch, seq) bool; None if all do."""
        return self.valid(seq) if self.prompt_mask is None else self.prompt_mask


def masked_softmax(logits: Tensor, mask: Tensor) -> Tensor:
    """Softmax over the entries of the last axis where the mask is True; 0 elsewhere, also where none is.

    A softmax of nothing but -inf is nan, and so is its gradient: thrown away or not, anomaly detection stops at it.

    Args:
        logits: (..., K).
        mask: broadcastable to (..., K), bool.
    """
    some = mask.any(dim=-1, keepdim=True)
    open_ = mask | ~some  # a row of nobody is computed over everybody, and dropped
    return logits.masked_fill(~open_, -torch.inf).softmax(dim=-1).masked_fill(~mask, 0.0)


def once(store: dict[str, Tensor], key: str, decide: Callable[[], Tensor]) -> Tensor:
    """The decision kept in a store under this key, made now if it is the first time it is asked for."""
    if key not in store:
        store[key] = decide()
    return store[key]


class Gate(Protocol):
    """Decides, token by token, how much of each rank passes."""

    @property
    def needs_layer_input(self) -> bool:
        """Whether it looks at `GateContext.layer_input`."""
        ...

    def to(self, device: torch.device, dtype: torch.dtype) -> Gate:
        """The same gate with its tensors where the module computes; called once, not per token."""
        ...

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers of h.

        Args:
            x: input of the module, (batch, seq, d_in); token ids (batch, seq) for an embedding.
            h: x Aᵀ, (batch, seq, R).
            w: weights of the ranks, (batch, R); 0 where the rank's adapter is not a member of the row.
            context: what else a gate may look at.

        Returns:
            Multipliers, broadcastable to (batch, seq, R), weights included.
        """
        ...


@runtime_checkable
class BaseStatesGate(Gate, Protocol):
    """A gate that decides on what the base makes of the text before any adapter acts: every pass costs two."""

    @property
    def needs_base_states(self) -> bool:
        """Whether it looks at `GateContext.base_states`."""
        ...


def asks_base(gate: Gate | None) -> bool:
    """Whether a gate needs a first pass of the base."""
    # None first: to look for the members of a protocol takes longer than all else that is asked of a static delta
    return gate is not None and isinstance(gate, BaseStatesGate) and gate.needs_base_states


@runtime_checkable
class SparseGate(Gate, Protocol):
    """A gate that knows from x alone which ranks act on a token, so that the others need not be multiplied."""

    @property
    def n_active(self) -> int | None:
        """How many ranks act on each token; None if it cannot name them."""
        ...

    def few(self, x: Tensor, w: Tensor, context: GateContext) -> tuple[Tensor, Tensor]:
        """The ranks that act and their multipliers, both (batch, seq, n_active); arguments as for `__call__`."""
        ...
