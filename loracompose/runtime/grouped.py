"""The gathered form without gathering: a Triton kernel reads each row's ranks where they are, on CUDA."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from loracompose.runtime.forms import GroupBank

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def kernels_run(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels can run there: on CUDA with Triton, in a dtype that its products know."""
    return device.type == "cuda" and dtype in DTYPES and importlib.util.find_spec("triton") is not None


class GroupedForm:
    """Each row multiplies the ranks of its own composition alone, however many these are; see `kernels`."""

    def __init__(self, bank: GroupBank) -> None:
        from loracompose.runtime import kernels  # Triton is there only where `kernels_run` says so

        self._kernels = kernels
        place, starts = bank.A.device, [sum(bank.ranks[:i]) for i in range(len(bank.ranks))]
        own, in_A, in_B, scale, live = [], [], [], [], []
        for (pick, weights), ranks, start in zip(bank.use.picks, bank.ranks, starts, strict=True):
            fill = -pick.shape[1] % kernels.RANKS
            in_B.append(torch.nn.functional.pad(pick, (0, fill), value=ranks))  # (distinct, n_ranks of the module)
            in_A.append(in_B[-1].clamp(max=max(ranks - 1, 0)) + start)
            scale.append(torch.nn.functional.pad(weights, (0, fill)))
            live.append((scale[-1] != 0).view(len(pick), -1, kernels.RANKS).sum(dim=2))
            own.append(in_B[-1].shape[1])
        ends = torch.tensor(own).cumsum(0).tolist()
        self._parts = tuple(slice(end - width, end) for end, width in zip(ends, own, strict=True))
        self._A, self._B = bank.A, bank.B  # no rank of zeros: the kernels leave out what is not live
        self._row_of = bank.use.row_of.to(place)
        self._in_A, self._in_B = torch.cat(in_A, dim=1).to(place), torch.cat(in_B, dim=1).to(place)
        self._scale, self._live = torch.cat(scale, dim=1).to(place, torch.float32), torch.cat(live, dim=1).to(place)

    def shrink(self, x: Tensor) -> Tensor:
        """A x of each row's own ranks, (batch * times, seq, ranks of all modules)."""
        return self._kernels.shrink(x, self._A, self._row_of, self._in_A, self._live)

    def add(self, member: int, h: Tensor, output: Tensor, *, own: bool) -> Tensor:
        """Output + h B, of one module, as a tensor of its own in any case."""
        B, part = self._B[member], self._parts[member]
        return self._kernels.expand(h, B, self._row_of, self._in_B, self._scale, self._live, part, output)
