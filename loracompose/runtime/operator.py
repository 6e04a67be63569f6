"""The batched low-rank product: one delta, prepared once per request batch, in the form each call needs."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loracompose.composition.delta import LowRankDelta
from loracompose.composition.gates import GateContext, SparseGate
from loracompose.runtime.plan import Form, active_pays, choose_form


def gather_rows(delta: LowRankDelta) -> LowRankDelta:
    """The same static delta with each row's own ranks, (batch, R', ...), its weights folded into B.

    R' is the most ranks that a row uses; shorter rows are filled up with zeros.
    """
    used = delta.weights != 0  # (batch, R)
    widest = max(1, int(used.sum(dim=1).max()))
    pick = torch.argsort((~used).to(torch.int8), dim=1, stable=True)[:, :widest]  # (batch, R')
    w = delta.weights.gather(1, pick)  # (batch, R')
    A = torch.where((w != 0)[..., None], delta.A[pick], 0.0)  # (batch, R', d_in)
    B = torch.where((w != 0)[..., None], delta.B.mT[pick] * w[..., None], 0.0)  # (batch, R', d_out)
    return replace(delta, A=A, B=B.mT, weights=torch.ones_like(w))


def run_active(delta: LowRankDelta, gate: SparseGate, x: Tensor, context: GateContext) -> Tensor:
    """What the delta gives, (batch, seq, d_out), from the products of the ranks that act on each token alone."""
    ranks, g = gate.few(x, delta.weights, context)  # (batch, seq, k)
    h = (delta.A[ranks] @ x[..., None])[..., 0]  # (batch, seq, k)
    h = torch.where(g != 0, h, 0.0) * g  # as in LowRankDelta: no inf * 0
    return (h[..., None, :] @ delta.B.mT[ranks])[..., 0, :]


class RowOperator:
    """Runs one delta on inputs of `batch` rows, or of a multiple when `generate` expands rows to beams.

    Each form of the bank (shared, gathered, and their expansions) is built at its first use and kept, so a
    decoding step allocates nothing but its result.
    """

    def __init__(self, delta: LowRankDelta) -> None:
        self._delta = delta
        used = (delta.weights != 0).sum(dim=1)
        self._row_ranks = max(1, int(used.max()))
        self._forms: dict[tuple[Form, int], LowRankDelta] = {}
        gate = delta.gate
        self._sparse = gate if isinstance(gate, SparseGate) and gate.n_active is not None else None

    @property
    def gate_needs_layer_input(self) -> bool:
        """Whether the gate looks at the input of the enclosing layer."""
        return self._delta.gate is not None and self._delta.gate.needs_layer_input

    def __call__(self, x: Tensor, context: GateContext) -> Tensor:
        """What the module's output gains, (rows, seq, d_out).

        Raises:
            ValueError: the rows of x are not a multiple of the batch.
        """
        batch = self._delta.batch
        if self._delta.kind == "embedding" and x.shape[0] == 1:
            x = x.expand(batch, -1)  # positions are often looked up once for all rows; compositions differ by row
        rows = x.shape[0]
        if rows % batch:
            raise ValueError(
                f"{context.module}: {rows} rows of input for {batch} compositions; rows must be a multiple"
            )
        form = self._form(x, rows // batch)
        if self._sparse is not None and self._active_pays(x):
            return run_active(form, self._sparse, x, context)
        return form(x, context)

    def _active_pays(self, x: Tensor) -> bool:
        delta, active = self._delta, self._sparse and self._sparse.n_active
        if not active or delta.kind != "linear":
            return False
        width = delta.A.shape[-1] + delta.B.shape[-2]
        return active_pays(x.shape[0] * x.shape[1], delta.A.shape[0], active, width, delta.A.itemsize)

    def _form(self, x: Tensor, times: int) -> LowRankDelta:
        delta = self._delta
        form: Form = "shared"
        # an embedding only looks up what its tokens need: gathered rows would copy the vocabulary for each of them
        if delta.gate is None and not delta.per_row and delta.kind == "linear":
            ranks = delta.A.shape[0]
            form = choose_form(x.shape[0], x.shape[1], ranks, self._row_ranks, delta.A.itemsize)
        key = (form, times)
        if key not in self._forms:
            base = delta if form == "shared" else gather_rows(delta)
            self._forms[key] = base.repeat(times)
        return self._forms[key]
