"""Which operator runs each delta of a request, and which deltas go into the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loracompose.composition.delta import LowRankDelta
from loracompose.runtime.attachment import Add
from loracompose.runtime.fitting import COMPUTING, gives_own_output
from loracompose.runtime.folding import keeps_precision, why_not_foldable
from loracompose.runtime.forms import Workspace
from loracompose.runtime.machine import Machine, Machines
from loracompose.runtime.operator import RowOperator, StaticGroup, gated_group, static_add
from loracompose.runtime.plan import Wanted, fold_pays
from loracompose.runtime.rows import RowUses
from loracompose.runtime.sharing import OpenProduct, share_input


@dataclass(frozen=True, eq=False)
class Assembly:
    """The deltas of a request, each fit to its module, and how they are to run.

    Attributes:
        modules: module path -> module.
        deltas: module path -> delta on the device of its module and in the dtype that it is multiplied in.
        form: what the caller asked for.
        tokens: decoding steps to expect; None if nobody knows.
        machines: what the plan counts with.
    """

    modules: Mapping[str, nn.Module]
    deltas: Mapping[str, LowRankDelta]
    form: Wanted
    tokens: int | None
    machines: Machines

    def split(self) -> tuple[dict[str, LowRankDelta], dict[str, LowRankDelta], dict[str, Tensor]]:
        """The deltas that go into the weights, those that run beside them, and the weights of all, on the CPU.

        Raises:
            ValueError: "folded" is forced on a delta that cannot be folded.
        """
        weights = on_host(self.deltas)
        inside = {path: delta for path, delta in self.deltas.items() if self._folds(path, delta, weights[path])}
        beside = {path: delta for path, delta in self.deltas.items() if path not in inside}
        return inside, beside, weights

    def operators(
        self, deltas: Mapping[str, LowRankDelta], weights: Mapping[str, Tensor], slot: OpenProduct
    ) -> dict[str, Add]:
        """What the hook of every module calls."""
        kinds = {path: sharing_kind(path, delta) for path, delta in deltas.items()}
        adders: dict[str, Add] = {}
        workspace, uses = Workspace(), RowUses()
        for members in share_input(kinds):
            group = {path: deltas[path] for path in members}
            first = group[members[0]]
            if is_static(first):
                machine = self._rates(members[0])
                writable = {path for path in members if gives_own_output(self.modules[path])}
                run = StaticGroup(
                    group,
                    weights,
                    slot,
                    form=self.form,
                    machine=machine,
                    workspace=workspace,
                    uses=uses,
                    writable=writable,
                )
                adders |= {path: static_add(run, path) for path in members}
            elif first.kind == "linear" and first.gate is not None:
                adders |= {path: operator.add for path, operator in gated_group(group, slot).items()}
            else:
                adders |= {path: RowOperator(delta).add for path, delta in group.items()}
        return adders

    def _rates(self, path: str) -> Machine:
        """What the plan counts with for a module: measured for its own dtype, though its delta may be wider."""
        delta, weight = self.deltas[path], self.modules[path].weight
        dtype = weight.dtype if isinstance(weight, Tensor) and weight.dtype in COMPUTING else delta.A.dtype
        return self.machines.of(delta.A.device, dtype)

    def _folds(self, path: str, delta: LowRankDelta, weights: Tensor) -> bool:
        if self.form == "folded":
            reason = why_not_foldable(self.modules[path], delta, weights)
            if reason and delta.kind == "linear":
                raise ValueError(f"{path} cannot run folded into its weight: {reason}; leave form to 'auto'")
            return not reason
        if self.form != "auto" or not self.tokens or not keeps_precision(self.modules[path]):
            return False
        if why_not_foldable(self.modules[path], delta, weights):
            return False
        d_out, d_in, ranks = delta.B.shape[0], delta.A.shape[1], int((weights[0] != 0).sum())
        rows, size = delta.batch, delta.A.itemsize
        machine = self._rates(path)
        return ranks > 0 and fold_pays(self.tokens, rows, d_in, d_out, ranks, size, machine)


def is_static(delta: LowRankDelta) -> bool:
    """Whether a delta has several forms: linear, without gate, one bank, and no gradients flow into it."""
    fixed = not any(t.requires_grad for t in (delta.A, delta.B, delta.weights))
    return delta.kind == "linear" and delta.gate is None and not delta.per_row and fixed


def sharing_kind(path: str, delta: LowRankDelta) -> tuple[object, ...]:
    """What must be equal for two modules to share one product; unique where nothing is shared."""
    if delta.kind != "linear" or delta.per_row or (delta.gate is None and not is_static(delta)):
        return (path,)
    return delta.gate is None, delta.batch, delta.A.shape[-1], delta.A.dtype, delta.A.device


def on_host(deltas: Mapping[str, LowRankDelta]) -> dict[str, Tensor]:
    """The weights of all deltas on the CPU, fetched in one transfer for every number of rows."""
    found: dict[str, Tensor] = {}
    for rows in {delta.batch for delta in deltas.values()}:
        these = {path: fixed(delta.weights) for path, delta in deltas.items() if delta.batch == rows}
        if all(weights.device.type == "cpu" for weights in these.values()):  # as they are: modules may share them
            found |= these
            continue
        beside = torch.cat([weights.to(next(iter(these.values())).device) for weights in these.values()], dim=1).cpu()
        parts = torch.split(beside, [weights.shape[1] for weights in these.values()], dim=1)
        found |= dict(zip(these, parts, strict=True))
    return found


def fixed(weights: Tensor) -> Tensor:
    """The weights without their gradients; the very tensor if it has none."""
    return weights.detach() if weights.requires_grad else weights
