"""The Triton form against the PyTorch form, in float32; run as a process of its own with TRITON_INTERPRET=1.

Prints the largest relative error, and how many kernels were started with and without choosing their tensors' GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from loracompose.runtime import kernels
from loracompose.runtime.forms import GatheredForm, GroupBank
from loracompose.runtime.grouped import GroupedForm
from loracompose.runtime.rows import RowUse
from tests.runtime.toy import random_delta

# (rows a composition, tokens, d_in, widths, ranks of the banks)
SHAPES = (
    (1, 1, 24, (9,), (5,)),
    (2, 1, 200, (40, 12), (37, 3)),
    (1, 5, 24, (9, 4, 4), (5, 1, 20)),
    (2, 19, 70, (130, 12), (37, 18)),
)


def largest_error(times: int, seq: int, d_in: int, widths: tuple[int, ...], ranks: tuple[int, ...]) -> float:
    """The largest relative error over the modules of one group."""
    generator = torch.Generator().manual_seed(seq)
    deltas = []
    for seed, (width, own) in enumerate(zip(widths, ranks, strict=True)):
        weights = torch.randn(5, own, generator=generator)
        weights[torch.rand(5, own, generator=generator) < 0.4] = 0.0
        weights[1], weights[3] = 0.0, weights[0]  # a row without adapters, and one composition twice
        delta = random_delta(d_in, width, ranks=own, weights=weights, seed=seed)
        deltas.append(delta.to(torch.device("cpu"), torch.float32))
    bank = GroupBank.build(deltas, RowUse.count([delta.weights for delta in deltas]))
    x, errors = torch.randn(5 * times, seq, d_in, generator=generator), []
    oracle, form = GatheredForm(bank), GroupedForm(bank)
    wanted, h = oracle.shrink(x), form.shrink(x)
    for member, width in enumerate(widths):
        output = torch.randn(5 * times, seq, width, generator=generator)
        want, got = (f.add(member, made, output, own=False) for f, made in ((oracle, wanted), (form, h)))
        assert torch.equal(got.unflatten(0, (5, times))[1], output.unflatten(0, (5, times))[1])
        errors.append(((got - want).abs().max() / want.abs().max()).item())
    return max(errors)


class Watched:
    """A kernel that notes at each start whether the GPU of a tensor is chosen."""

    chosen: ClassVar[list[Tensor]] = []
    starts: ClassVar[dict[bool, int]] = {True: 0, False: 0}

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.starts[bool(self.chosen)] += 1
        return self._kernel[grid]


@contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """In the place of `torch.cuda.device_of`, of which a CPU sees nothing."""
    Watched.chosen.append(tensor)
    yield
    Watched.chosen.pop()


if __name__ == "__main__":
    torch.cuda.device_of = device_of  # type: ignore[assignment,misc]
    kernels._shrink, kernels._expand = Watched(kernels._shrink), Watched(kernels._expand)
    worst = max(largest_error(*shape) for shape in SHAPES)
    sys.stdout.write(f"{worst} {Watched.starts[True]} {Watched.starts[False]}\n")
