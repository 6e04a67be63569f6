"""Watching gates: what each gate decided in the last forward pass, found again without touching the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import Gate, GateContext, asks_base
from loracompose.composition.layers import layer_of, running_order

NOTED = "watched "  # + module: scratch key of the multipliers that its gate decided


@dataclass(frozen=True, eq=False)
class WatchedGate:
    """A gate that decides as the one inside it and notes every decision in `GateContext.scratch`.

    It names no ranks in advance, so a gate that knows which few ranks act is run in full: the same result, slower.

    Attributes:
        gate: who decides.
    """

    gate: Gate

    @property
    def needs_layer_input(self) -> bool:
        """What the gate inside needs."""
        return self.gate.needs_layer_input

    @property
    def needs_base_states(self) -> bool:
        """What the gate inside needs."""
        return asks_base(self.gate)

    def to(self, device: torch.device, dtype: torch.dtype) -> WatchedGate:
        """The same gate on a device and in a dtype."""
        return WatchedGate(self.gate.to(device, dtype))

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers of the gate inside, broadcastable to (batch, seq, R)."""
        multipliers = self.gate(x, h, w, context)
        context.scratch[NOTED + context.module] = multipliers.detach().expand(h.shape)
        return multipliers


def watch(deltas: Mapping[str, LowRankDelta]) -> dict[str, LowRankDelta]:
    """The same deltas with their gates watched; attach these, run the model once, and read `decisions`."""
    return {
        module: delta if delta.gate is None else replace(delta, gate=WatchedGate(delta.gate))
        for module, delta in deltas.items()
    }


def decisions(scratch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Multipliers (batch, seq, R) per module that watched gates decided in the last pass, in the order they run.

    Args:
        scratch: `Attachment.scratch` of the attachment in which the watched deltas ran.

    Raises:
        LookupError: no watched gate has run.
    """
    found = {key.removeprefix(NOTED): value for key, value in scratch.items() if key.startswith(NOTED)}
    if not found:
        raise LookupError("no watched gate has run: attach watch(deltas) of a gated composer and call the model once")
    return {module: found[module] for module in sorted(found, key=running_order)}


def by_layer(decided: Mapping[str, Tensor], owners: Mapping[str, Tensor], n_adapters: int) -> Tensor:
    """How much of each adapter passes in each layer at each token, (batch, adapters, layers, seq).

    The mean multiplier over the ranks that the adapter has in the layer; nan where it has none.

    Args:
        decided: multipliers (batch, seq, R) per module, of `decisions`.
        owners: adapter of each rank per module, `RankBank.owner`.
        n_adapters: K.

    Raises:
        ValueError: no module lies in a numbered layer.
    """
    layers = list(dict.fromkeys(layer_of(module) for module in decided))
    layers = [layer for layer in layers if layer]
    if not layers:
        raise ValueError(f"none of {', '.join(decided)} lies in a numbered layer")
    shares = [_share([m for m in decided if layer_of(m) == layer], decided, owners, n_adapters) for layer in layers]
    return torch.stack(shares, dim=2)  # (batch, K, layers, seq)


def _share(modules: list[str], decided: Mapping[str, Tensor], owners: Mapping[str, Tensor], n_adapters: int) -> Tensor:
    multipliers = torch.cat([decided[module] for module in modules], dim=-1).mT  # (batch, R, seq)
    owner = torch.cat([owners[module] for module in modules]).to(multipliers.device)  # (R,)
    total = multipliers.new_zeros(multipliers.shape[0], n_adapters, multipliers.shape[2])
    count = torch.bincount(owner, minlength=n_adapters).to(multipliers)
    return total.index_add(1, owner, multipliers) / torch.where(count > 0, count, torch.nan)[:, None]
