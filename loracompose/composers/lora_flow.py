"""LoRA-Flow: in every layer a token's own mixture of the adapters, from the state that enters the layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext, masked_softmax, once
from loracompose.composition.layers import layer_of
from loracompose.composition.linalg import working_dtype
from loracompose.composition.router import Router
from loracompose.composition.settings import check_router, filled, is_finite

DEFAULTS: Mapping[str, Any] = {"task": None, "temperature": 1.0}


@dataclass(frozen=True)
class LoraFlow(GradientTrained):
    """y = W x + Σ_i w_i B_i A_i x with w = softmax(W_gate h / T) + b, one gate for all modules of a layer.

    h is the layer's input at that token, before its norm; W_gate (K, hidden) and b (K,) are the layer's own. The bias
    stands outside the softmax, so the weights of a token need not sum to 1 nor be positive. The start is W_gate = 0 and
    b_i = 1[i is the task's adapter] - 1/K, at which the composition is the adapter `task` alone; without a task b = 0
    and it is the mean of all. The authors have two adapters, a language's and a task's, and b = (-1/2, 1/2): ours is
    theirs for K = 2.

    Open in the paper, decided here. A row may have any of the adapters that the router was trained with as members (a
    weight other than 0; its size does not enter): the softmax runs over the members, and their biases are shifted by
    one number so that the weights of a row sum to what those of all adapters would, 1 + Σ_i b_i. At the start a set
    with the task's adapter is that adapter, one without is the mean of its members. A member that lacks a module keeps
    its share there, unused, because the gate is the layer's. Modules outside the layers, such as embeddings, have no
    layer input: their ranks count with the weights of the row. Keys and values of cross-attention read the encoder's
    tokens, so their gate looks at these. Training uses T = 1; the authors raise it to 1.1 for some of their tests.

    Source: LoRA-Flow, arXiv:2402.11455, and the authors' code. Settings of the router: `task` and `temperature`.

    Args:
        router: what was learned.
        temperature: T at inference; None is the one it was trained with.

    Raises:
        ValueError: another method's router, or a temperature that is not above 0.
    """

    router: Router
    temperature: float | None = None

    name: ClassVar[str] = "lora_flow"
    source: ClassVar[str] = "LoRA-Flow, arXiv:2402.11455"
    scope: ClassVar[Scope] = "token"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("LoraFlow", self.name, self.router)
        if self.temperature is not None:
            _check_temperature(self.temperature)

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """The task's adapter alone, or the mean of all; nothing is drawn.

        Raises:
            ValueError: an unknown setting, or a temperature that is not above 0.
            LookupError: the pool has no adapter named `task`.
        """
        chosen = filled("LoraFlow", settings, DEFAULTS)
        _check_temperature(chosen["temperature"])
        K, task = len(pool.names), chosen["task"]
        if task is not None and task not in pool.names:
            raise LookupError(f"LoraFlow: no adapter is named {task!r} (task); there are {', '.join(pool.names)}")
        bias = torch.zeros(K)
        if task is not None:
            bias = torch.tensor([float(name == task) for name in pool.names]) - 1 / K
        tensors = {}
        for layer in sorted({layer_of(module) for module in pool.banks} - {""}):
            tensors[f"{layer}.gate"], tensors[f"{layer}.bias"] = torch.zeros(K, pool.hidden), bias.clone()
        return Router(cls.name, {**chosen, "hidden": pool.hidden}, tensors, pool.base_model, pool.adapters)

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, gated by its adapter's share of the token.

        Raises:
            LookupError: an adapter or a layer that the router was not trained for.
            ValueError: the router has tensors of other shapes.
        """
        gates = self._gates(banks, weights != 0) if banks else {}
        deltas = {}
        for module, bank in banks.items():
            layer = layer_of(module)
            gate = FlowGate(gates[layer], bank.owner) if layer else None
            deltas[module] = LowRankDelta(bank.A, bank.B, bank.per_rank(weights), gate, bank.kind)
        return deltas

    def _gates(self, banks: Mapping[str, RankBank], members: Tensor) -> dict[str, LayerGate]:
        fingerprints = next(iter(banks.values())).fingerprints
        columns = self.router.columns(fingerprints)
        K, hidden = len(self.router.adapters or ()), self.router.settings["hidden"]
        temperature = self.temperature or self.router.settings["temperature"]
        gates = {}
        for layer in sorted({layer_of(module) for module in banks} - {""}):
            weight, bias = self.router.tensor(f"{layer}.gate", (K, hidden)), self.router.tensor(f"{layer}.bias", (K,))
            gates[layer] = LayerGate(layer, weight[columns], bias[columns], bias.sum(), members, temperature)
        return gates


@dataclass(frozen=True, eq=False)
class LayerGate:
    """The shares of a layer's tokens.

    Attributes:
        layer: its path.
        weight: W_gate of the K adapters, (K, hidden).
        bias: b of the K adapters, (K,).
        total: Σ b over all adapters of the router, a scalar.
        members: (batch, K) bool.
        temperature: T.
    """

    layer: str
    weight: Tensor
    bias: Tensor
    total: Tensor
    members: Tensor
    temperature: float

    def to(self, device: torch.device, dtype: torch.dtype) -> LayerGate:
        """The same gate on a device; biases, which are added to a softmax, in float32 or better."""
        exact = torch.promote_types(dtype, torch.float32)
        bias, total = self.bias.to(device, exact), self.total.to(device, exact)
        weight, members = self.weight.to(device, dtype), self.members.to(device)
        return replace(self, weight=weight, bias=bias, total=total, members=members)

    def shares(self, x: Tensor) -> Tensor:
        """The layer's input (rows, seq, hidden) to the adapters' weights, (rows, seq, K).

        Raises:
            ValueError: the layer is of another width.
        """
        if x.shape[-1] != self.weight.shape[-1]:
            raise ValueError(
                f"the lora_flow router was trained on a base of width {self.weight.shape[-1]}, {self.layer!r} has "
                f"{x.shape[-1]}: train one for this base"
            )
        logits = x @ self.weight.mT
        logits = logits.to(working_dtype(logits)) / self.temperature  # (rows, seq, K)
        # beams and samples of a row stand side by side
        member = self.members.repeat_interleave(x.shape[0] // self.members.shape[0], dim=0)  # (rows, K)
        count = member.sum(dim=-1, keepdim=True).clamp_min(1)  # (rows, 1)
        shift = (self.total - (member * self.bias).sum(dim=-1, keepdim=True)) / count  # (rows, 1)
        bias = member * (self.bias + shift)  # (rows, K)
        return masked_softmax(logits, member[:, None]) + bias[:, None]


@dataclass(frozen=True, eq=False)
class FlowGate:
    """Spreads its layer's shares over the ranks of one module.

    Attributes:
        layer: the gate that all modules of the layer share.
        owner: adapter of each rank, (R,).
    """

    layer: LayerGate
    owner: Tensor

    needs_layer_input: ClassVar[bool] = True

    def to(self, device: torch.device, dtype: torch.dtype) -> FlowGate:
        """The same gate on a device and in a dtype."""
        return replace(self, layer=self.layer.to(device, dtype), owner=self.owner.to(device))

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R): the share of each rank's adapter."""
        state = context.layer_input
        if state is None:
            raise ValueError(f"{context.module}: the gate of LoRA-Flow needs the layer's input; run it with attach")
        # x itself where it is the encoder's tokens that the module reads
        key = f"lora_flow {self.layer.layer} {'encoder' if state is x else 'own'}"
        shares = once(context.scratch, key, lambda: self.layer.shares(state))  # (batch, seq, K)
        return shares.to(h)[..., self.owner]


def _check_temperature(temperature: object) -> None:
    if not (is_finite(temperature) and temperature > 0):
        raise ValueError(f"LoraFlow: temperature must be a finite number above 0, got {temperature!r}")
