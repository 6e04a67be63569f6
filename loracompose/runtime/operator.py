"""The batched low-rank product: what runs beside each module, prepared once per request batch."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext, SparseGate
from loracompose.runtime.fitting import widened, widened_context
from loracompose.runtime.forms import BankForm, GatheredForm, GroupBank, SharedForm, Workspace
from loracompose.runtime.grouped import GroupedForm, kernels_run
from loracompose.runtime.machine import DEFAULT, Machine
from loracompose.runtime.plan import Form, Wanted, active_pays, choose_form, stack_pays
from loracompose.runtime.rows import RowUses
from loracompose.runtime.segments import SegmentedForm
from loracompose.runtime.sharing import OpenProduct, SharedInput
from loracompose.runtime.stacked import StackedForm

Context = Callable[[], GateContext]


def run_active(delta: LowRankDelta, gate: SparseGate, x: Tensor, context: GateContext) -> Tensor:
    """What the delta gives, (batch, seq, d_out), from the products of the ranks that act on each token alone."""
    ranks, g = gate.few(x, delta.weights, context)  # (batch, seq, k)
    h = (delta.A[ranks] @ x[..., None])[..., 0]  # (batch, seq, k)
    h = torch.where(g != 0, h, 0.0) * g  # as in LowRankDelta: no inf * 0
    return (h[..., None, :] @ delta.B.mT[ranks])[..., 0, :]


class RowOperator:
    """Runs one delta as it stands, on `batch` rows, or on a multiple when `generate` expands rows to beams.

    For what has no other form: gated deltas, embeddings (which only look up what their tokens need) and deltas that
    gradients flow into.
    """

    def __init__(self, delta: LowRankDelta, shrink: Callable[[Tensor], Tensor | None] | None = None) -> None:
        """Prepare a delta; `shrink` may give x Aᵀ where modules that read x share one product."""
        self._delta, self._shared = delta, shrink
        self._repeated: dict[int, LowRankDelta] = {}
        gate = delta.gate
        self._sparse = gate if isinstance(gate, SparseGate) and gate.n_active is not None else None

    @property
    def gate_needs_layer_input(self) -> bool:
        """Whether the gate looks at the input of the enclosing layer."""
        return self._delta.gate is not None and self._delta.gate.needs_layer_input

    def add(self, output: Tensor, x: Tensor, context: Context) -> Tensor:
        """The module's output, (rows, seq, d_out), with what the delta adds to it."""
        wide = widened(output, self._delta.A.dtype)
        return (wide + self(x, context())).to(output.dtype)

    def __call__(self, x: Tensor, context: GateContext) -> Tensor:
        """What the module's output gains, (rows, seq, d_out).

        Raises:
            ValueError: the rows of x are not a multiple of the batch.
        """
        batch = self._delta.batch
        if self._delta.kind == "embedding" and x.shape[0] == 1:
            x = x.expand(batch, -1)  # positions are often looked up once for all rows; compositions differ by row
        times = times_of(x, batch, context.module)
        if times not in self._repeated:
            with torch.inference_mode(False):  # what is made in inference mode could not be used outside of it
                self._repeated[times] = self._delta.repeat(times)
        delta, dtype = self._repeated[times], self._delta.A.dtype
        states = widened(x, dtype)
        context = widened_context(context, x, states)
        if self._sparse is not None and self._active_pays(x):
            return run_active(delta, self._sparse, states, context)
        h = None if self._shared is None else self._shared(x)  # (rows, seq, R)
        return delta.expand(states, delta.shrink(states) if h is None else h, context)

    def _active_pays(self, x: Tensor) -> bool:
        delta, active = self._delta, self._sparse and self._sparse.n_active
        if not active or delta.kind != "linear":
            return False
        width = delta.A.shape[-1] + delta.B.shape[-2]
        return active_pays(x.shape[0] * x.shape[1], delta.A.shape[0], active, width, delta.A.itemsize)


def gated_group(deltas: Mapping[str, LowRankDelta], slot: OpenProduct) -> dict[str, RowOperator]:
    """Operators of gated deltas whose modules read the same tensor: one product of A, of which each takes its ranks."""
    if len(deltas) == 1:
        return {path: RowOperator(delta) for path, delta in deltas.items()}
    A = torch.cat([delta.A for delta in deltas.values()])  # (R of all, d_in)
    shared = SharedInput(deltas, slot, lambda x: widened(x, A.dtype) @ A.mT)

    def part(path: str, end: int) -> Callable[[Tensor], Tensor | None]:
        def shrink(x: Tensor) -> Tensor | None:
            h = shared.product(path, x)
            return None if h is None else h[..., end - deltas[path].A.shape[0] : end]

        return shrink

    ends = accumulate(delta.A.shape[0] for delta in deltas.values())
    return {path: RowOperator(delta, part(path, end)) for (path, delta), end in zip(deltas.items(), ends, strict=True)}


class StaticGroup:
    """Runs the static deltas of linear modules that read the same input, in the form that each pass needs.

    Forms are built at their first use. Those of decoding steps are kept, so that a step gathers nothing; a gathered
    form that only a pass of many tokens wants is dropped with the pass, since it may be larger than the model.
    """

    def __init__(
        self,
        deltas: Mapping[str, LowRankDelta],
        weights: Mapping[str, Tensor],
        slot: OpenProduct,
        *,
        form: Wanted = "auto",
        machine: Machine = DEFAULT,
        workspace: Workspace | None = None,
        uses: RowUses | None = None,
        writable: Collection[str] = (),
    ) -> None:
        """Prepare deltas of one width and batch.

        Args:
            deltas: module path -> delta.
            weights: theirs, on the CPU.
            slot: where the product waits for the modules that follow.
            form: "shared" or "gathered" for one form always.
            machine: what the plan counts with.
            workspace: memory of forms that are not kept, for all groups of one slot.
            uses: what the groups of one request use.
            writable: modules whose outputs nobody else holds, so that the delta may be added in place.
        """
        self._workspace, self._writable = workspace or Workspace(), frozenset(writable)
        self._uses = uses or RowUses()
        self._deltas, self._weights, self._slot = dict(deltas), weights, slot
        self._form_wanted, self._machine = form, machine
        self._member = {path: i for i, path in enumerate(deltas)}
        self._use = self._uses.count([weights[path] for path in deltas])
        self._batch = self._use.batch  # once, for a step asks for it at every module
        self._shared = SharedInput(deltas, slot, self._shrink)
        self._alone: dict[str, StaticGroup] = {}
        self._bank: GroupBank | None = None
        self._copied = False
        self._kept: dict[Form, BankForm] = {}
        self._chosen: dict[tuple[int, int], Form] = {}
        widths = [delta.A.shape[-1] + delta.B.shape[-2] for delta in deltas.values()]
        self._numbers = sum(len(used) * width for used, width in zip(self._use.used, widths, strict=True))
        self._own = sum(widest * width for widest, width in zip(self._use.widest, widths, strict=True))
        first = next(iter(deltas.values())).A
        self._dtype, self._device = first.dtype, first.device.type

    def add(self, path: str, output: Tensor, x: Tensor) -> Tensor:
        """The output of one module, (batch * times, seq, d_out), with what its delta adds.

        Raises:
            ValueError: the rows of x are not a multiple of the batch.
        """
        times_of(x, self._batch, path)
        product = self._shared.product(path, x)
        if product is None:
            if path not in self._alone:
                self._alone[path] = self._part(path)
            return self._alone[path].add(path, output, x)
        prepared, h = product
        own = (
            path in self._writable
            and output.dtype == self._dtype  # which autocast changes, but not inside of what is done in place
            and not torch.is_grad_enabled()
            and output.is_contiguous()
        )
        wide = widened(output, self._dtype)
        if wide is not output:  # a copy of ours; the sum is rounded once
            wide, own = wide.contiguous(), not torch.is_grad_enabled()
        return prepared.add(self._member[path], h, wide, own=own).to(output.dtype)

    def _part(self, path: str) -> StaticGroup:
        """A group of one module, for one that reads what its siblings do not."""
        return StaticGroup(
            {path: self._deltas[path]},
            self._weights,
            self._slot,
            form=self._form_wanted,
            machine=self._machine,
            workspace=self._workspace,
            uses=self._uses,
            writable=self._writable,
        )

    def _shrink(self, x: Tensor) -> tuple[BankForm, Any]:
        form = self._form(x.shape[0], x.shape[1])
        return form, form.shrink(widened(x, self._dtype))

    def _form(self, rows: int, seq: int) -> BankForm:
        kind, gradients = self._choose(rows, seq), torch.is_grad_enabled()
        kernels = not gradients and not torch.is_autocast_enabled(self._device)  # they have no backward, and no casts
        if gradients and not self._copied:
            self._bank, self._copied = None, True
            self._kept.clear()
        kept = self._kept.get(kind)
        if kept is not None and (kernels or not isinstance(kept, GroupedForm)):
            return kept
        # What is made in inference mode could not be used outside of it, where an attachment may still run.
        with torch.inference_mode(False), torch.no_grad():
            if self._bank is None:
                self._bank = GroupBank.build(list(self._deltas.values()), self._use, copied=self._copied)
            form = self._build(kind, self._bank, seq, gradients=gradients, kernels=kernels)
        if kept is None and (seq == 1 or kind == "shared" or isinstance(form, GroupedForm)):
            self._kept[kind] = form
        return form

    def _build(self, kind: Form, bank: GroupBank, seq: int, *, gradients: bool, kernels: bool) -> BankForm:
        if kind == "shared":
            return SharedForm(bank)
        if kernels and kernels_run(bank.A.device, bank.A.dtype):
            return GroupedForm(bank)
        # Gradients would read a workspace when it holds another form.
        on_cpu = bank.A.device.type == "cpu" and not torch.is_autocast_enabled("cpu")  # it works in place
        if seq > 1 and not gradients and on_cpu:
            # This form is not kept: it is reached through the slot alone, which holds one product at a time.
            use, widths = bank.use, [bank.A.shape[1] + B.shape[1] for B in bank.B]
            own = sum(ranks * width for ranks, width in zip(use.of_rows, widths, strict=True))
            stacks = own > 0 and stack_pays(own, use.batch * self._own, self._machine)
            return StackedForm(bank, self._workspace) if stacks else SegmentedForm(bank, self._workspace)
        return GatheredForm(bank)

    def _choose(self, rows: int, seq: int) -> Form:
        shape = rows, seq
        if shape not in self._chosen:  # once, for a step asks for it at every group
            self._chosen[shape] = self._cheaper(rows, seq)
        return self._chosen[shape]

    def _cheaper(self, rows: int, seq: int) -> Form:
        if self._form_wanted == "shared" or self._form_wanted == "gathered":
            return self._form_wanted
        if self._use.distinct == 1:
            return "shared"
        use, size = self._use, self._dtype.itemsize
        return choose_form(rows, seq, self._numbers, self._own, size, distinct=use.distinct, machine=self._machine)


def static_add(group: StaticGroup, path: str) -> Callable[[Tensor, Tensor, Context], Tensor]:
    """`StaticGroup.add` of one module, as a hook calls it."""
    return lambda output, x, context: group.add(path, output, x)


def times_of(x: Tensor, batch: int, module: str) -> int:
    """How many rows of x each composition has.

    Raises:
        ValueError: the rows of x are not a multiple of the batch.
    """
    rows = x.shape[0]
    if rows % batch:
        raise ValueError(f"{module}: {rows} rows of input for {batch} compositions; rows must be a multiple")
    return rows // batch
