"""An adapter folder as its two headers describe it: which tensors make which module, before any is mapped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loracompose.adapters.folder import CONFIG, PICKLED, WEIGHTS, parse_json_object, read_json_text
from loracompose.adapters.header import RawHeader, TensorEntry, parse_header, read_raw_header
from loracompose.adapters.lora import Kind
from loracompose.adapters.peft_config import LoraSettings, UnsupportedAdapterError, read_settings

PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"base_model\.model\.(?P<module>.+)\."
    r"(?:lora_(?P<linear>[AB])(?:\.(?P<infix>[^.]+))?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.(?P<embedding_infix>[^.]+))?)"
)
_BASE_COPY = re.compile(r"base_model\.model\.(?P<module>.+)\.base_layer\.weight")
# Tensors of flavours whose configuration field says nothing, or was lost.
_FOREIGN = (
    ("lora_magnitude_vector", "DoRA's magnitudes", "train without DoRA"),
    (".bias", "a trained bias", 'train with bias="none" and lora_bias=False'),
    ("modules_to_save", "a whole trained module", "train without modules_to_save"),
    ("trainable_tokens_", "trained rows of an embedding", "train without trainable_token_indices"),
    ("embed_tokens.weight", "a whole embedding", "save with PEFT's save_embedding_layers=False"),
    ("lm_head.weight", "a whole output head", "save with PEFT's save_embedding_layers=False"),
)


@dataclass(frozen=True)
class ModuleLayout:
    """The two tensors of one module by name, with the shapes A (r, d_in) and B (d_out, r) agreed."""

    kind: Kind
    A: str
    B: str
    rank: int
    d_in: int
    d_out: int
    scaling: float


@dataclass(frozen=True)
class AdapterLayout:
    """A checked adapter folder: settings, module path -> tensors, and copies of base weights PEFT put beside them.

    PEFT stores the frozen weight of an adapted `embed_tokens` or `lm_head` in the adapter's file. It is no part of
    the update; `base_copies` (module path -> tensor name) lets it be compared with the base.
    """

    name: str
    weights: Path
    settings: LoraSettings
    entries: Mapping[str, TensorEntry]
    modules: Mapping[str, ModuleLayout]
    base_copies: Mapping[str, str]


def read_layout(folder: Path, name: str) -> AdapterLayout:
    """The layout of a PEFT LoRA folder, without a stray or unpaired tensor.

    Whether a module is missing altogether is for `base.check_complete` to say.

    Raises:
        FileNotFoundError: there is no such folder.
        LookupError: a file is missing.
        UnsupportedAdapterError: pickled weights, or a flavour other than plain LoRA.
        ValueError: a malformed file, stray or unpaired tensors, a rank other than configured.
    """
    return parse_layout(read_headers(folder, name), folder, name)


@dataclass(frozen=True)
class Headers:
    """The bytes that decide a layout but for its name and place: adapters that were made alike have equal ones."""

    config: bytes
    weights: RawHeader

    @property
    def nbytes(self) -> int:
        """Their length."""
        return len(self.config) + len(self.weights.text)


def read_headers(folder: Path, name: str) -> Headers:
    """The bytes of both headers of a folder, not looked at; raises as `read_layout` does where a file cannot be."""
    return Headers(_read_config_text(folder, name), _read_raw_header(folder, name))


def parse_layout(headers: Headers, folder: Path, name: str) -> AdapterLayout:
    """The layout that the headers of a folder describe; raises as `read_layout` does where they are wrong."""
    settings = _parse_settings(headers.config, folder, name)
    return arrange(folder, name, settings, parse_header(headers.weights, folder / WEIGHTS))


def read_config(folder: Path, name: str) -> LoraSettings:
    """The settings in the folder's `adapter_config.json`; raises as `read_layout` does."""
    return _parse_settings(_read_config_text(folder, name), folder, name)


def read_entries(folder: Path, name: str) -> Mapping[str, TensorEntry]:
    """The header of the folder's weights; raises as `read_layout` does."""
    return parse_header(_read_raw_header(folder, name), folder / WEIGHTS)


def _read_config_text(folder: Path, name: str) -> bytes:
    if not folder.is_dir():
        raise FileNotFoundError(f"{name}: there is no adapter folder {folder}")
    return read_json_text(folder / CONFIG)


def _parse_settings(text: bytes, folder: Path, name: str) -> LoraSettings:
    return read_settings(parse_json_object(text, str(folder / CONFIG)), name)


def _read_raw_header(folder: Path, name: str) -> RawHeader:
    pickled = [file for file in PICKLED if (folder / file).exists()]
    if pickled and not (folder / WEIGHTS).exists():
        raise UnsupportedAdapterError(
            f"{name}: {pickled[0]} is a pickle, which runs code when it is read; load it with PEFT where you trust it "
            f"and save it again with safe_serialization=True, which makes {WEIGHTS}"
        )
    return read_raw_header(folder / WEIGHTS)


def arrange(folder: Path, name: str, settings: LoraSettings, entries: Mapping[str, TensorEntry]) -> AdapterLayout:
    """Pair the tensors of each module and hold them against the settings; raises as `read_layout` does."""
    pairs, copies = _sort_tensors(name, entries)
    modules = {}
    settings.check_work(name, pairs)
    for module, (kind, tensors) in sorted(pairs.items()):
        if not settings.targets(module):
            raise ValueError(f"{name}: {module!r} has tensors, but the configuration does not target it")
        modules[module] = _pair(name, module, kind, tensors, settings, entries)
    if not modules:
        raise ValueError(f"{name}: {WEIGHTS} holds no LoRA tensors; an empty adapter cannot be composed")
    for module, key in copies.items():
        _check_base_copy(name, module, key, modules, entries)
    return AdapterLayout(
        name=name,
        weights=folder / WEIGHTS,
        settings=settings,
        entries=entries,
        modules=MappingProxyType(modules),
        base_copies=MappingProxyType(copies),
    )


def _sort_tensors(
    name: str, entries: Mapping[str, TensorEntry]
) -> tuple[dict[str, tuple[Kind, dict[str, str]]], dict[str, str]]:
    """Module path -> (kind, {"A": tensor name, "B": tensor name}), and module path -> copied base weight."""
    pairs: dict[str, tuple[Kind, dict[str, str]]] = {}
    copies: dict[str, str] = {}
    infixes: set[str | None] = set()
    for key in entries:
        if found := _FACTOR.fullmatch(key):
            kind: Kind = "linear" if found["linear"] else "embedding"
            known, tensors = pairs.setdefault(found["module"], (kind, {}))
            if known != kind:
                raise ValueError(f"{name}: {found['module']!r} has tensors of a linear and of an embedding adapter")
            tensors[found["linear"] or found["embedding"]] = key
            infixes.add(found["infix"] or found["embedding_infix"])
        elif copied := _BASE_COPY.fullmatch(key):
            copies[copied["module"]] = key
        else:
            raise _stray(name, key)
    if len(infixes) > 1:
        told = sorted(infix or "none" for infix in infixes)
        raise ValueError(f"{name}: its tensors are named for several adapters ({told}); save each one alone")
    return pairs, copies


def _stray(name: str, key: str) -> ValueError:
    for part, what, remedy in _FOREIGN:
        if part in key:
            return UnsupportedAdapterError(f"{name}: the tensor {key!r} is {what}, not a factor of B @ A; {remedy}")
    remedy = "remove it, or save the adapter again with PEFT"
    if not key.startswith(PREFIX):
        remedy = f"names begin with {PREFIX!r}; save the adapter again with PEFT"
    return ValueError(f"{name}: the tensor {key!r} belongs to no LoRA factor; {remedy}")


def _pair(
    name: str,
    module: str,
    kind: Kind,
    tensors: Mapping[str, str],
    settings: LoraSettings,
    entries: Mapping[str, TensorEntry],
) -> ModuleLayout:
    if len(tensors) < 2:
        have = next(iter(tensors))
        raise ValueError(f"{name}: {module!r} has a tensor {have} and none {'B' if have == 'A' else 'A'}")
    A, B = entries[tensors["A"]].shape, entries[tensors["B"]].shape
    if len(A) != 2 or len(B) != 2:
        raise UnsupportedAdapterError(
            f"{name}: {module!r} has factors of shapes {A} and {B}; only matrices are supported, no convolutions"
        )
    rank = settings.rank(module)
    if A[0] != rank or B[1] != rank:
        raise ValueError(
            f"{name}: {module!r} has A {A} and B {B}, expected A ({rank}, d_in) and B (d_out, {rank}): "
            "r and rank_pattern of the configuration say so"
        )
    return ModuleLayout(kind, tensors["A"], tensors["B"], rank, A[1], B[0], settings.scaling(module))


def _check_base_copy(
    name: str, module: str, key: str, modules: Mapping[str, ModuleLayout], entries: Mapping[str, TensorEntry]
) -> None:
    own = modules.get(module)
    if own is None:
        raise UnsupportedAdapterError(f"{name}: {key!r} replaces a weight of the base; save only LoRA factors")
    expected = (own.d_in, own.d_out) if own.kind == "embedding" else (own.d_out, own.d_in)
    if entries[key].shape != expected:
        raise ValueError(f"{name}: {key!r} has shape {entries[key].shape}, its module's factors say {expected}")
