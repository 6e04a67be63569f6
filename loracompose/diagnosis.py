"""Is everything here that loracompose needs, and is an index healthy? What is wrong and how to mend it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from loracompose.devices import pick_device, pick_dtype
from loracompose.locating import DEFAULT_BASE, DEFAULT_ENCODER, resolve_base, resolve_encoder
from loracompose.retrieval.index import AdapterIndex
from loracompose.runtime.machine import calibrate, known_machine, save_machine

State = Literal["ok", "warning", "problem"]
PACKAGES = ("torch", "transformers", "peft", "sentence-transformers", "faiss-cpu", "safetensors", "numpy")
REBUILD = "rebuild it: loracompose index build ADAPTERS INDEX --overwrite"
CALIBRATE = "measure it in a few seconds: loracompose doctor --calibrate"
OPTIONAL = {"gguf": "gguf", "nevergrad": "lorahub"}  # package -> extra that brings it


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; `remedy` is empty when all is well."""

    subject: str
    state: State
    detail: str
    remedy: str = ""


def diagnose(base: str = DEFAULT_BASE, index: Path | None = None) -> list[Finding]:
    """Look at versions, device, base model, encoder and, if one is given, an index."""
    findings = [
        *packages(),
        machine(),
        *(speed(*place) for place in places()),
        model("base model", base),
        model("encoder", DEFAULT_ENCODER),
    ]
    return findings if index is None else [*findings, *index_health(index, base)]


def packages() -> Iterator[Finding]:
    """Versions of what is installed, and what an extra would bring."""
    for name in PACKAGES:
        try:
            yield Finding(name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "problem", "not installed under this name", f"pip install {name}")
    for package, extra in OPTIONAL.items():
        if importlib.util.find_spec(package):
            yield Finding(package, "ok", importlib.metadata.version(package))
        else:
            yield Finding(package, "warning", "not installed, optional", f'pip install "loracompose[{extra}]"')


def machine() -> Finding:
    """Where models will run."""
    device = pick_device("auto")
    dtype = str(pick_dtype("auto", device)).removeprefix("torch.")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return Finding("device", "ok", f"{device} ({name}), {dtype}, Python {platform.python_version()}")


def places() -> list[tuple[torch.device, torch.dtype]]:
    """The device that models run on, with the dtypes that they are likely to have there."""
    device = pick_device("auto")
    dtypes = [pick_dtype("auto", device), *([torch.bfloat16] if device.type == "cpu" else [])]
    return [(device, dtype) for dtype in dict.fromkeys(dtypes)]


def speed(device: torch.device, dtype: torch.dtype) -> Finding:
    """What was measured of the machine, which the plan of a request counts with."""
    subject = f"calibration, {str(dtype).removeprefix('torch.')}"
    try:
        known = known_machine(device, dtype)
    except ValueError as error:
        return Finding(subject, "problem", str(error), CALIBRATE)
    if known is None:
        return Finding(subject, "ok", "none for this device and torch; fixed constants hold", CALIBRATE)
    gemm, bmm = known.large_gemm / 1e9, max(known.large_bmm, known.large_stack) / 1e9
    detail = f"{known.bandwidth / 1e9:.1f} GB/s, products {gemm:.0f} and by row {bmm:.0f} billion operations/s"
    wide = ", adapters multiplied in float32" if known.wide else ""
    return Finding(subject, "ok", f"{detail}, {known.call * 1e6:.1f} µs a call{wide}")


def calibrate_here() -> None:
    """Measure this machine on the device and in the dtypes that models run in, and keep what was found."""
    for device, dtype in places():
        save_machine(calibrate(device, dtype), device, dtype)


def model(subject: str, name: str) -> Finding:
    """Whether a model is on this machine."""
    try:
        resolved = resolve_encoder(name) if subject == "encoder" else resolve_base(name)
    except (LookupError, ValueError) as error:
        return Finding(subject, "problem", str(error), "give an existing folder or a Hub name")
    if resolved.source == "hub":
        return Finding(subject, "warning", f"{name} is not on this machine", "it is fetched from the Hub at first use")
    return Finding(subject, "ok", f"{name}, from {resolved.detail}")


def index_health(folder: Path, base: str) -> Iterator[Finding]:
    """Whether an index opens, is complete, and was made for this base model."""
    try:
        index = AdapterIndex.open(folder)
    except (ValueError, LookupError, OSError) as error:
        yield Finding("index", "problem", str(error), REBUILD)
        return
    with index:
        try:
            index.prepare()
        except (ValueError, LookupError, OSError) as error:
            yield Finding("index", "problem", str(error), REBUILD)
            return
        yield Finding("index", "ok", f"{folder}: {len(index)} adapters")
        for problem in index.verify().problems:
            subject = f"adapter {problem.adapter}" if problem.adapter else "index"
            yield Finding(subject, "problem", problem.what, problem.remedy)
        for other in sorted({card.base_model for card in index.cards} - {"", base}):
            names = [card.name for card in index.cards if card.base_model == other]
            detail = f"{len(names)} adapters name the base {other!r}, among them {names[0]!r}"
            yield Finding(
                "index", "warning", detail, f"run them on that base, or check that {base!r} is the same model"
            )
