from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from loracompose import diagnosis
from loracompose.devices import pick_device, pick_dtype
from loracompose.runtime import machine
from loracompose.runtime.machine import (
    DEFAULT,
    Machine,
    Machines,
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


@pytest.mark.parametrize(
    "text", ["", "{}{", '{"bandwidth": -1.0}', '{"speed": 1.0}', '{"call": "fast"}', '{"wide": 1.0}']
)
def test_a_broken_measurement_is_an_error_that_names_the_file(text: str):
    file = machine_file(CPU, torch.float32)
    file.parent.mkdir(parents=True)
    file.write_text(text)
    with pytest.raises(ValueError, match=r"delete it, or run loracompose doctor --calibrate"):
        known_machine(CPU, torch.float32)
    assert diagnosis.speed(CPU, torch.float32).state == "problem"


def test_the_doctor_shows_what_was_measured_and_how_to_measure():
    assert "loracompose doctor --calibrate" in diagnosis.speed(CPU, torch.float32).remedy
    save_machine(Machine(bandwidth=12.3e9), CPU, torch.float32)
    assert "12.3 GB/s" in diagnosis.speed(CPU, torch.float32).detail
    save_machine(Machine(wide=True), CPU, torch.bfloat16)
    assert "multiplied in float32" in diagnosis.speed(CPU, torch.bfloat16).detail


def test_the_doctor_measures_every_dtype_that_models_run_in_here(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(diagnosis, "calibrate", lambda device, dtype: Machine(call=dtype.itemsize / 1e6))
    diagnosis.calibrate_here()
    kept = {dtype: known_machine(device, dtype) for device, dtype in diagnosis.places()}
    assert kept == {dtype: Machine(call=dtype.itemsize / 1e6) for dtype in kept}
    assert pick_dtype("auto", pick_device("auto")) in kept
    if pick_device("auto") == CPU:
        assert set(kept) == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("tokens", [1, 64])
def test_what_is_assumed_of_a_cpu_gathers_but_for_a_step_in_16_bits(tokens: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    wanted = {torch.float32: "gathered", torch.bfloat16: "shared" if tokens == 1 else "gathered"}
    for dtype, form in wanted.items():
        assumed = assumed_machine(CPU, dtype)
        assert choose_form(16, tokens, 600_000, 80_000, dtype.itemsize, distinct=16, machine=assumed) == form


@pytest.mark.parametrize(
    ("capability", "dtype", "multiplied"),
    [
        ("AVX512", torch.bfloat16, torch.bfloat16),
        ("AVX2", torch.bfloat16, torch.float32),
        ("DEFAULT", torch.bfloat16, torch.float32),
        ("AVX512", torch.float16, torch.float32),
        ("AVX2", torch.float32, torch.float32),
        ("AVX2", torch.float64, torch.float64),
    ],
)
def test_a_cpu_without_16_bit_products_is_assumed_to_multiply_in_float32(
    capability: str, dtype: torch.dtype, multiplied: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert Machines().multiplied(CPU, dtype) == multiplied
    assert Machines().multiplied(torch.device("meta"), dtype) == dtype


def test_what_was_measured_or_given_decides_and_not_what_is_assumed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert Machines(Machine()).multiplied(CPU, torch.bfloat16) == torch.bfloat16
    assert Machines(Machine(wide=True)).multiplied(CPU, torch.float64) == torch.float64
    assert Machines(Machine(wide=True)).multiplied(torch.device("meta"), torch.bfloat16) == torch.bfloat16
    save_machine(Machine(wide=False), CPU, torch.bfloat16)
    assert Machines().multiplied(CPU, torch.bfloat16) == torch.bfloat16
    save_machine(Machine(wide=True), CPU, torch.bfloat16)
    assert Machines().multiplied(CPU, torch.bfloat16) == torch.float32


@pytest.mark.parametrize(("slow", "wide"), [(torch.bfloat16, True), (torch.float32, False)])
def test_calibration_keeps_the_way_that_answers_sooner(slow: torch.dtype, wide: bool, monkeypatch: pytest.MonkeyPatch):
    def measured(place: torch.device, dtype: torch.dtype, multiplied: torch.dtype) -> tuple[float, Machine]:
        return (2.0, Machine(small_gemm=1e13)) if multiplied == slow else (1.0, Machine(small_gemm=1e12))

    monkeypatch.setattr(machine, "_measured", measured)
    assert calibrate(CPU, torch.bfloat16) == Machine(small_gemm=1e12, wide=wide)


def test_calibration_measures_16_bits():
    found = calibrate(CPU, torch.bfloat16)
    assert all(rate > 1e6 for rate in (found.small_gemm, found.large_gemm, found.small_bmm, found.large_stack))
