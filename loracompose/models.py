"""Base models with their tokenizers, ready to generate."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from loracompose.devices import pick_device, pick_dtype
from loracompose.locating import DEFAULT_BASE, ResolvedModel, Source, found_or_explained, resolve_base
from loracompose.unpacking import unpack_gguf

__all__ = ["DEFAULT_BASE", "BaseModel", "load_base", "load_tokenizer", "open_base", "wrap_base"]


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A base model ready to generate: in eval mode, with a tokenizer that pads where the model needs it.

    `name` is the name asked for, which exported adapters state as their base.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: Source
    device: torch.device
    dtype: torch.dtype


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
    with found_or_explained(resolved):
        path = _folder(resolved)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model = auto.from_pretrained(path, config=config, dtype=kind, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    _name(model, resolved.requested)
    return BaseModel(
        model=model.to(place).eval(),
        tokenizer=_padding(tokenizer, resolved.requested, config.is_encoder_decoder),
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
    own = load_tokenizer(name) if tokenizer is None else copy.deepcopy(tokenizer)
    own = _padding(own, name, model.config.is_encoder_decoder)
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
    with found_or_explained(resolved):
        return _padding(AutoTokenizer.from_pretrained(_folder(resolved), trust_remote_code=False), resolved.requested)


def _folder(resolved: ResolvedModel) -> str:
    """What transformers can load: a GGUF file is unpacked, all else is as it was found."""
    path = resolved.path_or_name
    return str(unpack_gguf(Path(path))) if path.endswith(".gguf") else path


def _name(model: PreTrainedModel, name: str) -> None:
    """Call the model by the name asked for, not by the cache folder it was read from: PEFT exports this name."""
    model.name_or_path = name
    model.config.name_or_path = name


def _padding(
    tokenizer: PreTrainedTokenizerBase, name: str, is_encoder_decoder: bool = False
) -> PreTrainedTokenizerBase:
    # A decoder goes on behind the prompt. An encoder (BART) may count positions from the first place, padding or not.
    tokenizer.padding_side = "right" if is_encoder_decoder else "left"
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name!r} has neither a padding nor an end token: set one and save it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
