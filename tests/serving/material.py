"""A tiny engine behind the server."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path

from fastapi.testclient import TestClient

from loracompose import Engine
from loracompose.serving.app import create_app
from loracompose.serving.batcher import Batcher
from tests.engines import CHATML, build_engine


def chatty_engine(folder: Path) -> Engine:
    """The tiny engine with a chat template."""
    engine = build_engine(folder)
    engine.base.tokenizer.chat_template = CHATML
    return engine


@contextmanager
def client_of(engine: Engine, *, api_key: str | None = None, **settings):
    with TestClient(create_app(engine, Batcher(engine, **settings), api_key=api_key)) as client:
        yield client


def said(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def chunks(text: str) -> list:
    """The events of a stream."""
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]
