"""MiLoRA: each layer picks its experts once per prompt, from the prompt's hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composers.milora_gate import KEY, LayerRouter, MiloraGate, balance_loss, noted
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.layers import layer_of, reads_encoder
from loracompose.composition.pooling import POOLERS
from loracompose.composition.rational import COEFFICIENTS, gelu_coefficients
from loracompose.composition.router import Router
from loracompose.composition.settings import check_amount, check_choice, check_count, check_router, filled

DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"form": "adapters", "pooler": "attention", "activation": "rational", "top_k": 2, "balance": 1e-2}
)
FORMS, ACTIVATIONS = ("adapters", "modules"), ("rational", "gelu")
SCALE = 0.01  # standard deviation of the initial experts' vectors


@dataclass(frozen=True)
class Milora(GradientTrained):
    """p = softmax(W_r g(pool(H))) over the experts of a layer, H the prompt's hidden states entering the layer.

    Once per prompt, before its first new token, every layer keeps the top k experts; the choice holds for all later
    tokens. The pooler is self-attention, a = softmax over the prompt's tokens of H w, h = aᵀ H, with a learned w (zeros
    at first, which is the mean); g is a learned rational activation per layer that starts as GeLU. The loss gains
    balance · N Σ_i f_i p̄_i as in Switch, f_i the share of rows whose first choice is expert i, p̄_i its mean
    probability, N the experts that some row may choose; the mean over layers.

    Setting "form":
      * "modules", the paper's: the experts are the modules of the layer, and the router decides which of them get their
        LoRA: y = W x + s_m w B A x, s_m 1 for the chosen modules, 0 for the others. The paper trains one adapter and
        its router together; here the router is trained over a finished adapter. Several members of a row are added up
        at their weights, as in `mixture`.
      * "adapters", the transfer to retrieved adapters, ours: the experts are the adapters of the row, and a layer's
        choice holds for all its modules: y = W x + Σ_i s_i B_i A_i x, s_i = p_i / Σ_kept p. A weight other than 0
        makes an adapter a member of its row, its size does not enter; softmax and choice are over the members.

    Either way the composition of a prompt is static once it is decided: `settle(deltas, attached.memory)` gives it, to
    be cached, and `layer_weights` the choice of every layer. Embeddings and modules outside the layers keep their
    adapters' weights.

    What the paper leaves open, or we do otherwise:
      * Whether outputs are multiplied by p. In "modules" they are not: a chosen module runs as it was trained, and the
        gradient is straight-through, that of s_m = p_m. In "adapters" the shares sum to 1, and their sum is a constant
        for the gradient, so that k = 1 learns too. Experts not chosen get no gradient but that of the balance.
      * k: the text says 3 and also 1, and the printed counts of parameters fit 1 and nearly 2. Setting "top_k", 2.
      * Which experts may be chosen: in "adapters" all members of the row, in "modules" all modules of the layer that
        the router knows. So an adapter that has nothing in a layer, or a module that no member of the row adapts, can
        take one of the k places there (and, in "adapters", a share of the sum), and adds nothing.
      * Bi-level training (activation on the dev set, the rest on the training set) is joint training here.
      * Settings "pooler" ("attention", "last", "mean", "max") and "activation" ("rational", "gelu") are its ablations.
      * Whether w is shared by the layers: each layer has its own.
      * Keys and values of cross-attention read other tokens than their layer: they decide on these, apart.

    Source: MiLoRA: Efficient Mixture of Low-Rank Adaptation for Large Language Models Fine-tuning, arXiv:2410.18035,
    section 3.

    Args:
        router: what it learned, for the adapters it was trained on.

    Raises:
        ValueError: another method's router.
    """

    router: Router

    name: ClassVar[str] = "milora"
    source: ClassVar[str] = "MiLoRA, arXiv:2410.18035"
    scope: ClassVar[Scope] = "prompt"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("Milora", self.name, self.router)

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """Small random experts, mean pooling, GeLU; the settings and what they may be are those of the class."""
        chosen = filled("Milora", settings, DEFAULTS)
        check_choice("Milora", "form", chosen["form"], FORMS)
        check_choice("Milora", "pooler", chosen["pooler"], ("attention", *POOLERS))
        check_choice("Milora", "activation", chosen["activation"], ACTIVATIONS)
        check_count("Milora", "top_k", chosen["top_k"])
        check_amount("Milora", "balance", chosen["balance"])
        layers = layers_of(pool.banks)
        if not layers:
            raise ValueError("milora: the adapters of the pool adapt no linear module inside a layer: nothing to route")
        generator, tensors = torch.Generator().manual_seed(seed), {}
        gelu = gelu_coefficients().float()
        for layer, modules in layers.items():
            experts = len(modules) if chosen["form"] == "modules" else len(pool.names)
            tensors[f"{layer}.experts"] = SCALE * torch.randn(experts, pool.hidden, generator=generator)
            if chosen["pooler"] == "attention":
                tensors[f"{layer}.pooler"] = torch.zeros(pool.hidden)
            if chosen["activation"] == "rational":
                tensors[f"{layer}.activation"] = gelu.clone()
        found = {"hidden": pool.hidden, "modules": layers}
        return Router(cls.name, {**chosen, **found}, tensors, pool.base_model, pool.adapters)

    def auxiliary_loss(self, scratch: Mapping[str, Tensor]) -> Tensor | None:
        """The balance loss, from the probabilities that the layers noted."""
        losses = [balance_loss(probabilities, candidates) for probabilities, candidates in noted(scratch)]
        return torch.stack(losses).mean() * self.router.settings["balance"] if losses else None

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, gated by what its layer chose for the prompt."""
        columns = self.router.columns(next(iter(banks.values())).fingerprints) if banks else []
        return {module: self._delta(bank, weights, columns) for module, bank in banks.items()}

    def _delta(self, bank: RankBank, weights: Tensor, columns: list[int]) -> LowRankDelta:
        layer = layer_of(bank.module)
        gate = self._gate(bank, layer, weights != 0, columns) if bank.kind == "linear" and layer else None
        return LowRankDelta(bank.A, bank.B, bank.per_rank(weights), gate, bank.kind)

    def _gate(self, bank: RankBank, layer: str, members: Tensor, columns: list[int]) -> MiloraGate:
        router, settings = self.router, self.router.settings
        modules: list[str] = settings["modules"].get(layer, [])
        if bank.module not in modules:
            raise LookupError(
                f"the milora router was trained on {router.base_model} without the module {bank.module!r}: train it "
                "again with these adapters"
            )
        if settings["form"] == "modules":
            experts = router.tensor(f"{layer}.experts", (len(modules), settings["hidden"]))
            expert = torch.full_like(bank.owner, modules.index(bank.module))
            members = members.any(dim=1, keepdim=True).expand(-1, len(modules))
        else:
            count = len(router.adapters or ())
            experts = router.tensor(f"{layer}.experts", (count, settings["hidden"]))[columns]
            expert = bank.owner
        key = KEY + layer + (" (encoder)" if reads_encoder(bank.module) else "")
        return MiloraGate(key, self._layer_router(layer, experts), expert, members)

    def _layer_router(self, layer: str, experts: Tensor) -> LayerRouter:
        router, settings = self.router, self.router.settings
        learns_pooler, rational = settings["pooler"] == "attention", settings["activation"] == "rational"
        query = router.tensor(f"{layer}.pooler", (settings["hidden"],)) if learns_pooler else None
        activation = router.tensor(f"{layer}.activation", (COEFFICIENTS,)) if rational else None
        top_k = min(settings["top_k"], len(experts))
        return LayerRouter(experts, query, activation, settings["pooler"], top_k, settings["form"])


def layers_of(banks: Mapping[str, RankBank]) -> dict[str, list[str]]:
    """The linear modules of every layer, both sorted."""
    layers: dict[str, list[str]] = {}
    for module in sorted(banks):
        if banks[module].kind == "linear" and layer_of(module):
            layers.setdefault(layer_of(module), []).append(module)
    return layers


def layer_weights(memory: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What every layer chose for the prompts that have run, from `Attachment.memory`.

    Returns:
        Layer -> multipliers (batch, experts), 0 for those not chosen; experts are the adapters of the banks, sorted by
        content, or the modules of the layer, sorted by path.
    """
    return {key.removeprefix(KEY): decision for key, decision in memory.items() if key.startswith(KEY)}
