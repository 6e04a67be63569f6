"""X-LoRA: the base reads the text first, and what it thinks of a token decides who adapts it in the second pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext, masked_softmax
from loracompose.composition.prompt_gates import fit_rows
from loracompose.composition.router import Router
from loracompose.composition.settings import check_choice, check_count, check_router, filled

GRANULARITIES = ("matrix", "network")
DEFAULTS: Mapping[str, Any] = MappingProxyType({"granularity": "matrix", "depth": 1, "width": 2048})
Layers = tuple[tuple[Tensor, Tensor], ...]  # weight and bias of each
STATES, FEATURES = "xlora.states.", "xlora.features."  # of the pass: what the trunk read, and made of it


@dataclass(frozen=True)
class Xlora(GradientTrained):
    """y = W x + Σ_i s_i B_i A_i x with s = softmax(V f(h) + c): h is the base's last hidden state of the token.

    Every pass of the model is two: the first, without any adapter, gives h (hidden,), after the last norm; in the
    second every adapted module, embeddings too, weighs its adapters for the token by a head of its own, V (K, width)
    and c (K,). f is a trunk that all heads share, depth - 1 layers ReLU(U f + b); at depth 1 it is nothing and V reads
    h. The base passes keep keys and values of their own beside those of the adapted ones, so decoding with a cache,
    beams included, equals one full pass. It costs two passes a step, and the cache twice its memory.

    Settings: "granularity": "matrix", a head per module (the authors' "layer" is an adapted module), or "network", one
    for all; "depth" (1) and "width" (2048) of the trunk.

    Where we depart from PEFT's, which is by the same author:
      * it runs both passes on the whole text at every new token (use_cache=False): the same numbers, slower;
      * the softmax runs over the members of the row (a weight other than 0; its size does not enter) and not over all
        adapters; with all as members it is the same;
      * the heads are zero at first, the mean of the members, where its are drawn at random;
      * no dropout in the trunk, no temperature, no top-k, no scaling of the whole: by default it has none of them
        either, but for a dropout of 0.2 in trunks of depth 2 or more;
      * encoder-decoders, which it does not serve: a module goes by the state of the token that it reads, so keys and
        values of cross-attention go by the encoder's.

    A member that lacks a module keeps its share there, unused, as there.

    Source: X-LoRA, arXiv:2402.07148, and PEFT's code (tuners/xlora).

    Args:
        router: what was learned, for the adapters it was trained on.

    Raises:
        ValueError: another method's router.
    """

    router: Router

    name: ClassVar[str] = "xlora"
    source: ClassVar[str] = "X-LoRA, arXiv:2402.07148"
    scope: ClassVar[Scope] = "token"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("Xlora", self.name, self.router)

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """The mean of the members: zero heads on a trunk as PyTorch draws linear layers.

        Raises:
            ValueError: an unknown setting or one out of its range.
        """
        chosen = filled("Xlora", settings, DEFAULTS)
        check_choice("Xlora", "granularity", chosen["granularity"], GRANULARITIES)
        for name in ("depth", "width"):
            check_count("Xlora", name, chosen[name])
        generator, width, tensors = torch.Generator().manual_seed(seed), pool.hidden, {}
        for i in range(chosen["depth"] - 1):
            for name, shape in ((f"trunk.{i}.weight", (chosen["width"], width)), (f"trunk.{i}.bias", chosen["width"])):
                tensors[name] = torch.empty(shape).uniform_(-(width**-0.5), width**-0.5, generator=generator)
            width = chosen["width"]
        for head in sorted({head_of(module, chosen["granularity"]) for module in pool.banks}):
            tensors[f"{head}.weight"] = torch.zeros(len(pool.names), width)
            tensors[f"{head}.bias"] = torch.zeros(len(pool.names))
        return Router(cls.name, {**chosen, "hidden": pool.hidden}, tensors, pool.base_model, pool.adapters)

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, gated by its adapter's share of the token.

        Raises:
            LookupError: an adapter or a module that the router was not trained for.
            ValueError: the router has tensors of other shapes.
        """
        trunk = self._trunk(next(iter(banks.values())).A.device) if banks else ()
        return {module: self._delta(bank, weights, trunk) for module, bank in banks.items()}

    def _trunk(self, device: torch.device) -> Layers:
        """The trunk where the banks are: moved once and not by every gate."""
        settings, layers, width = self.router.settings, [], self.router.settings["hidden"]
        for i in range(settings["depth"] - 1):
            U = self.router.tensor(f"trunk.{i}.weight", (settings["width"], width))
            layers.append((U.to(device), self.router.tensor(f"trunk.{i}.bias", (settings["width"],)).to(device)))
            width = settings["width"]
        return tuple(layers)

    def _delta(self, bank: RankBank, weights: Tensor, trunk: Layers) -> LowRankDelta:
        settings, K = self.router.settings, len(self.router.adapters or ())
        columns, head = self.router.columns(bank.fingerprints), head_of(bank.module, settings["granularity"])
        weight = self.router.tensor(f"{head}.weight", (K, settings["width" if trunk else "hidden"]))[columns]
        bias = self.router.tensor(f"{head}.bias", (K,))[columns]
        gate = XloraGate(trunk, weight, bias, bank.owner, weights != 0)
        return LowRankDelta(bank.A, bank.B, bank.per_rank(weights), gate, bank.kind)


def head_of(module: str, granularity: str) -> str:
    """The head that a module listens to."""
    return "network" if granularity == "network" else module


@dataclass(frozen=True, eq=False)
class XloraGate:
    """The shares of a module's tokens, spread over its ranks.

    Attributes:
        trunk: U (width, width of what it reads) and b (width,) of every layer.
        weight: V, (K, width).
        bias: c, (K,).
        owner: adapter of each rank, (R,).
        members: (batch, K) bool.
    """

    trunk: Layers
    weight: Tensor
    bias: Tensor
    owner: Tensor
    members: Tensor

    needs_layer_input: ClassVar[bool] = False
    needs_base_states: ClassVar[bool] = True

    def to(self, device: torch.device, dtype: torch.dtype) -> XloraGate:
        """The same gate on a device, what it learned in float32 or better."""
        dtype = torch.promote_types(dtype, torch.float32)
        trunk = tuple((U.to(device, dtype), b.to(device, dtype)) for U, b in self.trunk)
        weight, bias = self.weight.to(device, dtype), self.bias.to(device, dtype)
        return XloraGate(trunk, weight, bias, self.owner.to(device), self.members.to(device))

    def __call__(self, x: Tensor, h: Tensor, w: Tensor, context: GateContext) -> Tensor:
        """Multipliers (batch, seq, R): the share of each rank's adapter."""
        states = context.base_states
        if states is None:
            raise ValueError(f"{context.module}: X-LoRA decides on what the base says first; run it with attach")
        if states.shape[:2] != h.shape[:2]:
            raise ValueError(
                f"{context.module} reads {tuple(h.shape[:2])} rows and tokens, the base {tuple(states.shape[:2])}: "
                "X-LoRA cannot gate a module outside the body of the model, such as its head"
            )
        logits = self._features(states, context.scratch) @ self.weight.mT + self.bias  # (batch, seq, K)
        members = fit_rows(self.members, h.shape[0])[:, None]  # (batch, 1, K)
        return masked_softmax(logits, members).to(h)[..., self.owner]

    def _features(self, states: Tensor, scratch: dict[str, Tensor]) -> Tensor:
        """f(h), (batch, seq, width), made once for the modules of a pass that read the same tokens."""
        place = str(id(states))  # of a tensor that is kept as long, so nobody else has it
        if FEATURES + place not in scratch:
            features = states.to(self.weight.dtype)
            for U, b in self.trunk:
                features = torch.relu(features @ U.mT + b)
            scratch[STATES + place], scratch[FEATURES + place] = states, features
        return scratch[FEATURES + place]
