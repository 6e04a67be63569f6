from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loracompose.runtime.grouped import kernels_run


@pytest.fixture(scope="module")
def interpreted() -> tuple[float, int, int]:
    """What `run_kernels` found in Triton's interpreter, which is chosen before Triton is imported: a process."""
    process = subprocess.run(
        [sys.executable, "-m", "tests.runtime.run_kernels"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    error, guarded, bare = process.stdout.split()
    return float(error), int(guarded), int(bare)


needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is made for Linux alone")


@needs_triton
def test_the_triton_form_is_the_pytorch_form_for_unequal_ranks_rows_without_adapters_beams_and_long_passes(interpreted):
    assert interpreted[0] < 1e-5


@needs_triton
def test_a_kernel_is_started_on_the_gpu_of_its_tensors_whichever_is_current(interpreted):
    _, guarded, bare = interpreted
    assert guarded > 0
    assert bare == 0


def test_the_kernels_never_run_on_a_cpu():
    assert not kernels_run(torch.device("cpu"), torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_triton_form_is_chosen_and_equals_the_shared_one():
    from loracompose.runtime.forms import GroupBank
    from loracompose.runtime.grouped import GroupedForm
    from loracompose.runtime.operator import StaticGroup
    from loracompose.runtime.rows import RowUse
    from loracompose.runtime.sharing import OpenProduct
    from tests.runtime.toy import random_delta

    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
        weights = torch.randn(4, 20) * (torch.rand(4, 20) < 0.4)
        delta = random_delta(64, 48, ranks=20, weights=weights).to(torch.device("cuda"), dtype)
        for seq in (1, 33):
            x = torch.randn(8, seq, 64, device="cuda", dtype=dtype)
            output = torch.zeros(8, seq, 48, device="cuda", dtype=dtype)
            run = [
                StaticGroup({"q": delta}, {"q": delta.weights.cpu()}, OpenProduct(), form=f)
                for f in ("gathered", "shared")
            ]
            got, want = (group.add("q", output, x) for group in run)
            assert ((got - want).abs().max() / want.abs().max()).item() < tolerance
        bank = GroupBank.build([delta], RowUse.count([delta.weights.cpu()]))
        assert isinstance(run[0]._build("gathered", bank, 1, gradients=False, kernels=True), GroupedForm)
