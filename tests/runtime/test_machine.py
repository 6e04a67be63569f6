from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from loracompose import diagnosis
from loracompose.devices import pick_device, pick_dtype
from loracompose.runtime.machine import (
    DEFAULT,
    Machine,
    assumed_machine,
    calibrate,
    known_machine,
    machine_file,
    save_machine,
)
from loracompose.runtime.plan import choose_form

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORACOMPOSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_without_a_measurement_nothing_is_known_and_nothing_is_written(cache: Path):
    assert known_machine(CPU, torch.float32) is None
    assert not cache.exists()


def test_a_measurement_is_kept_for_its_device_dtype_threads_and_torch(cache: Path, monkeypatch: pytest.MonkeyPatch):
    fast = Machine(1e11, 1e12, 1e12, 1e12, 1e12, 1e-6)
    file = save_machine(fast, CPU, torch.float32)
    assert known_machine(CPU, torch.float32) == fast
    assert list(file.parent.iterdir()) == [file]  # nothing is left aside
    assert known_machine(CPU, torch.bfloat16) is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    assert known_machine(CPU, torch.float32) is None
    monkeypatch.undo()
    monkeypatch.setenv("LORACOMPOSE_CACHE", str(cache))
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert known_machine(CPU, torch.float32) is None


def test_calibration_is_short_and_finds_numbers():
    start = time.process_time()
    found = calibrate(CPU, torch.float32)
    assert time.process_time() - start < 8  # on a machine that others use as well
    assert found != DEFAULT
    assert found.call < 1e-3


@pytest.mark.parametrize("text", ["", "{}{", '{"bandwidth": -1.0}', '{"speed": 1.0}', '{"call": "fast"}'])
def test_a_broken_measurement_is_an_error_that_names_the_file(text: str):
    file = machine_file(CPU, torch.float32)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"delete it, or run loracompose doctor --calibrate"):
        known_machine(CPU, torch.float32)
    assert diagnosis.speed().state == "problem"


def test_the_doctor_shows_what_was_measured_and_how_to_measure():
    assert "loracompose doctor --calibrate" in diagnosis.speed().remedy
    device = pick_device("auto")
    save_machine(Machine(bandwidth=12.3e9), device, pick_dtype("auto", device))
    assert "12.3 GB/s" in diagnosis.speed().detail


@pytest.mark.parametrize("tokens", [1, 64])
def test_what_is_assumed_of_a_cpu_gathers_but_for_a_step_in_16_bits(tokens: int):
    wanted = {torch.float32: "gathered", torch.bfloat16: "shared" if tokens == 1 else "gathered"}
    for dtype, form in wanted.items():
        machine = assumed_machine(CPU, dtype)
        assert choose_form(16, tokens, 600_000, 80_000, dtype.itemsize, distinct=16, machine=machine) == form
