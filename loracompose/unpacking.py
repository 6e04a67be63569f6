"""A GGUF base model unpacked once to a safetensors folder, which loads in a second instead of half a minute."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from hashlib import file_digest
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

# Raised when what is written changes; part of the folder's name, so that older folders are left alone.
FORMAT = 1


def cache_folder() -> Path:
    """Where unpacked models live: `$LORACOMPOSE_CACHE`, else `~/.cache/loracompose`."""
    return Path(os.environ.get("LORACOMPOSE_CACHE") or "~/.cache/loracompose").expanduser()


def unpack_gguf(file: Path) -> Path:
    """The folder that holds the model and tokenizer of a GGUF file in the format of transformers.

    Unpacked on the first call, keyed by the content of the file. Weights are kept in float32: a de-quantised Q4_1
    weight has up to 16 significant bits, which bfloat16 would round away. Two processes may do it at once: each
    writes a folder of its own, and the first rename wins.

    Raises:
        ModuleNotFoundError: the package `gguf` is not installed.
    """
    with file.open("rb") as stream:
        digest = file_digest(stream, "sha256").hexdigest()
    folder = cache_folder() / "models" / f"{file.stem}-{digest[:16]}-v{FORMAT}"
    if folder.is_dir():
        return folder
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f'reading {file.name} needs the package gguf: pip install "loracompose[gguf]"')
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(file, aside)
        _publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _write(file: Path, folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    _forget_quantisation(model)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    for written in folder.iterdir():
        written.chmod(0o644)  # safetensors and mkdtemp write for the owner alone; a cache may be shared
        with written.open("rb") as stream:
            os.fsync(stream.fileno())
    folder.chmod(0o755)


def _forget_quantisation(model: PreTrainedModel) -> None:
    """The weights are plain by now; what transformers noted of the GGUF would only stop them from being saved."""
    for name in ("quantization_config", "_model_name_or_path"):
        model.config.__dict__.pop(name, None)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(name, None)


def _publish(aside: Path, folder: Path) -> None:
    try:
        aside.rename(folder)
    except OSError:
        if not folder.is_dir():  # otherwise another process was faster, with the same content
            raise
