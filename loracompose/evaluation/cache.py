"""Answers are generated once and kept: an interrupted run continues, and a new method costs only itself."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import transformers

from loracompose import __version__
from loracompose.models import BaseModel
from loracompose.prompts import Prompt

SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"
VALUES_PER_PARAMETER = 64


@dataclass(frozen=True)
class Answer:
    """What was generated for one question.

    Attributes:
        text: the answer.
        added_bytes: of the ranks that its composition ran, at the base model's precision.
        composer: repr of the composer, "" for the base model alone.
    """

    text: str
    added_bytes: int
    composer: str


class AnswerCache:
    """A SQLite file of answers by key; several runs may share it.

    Each batch is one transaction, on the disk before the next begins: whatever stops a run, answers are there whole
    or not at all. Keys know adapters, weights, settings and the base by content, and the versions of the libraries
    that compute, but not the code here: after a change to how a composer computes, begin a new file.

    Raises:
        ValueError: the file is no cache.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None)
        try:
            self._connection.execute("PRAGMA synchronous = FULL")
            self._connection.execute(SCHEMA)
        except sqlite3.DatabaseError as error:
            self._connection.close()
            raise ValueError(f"{path} is no cache of answers ({error}); choose another file") from error

    def __enter__(self) -> AnswerCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return int(self._connection.execute("SELECT count(*) FROM answers").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def get(self, key: str) -> Answer | None:
        """The answer kept under a key."""
        row = self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else Answer(**json.loads(row[0]))

    def put(self, answers: Mapping[str, Answer]) -> None:
        """Keep answers, all or none; one that is there already stays."""
        rows = [(key, json.dumps(asdict(answer), ensure_ascii=False)) for key, answer in answers.items()]
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            self._connection.executemany("INSERT INTO answers VALUES (?, ?) ON CONFLICT (key) DO NOTHING", rows)
        except BaseException:
            self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")


def question_key(
    base: str,
    prompt: Prompt,
    members: Sequence[tuple[str, float]],
    composer: str,
    decoding: Mapping[str, Any],
) -> str:
    """Identity of a question.

    Args:
        base: identity of the base model.
        prompt: as the engine gets it.
        members: fingerprint and weight of every adapter, in any order; none is the base model, whatever the composer.
        composer: its repr, which has its hyper-parameters and the fingerprint of what it has learned.
        decoding: all else that decides the text.
    """
    content = [
        __version__,
        base,
        prompt if isinstance(prompt, str) else [dict(message) for message in prompt],
        sorted((fingerprint, weight.hex()) for fingerprint, weight in members),
        composer if members else "",
        dict(sorted(decoding.items())),
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def base_identity(base: BaseModel) -> str:
    """Identity of a base model and of what runs it, 24 hexadecimal digits.

    Over its name, dtype, kind of device, chat template, tokenizer, configuration, settings of generation and evenly
    spaced values of every parameter (all of them would take a minute for a large model), and the versions of torch
    and transformers.
    """
    template = getattr(base.tokenizer, "chat_template", None)
    digest = hashlib.sha256(f"{base.name} {base.dtype} {base.device.type} {template}".encode())
    digest.update(f"torch {torch.__version__} transformers {transformers.__version__}".encode())
    attention = getattr(base.model.config, "_attn_implementation", None)  # which the configuration does not tell
    digest.update(f"{base.model.config.to_json_string()} {attention}".encode())
    settings = getattr(base.model, "generation_config", None)
    if settings is not None:
        digest.update(settings.to_json_string().encode())
    backend = getattr(base.tokenizer, "backend_tokenizer", None)
    if backend is not None:
        said = json.loads(backend.to_str())
        said["padding"] = said["truncation"] = None  # which every call sets anew
        digest.update(json.dumps(said).encode())
    for name, parameter in sorted(base.model.named_parameters()):
        values = parameter.detach().flatten()
        step = max(1, len(values) // VALUES_PER_PARAMETER)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(values[::step].to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()[:24]
