"""Who waits for another thread's work, made visible."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import ModuleType
from typing import Any

import pytest


def announced_waits(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """A semaphore that is released once for each thread that waits for a future of the module."""
    arrived = threading.Semaphore(0)

    class Announcing(Future[Any]):
        def result(self, timeout: float | None = None) -> Any:
            arrived.release()
            return super().result(timeout)

    monkeypatch.setattr(module, "Future", Announcing)
    return arrived
