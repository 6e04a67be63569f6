"""Gates that are decided once per prompt: finding the decision again, and the static composition that it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Protocol, runtime_checkable

from torch import Tensor

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import Gate


@runtime_checkable
class PromptGate(Gate, Protocol):
    """A gate whose multipliers are the same for every token of a row, once they are decided."""

    def multipliers(self, w: Tensor, memory: Mapping[str, Tensor]) -> Tensor:
        """Multipliers of the ranks, (rows, R), from weights (rows, R) and the decisions in the memory of the request.

        Raises:
            ValueError: nothing is decided yet.
        """
        ...


def fit_rows(values: Tensor, rows: int) -> Tensor:
    """Values (n, ...) for `rows` rows, where each row stands several times in a row, as `generate` lays out beams.

    The encoder of an encoder-decoder runs a prompt once and its decoder once per beam, so a decision may have fewer
    rows than its user, or more.

    Raises:
        ValueError: neither number is a multiple of the other.
    """
    if rows == len(values):
        return values
    if rows % len(values) == 0:
        return values.repeat_interleave(rows // len(values), dim=0)
    if len(values) % rows == 0:
        return values[:: len(values) // rows]
    raise ValueError(f"a decision for {len(values)} rows cannot serve {rows}: one must be a multiple of the other")


def settle(deltas: Mapping[str, LowRankDelta], memory: Mapping[str, Tensor]) -> dict[str, LowRankDelta]:
    """The static deltas that a prompt's decisions amount to, to be kept and run again without any gate.

    After the prompts have run, `settle(deltas, attached.memory)` has the effect of the deltas on every token of these
    prompts and of their answers. Row i of it is a plain LoRA: A, and B with the weights of the row folded in.

    Args:
        deltas: what a composer of scope "prompt" made.
        memory: of the attachment in which the prompts ran, `Attachment.memory`.

    Raises:
        ValueError: a gate has not decided, or decides by token.
    """
    return {module: _settled(module, delta, memory) for module, delta in deltas.items()}


def _settled(module: str, delta: LowRankDelta, memory: Mapping[str, Tensor]) -> LowRankDelta:
    if delta.gate is None:
        return delta
    if not isinstance(delta.gate, PromptGate):
        raise ValueError(f"{module}: {type(delta.gate).__name__} decides by token, which no static delta equals")
    weights = delta.gate.multipliers(delta.weights, memory)
    return replace(delta, weights=weights.to(delta.weights), gate=None)
