"""MoLE: one learned share per adapter for every matrix, part of a layer, layer or network, decided by the prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from loracompose.composers.base import GradientTrained, Pool, Scope
from loracompose.composers.mole_gate import Judge, MoleGate, balance_loss, noted
from loracompose.composition.bank import RankBank
from loracompose.composition.delta import LowRankDelta
from loracompose.composition.layers import layer_of, part_of, running_order
from loracompose.composition.router import Router
from loracompose.composition.settings import check_amount, check_choice, check_router, filled

GRANULARITIES = ("matrix", "layer", "block", "network")
DEFAULTS: Mapping[str, Any] = MappingProxyType({"granularity": "block", "balance": 0.5})
SCALE = 0.01  # standard deviation of the initial weights, as in the authors' code: nearly uniform shares


@dataclass(frozen=True)
class Mole(GradientTrained):
    """y = W x + Σ_i G_i B_i A_i x with G = softmax(ε / τ), one gate for the modules of a group.

    ε = e · [Ê_0; ...; Ê_{N-1}]: the input of a gate is what each adapter would add at the gate's site, averaged over
    the prompt's tokens, each of norm 1; e (N, N·d) has no bias; τ = exp(t), a learned number per gate, 1 at first.
    Decided once per prompt and kept for all later tokens. A weight other than 0 makes an adapter a member of its row,
    its size does not enter; with weights on all adapters of the router it is the paper's first mode of inference, with
    fewer its second: G'_i = m_i G_i / Σ_j m_j G_j. Embeddings are not gated: there the weights count, as in `mixture`.
    Nor do modules outside the layers have a gate, such as the output head: a model may run it on the last tokens alone,
    so what it is given need not be the prompt. Their weights count too, unless one gate serves the whole network.

    Setting "granularity", after the paper's section 5: "matrix", a gate per module; "layer", one for the attention and
    one for the feed-forward part of each transformer block; "block", one per block; "network", one. The site of a gate
    is the first module of its group that runs inside a layer, told by the modules' names when the router is made and
    kept in the setting "sites": it must not depend on which adapters happen to share a batch. Where no member of a row
    has the site, the gate has no input and its shares are uniform.

    The loss gains balance · (-Σ_i log q_i - n log n), q the mean over gates of the live shares: 0 at balance. q is that
    of one row, over its n members, and the loss is the mean over rows.

    What the paper leaves open, or we do otherwise:
      * Eqs. 5-13 run a block once per adapter and add the residual stream again with every expert; here, as in the
        authors' code, the gate weighs the outputs inside each adapted linear module.
      * Eqs. 9-10 flatten the outputs of all L tokens, so e has N·L·d rows, L is fixed, and in a decoder the answer
        leaks into its own gate; pooling over the prompt removes all three.
      * "Normalization" (eq. 9) is not specified: each adapter's pooled output has norm 1.
      * The outputs of masked adapters are gate inputs in the paper. Here their slice is zero, so that an adapter of
        weight 0 has no effect at all; then masked redistribution is the softmax over the members.
      * A member that leaves a module alone keeps its share there, as in a weighted sum.
      * The authors' code takes the loss from detached numbers, without a gradient, and never uses τ. Here both learn.

    Source: Mixture of LoRA Experts, arXiv:2404.13628, section 3.

    Args:
        router: what it learned, for the adapters it was trained on.

    Raises:
        ValueError: another method's router.
    """

    router: Router

    name: ClassVar[str] = "mole"
    source: ClassVar[str] = "MoLE, arXiv:2404.13628"
    scope: ClassVar[Scope] = "prompt"
    gauge_invariant: ClassVar[bool] = True
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_router("Mole", self.name, self.router)

    @classmethod
    def initial(cls, pool: Pool, seed: int, settings: Mapping[str, Any]) -> Router:
        """Small random gates; settings: "granularity" ("block" by default) and "balance", the loss's weight (0.5)."""
        chosen = filled("Mole", settings, DEFAULTS)
        check_choice("Mole", "granularity", chosen["granularity"], GRANULARITIES)
        check_amount("Mole", "balance", chosen["balance"])
        linear = [module for module, bank in pool.banks.items() if bank.kind == "linear" and layer_of(module)]
        if not linear:
            raise ValueError(
                "mole: the adapters of the pool adapt no linear module inside a layer: there is nothing to gate"
            )
        sites: dict[str, str] = {}
        for module in sorted(linear, key=running_order):
            sites.setdefault(group_of(module, chosen["granularity"]), module)
        generator, n = torch.Generator().manual_seed(seed), len(pool.names)
        tensors = {}
        for group, site in sorted(sites.items()):
            width = pool.banks[site].B.shape[0]
            tensors[f"{group}.weight"] = SCALE * torch.randn(n, n, width, generator=generator)
            tensors[f"{group}.log_temperature"] = torch.zeros(())
        return Router(cls.name, {**chosen, "sites": sites}, tensors, pool.base_model, pool.adapters)

    def auxiliary_loss(self, scratch: Mapping[str, Tensor]) -> Tensor | None:
        """The balancing loss, from the shares that the gates noted."""
        found = noted(scratch)
        return None if found is None else balance_loss(*found) * float(self.router.settings["balance"])

    def compose(self, banks: Mapping[str, RankBank], weights: Tensor) -> dict[str, LowRankDelta]:
        """Every rank as it is, gated by its adapter's share of the prompt."""
        return {module: self._delta(bank, banks, weights) for module, bank in banks.items()}

    def _delta(self, bank: RankBank, banks: Mapping[str, RankBank], weights: Tensor) -> LowRankDelta:
        w = bank.per_rank(weights)  # (batch, R)
        group, members = group_of(bank.module, self.router.settings["granularity"]), weights != 0
        if bank.kind != "linear" or (not layer_of(bank.module) and group not in self.router.settings["sites"]):
            return LowRankDelta(bank.A, bank.B, w, kind=bank.kind)
        site = self._site(group)
        if site not in banks:
            return LowRankDelta(bank.A, bank.B, bank.per_rank(members / members.sum(dim=1, keepdim=True).clamp_min(1)))
        judge = self._judge(group, bank, members) if site == bank.module else None
        return LowRankDelta(bank.A, bank.B, w, MoleGate(group, site, bank.owner, judge))

    def _site(self, group: str) -> str:
        sites: Mapping[str, str] = self.router.settings["sites"]
        if group not in sites:
            raise LookupError(
                f"the mole router has no gate for {group!r}; it was trained on {self.router.base_model} with adapters "
                "that leave its modules alone: train it again with these adapters"
            )
        return sites[group]

    def _judge(self, group: str, bank: RankBank, members: Tensor) -> Judge:
        n, columns = len(self.router.adapters or ()), self.router.columns(bank.fingerprints)
        weight = self.router.tensor(f"{group}.weight", (n, n, bank.B.shape[0]))[columns][:, columns]  # (K, K, d_out)
        return Judge(weight, self.router.tensor(f"{group}.log_temperature", ()), bank.B, bank.owner, members)


def group_of(module: str, granularity: str) -> str:
    """The group of modules that shares a gate with this one; one outside the layers is alone, but for the network's."""
    layer = layer_of(module)
    if granularity == "network":
        return "network"
    if granularity == "matrix" or not layer:
        return module
    return layer if granularity == "block" else f"{layer}.{part_of(module)}"
