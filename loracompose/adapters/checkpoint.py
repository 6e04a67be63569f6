"""PEFT folders in and out: an adapter is read exactly or refused, and written so that stock PEFT reads it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import get_total_norm

import loracompose
from loracompose.adapters.base import Base, as_module, check_complete
from loracompose.adapters.flat import is_flat, read_flat, surely_fits
from loracompose.adapters.folder import CONFIG, RECIPE, WEIGHTS, read_json_object, write_folder, write_json
from loracompose.adapters.header import DTYPES
from loracompose.adapters.layout import PREFIX, AdapterLayout, ModuleLayout, read_layout
from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.adapters.peft_config import UnsupportedAdapterError

ROUNDED_UP = 1.01  # more than the norm loses in float32, and than rounding to 16 bits adds

__all__ = ["UnsupportedAdapterError", "load_adapter", "save_adapter"]


def load_adapter(
    path: Path | str,
    *,
    base: Base | None = None,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Adapter:
    """The adapter in a PEFT folder, exactly as PEFT would apply it, or an error that says why not.

    The scaling is folded into B once, in float32 (float64 for float64 tensors), then everything is rounded once to
    `dtype`. The fingerprint is that of the unrounded factors, whatever `dtype` is.

    Args:
        path: a folder with `adapter_config.json` and `adapter_model.safetensors`.
        base: the base model, or its transformers configuration; every module and shape is then held against it.
        name: the adapter's name; the folder's if not given.
        dtype: of the factors; float32 if not given, float64 if the file has float64 tensors.
        device: where the factors go.

    Raises:
        FileNotFoundError: there is no such folder.
        LookupError: a missing file, target or module of the base.
        UnsupportedAdapterError: a flavour that is not plain LoRA, or pickled weights.
        ValueError: anything malformed, incomplete, of the wrong shape, not finite or too large to compute with.
    """
    if dtype is not None:
        check_dtype(dtype)
    layout = read_checked(Path(path), base=base, name=name)
    adapter = read_adapter(layout)
    moves = dtype not in (None, adapter_dtype(layout)) or torch.device(device).type != "cpu"
    return convert(adapter, device, dtype) if moves else adapter


def read_checked(folder: Path, *, base: Base | None, name: str | None) -> AdapterLayout:
    """The layout of a folder, held against `base` if one is given; raises as `load_adapter` does."""
    layout = read_layout(folder, name or folder.resolve().name)
    model = None if base is None else as_module(base)
    check_complete(layout, model)
    if model is not None:
        check_base_copies(layout, model)
    return layout


def read_adapter(layout: AdapterLayout, *, trusted: bool = False) -> Adapter:
    """The folded factors of a checked layout, on the CPU, in the dtype they are folded in.

    Args:
        layout: of the folder.
        trusted: the same files were read and checked before; their values are not looked at again.

    Raises:
        ValueError: a value that is not finite, an update too large for the dtype, a file that changed since, or a
            malformed recipe.
    """
    factors = _factors(layout, adapter_dtype(layout), trusted)
    recipe_file = layout.weights.with_name(RECIPE)
    recipe = read_json_object(recipe_file) if recipe_file.exists() else None
    if recipe is not None:
        recipe.pop("versions", None)
    settings = layout.settings
    return Adapter(layout.name, factors, settings.base_model, settings.task_type, recipe)


def _factors(layout: AdapterLayout, dtype: torch.dtype, trusted: bool) -> dict[str, LoraFactors]:
    if is_flat(layout):
        flat, factors = read_flat(layout, dtype)
        if trusted or surely_fits(flat, layout):
            return factors
    with _open(layout) as file:  # tensor by tensor: what is wrong is said by name
        factors = {module: _fold(file, layout, own, dtype) for module, own in layout.modules.items()}
    for module, folded in factors.items():
        _check_size(layout.name, module, folded)
    return factors


def adapter_dtype(layout: AdapterLayout) -> torch.dtype:
    """The dtype its factors are folded in: float64 if one of them is stored so, float32 otherwise."""
    stored = {layout.entries[key].dtype for own in layout.modules.values() for key in (own.A, own.B)}
    return torch.float64 if torch.float64 in stored else torch.float32


def convert(adapter: Adapter, device: torch.device | str, dtype: torch.dtype | None) -> Adapter:
    """The adapter on a device and rounded to `dtype`, which keeps its fingerprint.

    Raises:
        ValueError: a finite value, or the update of a rank, is too large for `dtype`.
    """
    converted = adapter.to(device, dtype)
    if dtype is not None and not _surely_fits(adapter, dtype):
        for module, factors in converted.factors.items():
            if factors.A.dtype == adapter.factors[module].A.dtype:
                continue  # checked when it was read
            for side, tensor in (("A", factors.A), ("B", factors.B)):
                _check_finite(adapter.name, f"{side} of {module}", tensor)
            _check_size(adapter.name, module, factors)
    return converted


def _surely_fits(adapter: Adapter, dtype: torch.dtype) -> bool:
    """Whether no value and no update of a rank can be too large for a dtype; False says nothing.

    With n the norm of all factors together no value and no norm of a rank exceeds n, and no update n².
    """
    own = {tensor.dtype for factors in adapter.factors.values() for tensor in (factors.A, factors.B)}
    if own == {dtype}:
        return True  # checked when it was read
    factors = [tensor for factors in adapter.factors.values() for tensor in (factors.A, factors.B)]
    n = get_total_norm(factors).item() * ROUNDED_UP
    return max(n, n * n) <= torch.finfo(dtype).max  # False of a norm that is not finite


def check_dtype(dtype: torch.dtype) -> None:
    """Raise ValueError unless factors can be held in `dtype`."""
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype must be one of {[str(d) for d in DTYPES.values()]}, got {dtype}")


@contextmanager
def _open(layout: AdapterLayout) -> Iterator[Any]:
    """The memory-mapped weights; what safetensors finds wrong with them becomes a ValueError."""
    try:
        with safe_open(layout.weights, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{layout.name}: {layout.weights} cannot be read, or changed: {error}") from error


def _fold(file: Any, layout: AdapterLayout, own: ModuleLayout, dtype: torch.dtype) -> LoraFactors:
    # copy=True: a file cut short in place would crash every later use of factors that still map it.
    A = file.get_tensor(own.A).to(dtype, copy=True)  # (r, d_in)
    B = file.get_tensor(own.B).to(dtype, copy=True)  # (d_out, r)
    for key, tensor in ((own.A, A), (own.B, B)):
        _check_finite(layout.name, key, tensor)
    B.mul_(own.scaling)
    _check_finite(layout.name, f"{own.B} times scaling {own.scaling:g}", B)
    return LoraFactors(A, B, own.kind)


def _check_finite(name: str, what: str, tensor: Tensor) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        bad = tensor.numel() - int(finite.sum())
        raise ValueError(f"{name}: {what} has {bad} values that are not finite in {tensor.dtype}")


def _check_size(name: str, module: str, factors: LoraFactors) -> None:
    """Refuse finite factors whose update overflows their dtype: it would be nan in the hidden states of a whole row."""
    wide = torch.float64  # norms of values near the largest of float32 are no float32 numbers
    a = torch.linalg.vector_norm(factors.A, dim=1, dtype=wide)  # (r,)
    b = torch.linalg.vector_norm(factors.B, dim=0, dtype=wide)  # (r,)
    largest = torch.stack([a, b, a * b]).max().item()
    dtype = torch.promote_types(factors.A.dtype, factors.B.dtype)
    limit = torch.finfo(dtype).max
    if not largest <= limit:
        raise ValueError(
            f"{name}: {module} has a rank whose factors or update are of norm {largest:.3g}, and {dtype} ends at "
            f"{limit:.3g}: the adapter is damaged or its training diverged. Take another checkpoint of it, or load it "
            "in a wider dtype if this one is narrower than the file's"
        )


def check_base_copies(layout: AdapterLayout, model: nn.Module) -> None:
    """An adapter's copy of a base weight must be that weight; a base on the meta device has no values to compare."""
    if not layout.base_copies:
        return
    with _open(layout) as file:
        for module, key in layout.base_copies.items():
            weight, copied = model.get_parameter(f"{module}.weight"), file.get_tensor(key)
            if weight.is_meta:
                continue
            own = weight.detach().cpu()  # whichever of the two was rounded, the wider cannot be compared
            if not (torch.equal(own.to(copied.dtype), copied) or torch.equal(own, copied.to(own.dtype))):
                raise UnsupportedAdapterError(
                    f"{layout.name}: {key!r} differs from the base's {module!r}, so the adapter is more than B @ A; "
                    "train with the embedding frozen, or give the base it was trained on"
                )


def save_adapter(adapter: Adapter, folder: Path | str, *, overwrite: bool = False) -> Path:
    """Write a plain PEFT folder whose scaling is 1, which stock PEFT loads to the same outputs.

    Every module gets the largest rank, shorter ones padded with zeros, because one rank needs no patterns. Dtypes
    are kept. `recipe.json` says how the adapter came about and with which versions. The folder appears complete or
    not at all; with `overwrite` it replaces an adapter folder and everything in it.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder exists and `overwrite` is false.
        ValueError: no ranks to save, values that are not finite, a dtype PEFT cannot hold, or an existing folder
            that is no adapter.
    """
    rank = max((factors.rank for factors in adapter.factors.values()), default=0)
    if rank == 0:
        raise ValueError(
            f"{adapter.name}: it has no ranks, and PEFT knows no adapter of rank 0; there is nothing to save"
        )
    tensors: dict[str, Tensor] = {}
    for module, factors in adapter.factors.items():
        tensors.update(_tensors(adapter.name, module, factors, rank))
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(adapter.factors),
        base_model_name_or_path=adapter.base_model or None,
        task_type=adapter.task_type,
        inference_mode=True,
    ).to_dict()
    config["target_modules"] = list(adapter.factors)  # LoraConfig made it a set, whose order is random
    recipe = _recipe(adapter)

    def fill(fresh: Path) -> None:
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        write_json(fresh / CONFIG, config)
        write_json(fresh / RECIPE, recipe)

    target = Path(folder)
    write_folder(target, fill, overwrite=overwrite)
    return target


def _tensors(name: str, module: str, factors: LoraFactors, rank: int) -> dict[str, Tensor]:
    short = rank - factors.rank
    A = functional.pad(factors.A.detach().cpu(), (0, 0, 0, short))  # (rank, d_in)
    B = functional.pad(factors.B.detach().cpu(), (0, short))  # (d_out, rank)
    kind = ("lora_A.weight", "lora_B.weight")
    if factors.kind == "embedding":
        kind = ("lora_embedding_A", "lora_embedding_B")
    tensors = {f"{PREFIX}{module}.{end}": tensor for end, tensor in zip(kind, (A, B), strict=True)}
    for key, tensor in tensors.items():
        check_dtype(tensor.dtype)
        _check_finite(name, key, tensor)
    # safetensors refuses tensors that share memory, such as one A used by two modules
    return {key: tensor.clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}


def _recipe(adapter: Adapter) -> Mapping[str, Any]:
    source = {"name": adapter.name, "fingerprint": adapter.fingerprint}
    recipe = adapter.recipe if adapter.recipe is not None else {"method": "copy", "sources": [source]}
    if "versions" in recipe:
        raise ValueError(f"{adapter.name}: the recipe's key 'versions' is written by save_adapter; rename it")
    versions = {"loracompose": loracompose.__version__, "torch": str(torch.__version__), "peft": peft.__version__}
    return {**recipe, "versions": versions}
