"""Does an adapter fit a base model: every module there, every shape right, every target adapted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TypeAlias

import torch
import transformers
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from loracompose.adapters.layout import AdapterLayout, ModuleLayout
from loracompose.adapters.lora import Kind
from loracompose.adapters.peft_config import UnsupportedAdapterError

Base: TypeAlias = nn.Module | PretrainedConfig


def as_module(base: Base) -> nn.Module:
    """The base itself, or the model a transformers configuration describes, built on the meta device."""
    if isinstance(base, nn.Module):
        return base
    name = next(iter(base.architectures or ()), "")
    automatic = transformers.AutoModelForSeq2SeqLM if base.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        model = getattr(transformers, name)(base) if hasattr(transformers, name) else automatic.from_config(base)
    if not isinstance(model, nn.Module):
        raise ValueError(f"the configuration's architecture {name!r} is not a model")
    return model


def check_complete(layout: AdapterLayout, base: Base | None) -> None:
    """Hold an adapter against its base model or, without one, against what its configuration alone promises.

    Without a base a missing module is noticed only if its target, or its layer in `layers_to_transform`, has no
    tensors at all.

    Raises:
        LookupError: a module of the adapter is not in the base, or a target in the base has no tensors.
        UnsupportedAdapterError: the module is no Linear, Conv1D or Embedding.
        ValueError: a shape that does not fit, or a copied base weight that differs from the base.
    """
    if base is None:
        _check_promises(layout)
        return
    model = as_module(base)
    named = dict(model.named_modules())
    for module, own in layout.modules.items():
        if module not in named:
            raise LookupError(f"{layout.name}: the base has no module {module!r}{_similar(module, named)}")
        _check_shape(layout.name, module, own, named[module])
    expected = _targets(layout, model, named)
    if missing := sorted(expected - set(layout.modules)):
        raise LookupError(f"{layout.name}: no tensors for {_some(missing)}, which the configuration targets")
    if stray := sorted(set(layout.modules) - expected):
        raise ValueError(f"{layout.name}: {_some(stray)} have tensors, but the configuration does not target them")


def module_shape(module: nn.Module) -> tuple[Kind, int, int] | None:
    """(kind, d_in, d_out) of a module that can be adapted, or None."""
    if isinstance(module, nn.Embedding):
        return "embedding", module.num_embeddings, module.embedding_dim
    if isinstance(module, Conv1D):  # its weight is (d_in, d_out)
        return "linear", module.weight.shape[0], module.weight.shape[1]
    d_in, d_out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return ("linear", d_in, d_out) if isinstance(d_in, int) and isinstance(d_out, int) else None


def _check_promises(layout: AdapterLayout) -> None:
    settings, modules = layout.settings, layout.modules
    if isinstance(settings.target_modules, frozenset) and not settings.exclude_modules:
        seen = {module[start:] for module in modules for start in _suffix_starts(module)}
        if missing := sorted(settings.target_modules - seen):
            raise LookupError(
                f"{layout.name}: no tensors for target_modules {missing}; the adapter has {_some(modules)}. "
                "The file is incomplete; or its base has no such modules, and giving base=... will show it"
            )
    for layer in settings.layers_to_transform or ():
        if not any(f".{layer}." in module for module in modules):
            raise LookupError(f"{layout.name}: layers_to_transform lists layer {layer}, which has no tensors")


def _suffix_starts(module: str) -> list[int]:
    """Where the dotted suffixes of a module path begin."""
    return [0, *(i + 1 for i, letter in enumerate(module) if letter == ".")]


def _check_shape(name: str, module: str, own: ModuleLayout, target: nn.Module) -> None:
    shape = module_shape(target)
    if shape is None:
        raise UnsupportedAdapterError(
            f"{name}: {module!r} is a {type(target).__name__} in the base; only Linear, Conv1D and Embedding fit"
        )
    kind, d_in, d_out = shape
    if kind != own.kind:
        raise ValueError(f"{name}: {module!r} is of kind {own.kind} in the adapter and {kind} in the base")
    if (d_in, d_out) != (own.d_in, own.d_out):
        raise ValueError(
            f"{name}: {module!r} maps {own.d_in} -> {own.d_out} in the adapter and {d_in} -> {d_out} in the base; "
            "it was trained for another base model"
        )


def _targets(layout: AdapterLayout, model: nn.Module, named: Mapping[str, nn.Module]) -> set[str]:
    """Every module of the base that PEFT would adapt under these settings."""
    settings = layout.settings
    if settings.target_modules is None:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        chosen = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind)
        if chosen is None:
            raise LookupError(f"{layout.name}: target_modules is not set and PEFT has no default for {kind!r}")
        settings = replace(settings, target_modules=chosen if isinstance(chosen, str) else frozenset(chosen))
    elif settings.needs_base:
        question = SimpleNamespace(target_modules=settings.target_modules, task_type=settings.task_type)
        linear = _maybe_include_all_linear_layers(question, model).target_modules
        settings = replace(settings, target_modules=frozenset(linear))
    settings.check_work(layout.name, named)
    return {module for module in named if module and settings.targets(module)}


def _similar(module: str, named: Mapping[str, nn.Module]) -> str:
    last = module.rpartition(".")[2]
    same = [other for other in named if other.rpartition(".")[2] == last][:3]
    return f"; it has {same}" if same else f"; its modules are named like {list(named)[-3:]}"


def _some(modules: Iterable[str], most: int = 8) -> str:
    names = sorted(modules)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
