"""What reaches the disk, and in which order."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def watched_disk(monkeypatch: pytest.MonkeyPatch) -> list[int | str]:
    """A list that grows by the number of every file that is synced, and by "rename" at every rename."""
    steps: list[int | str] = []
    sync, rename = os.fsync, Path.rename

    def watched_sync(descriptor: int) -> None:
        steps.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def watched_rename(path: Path, target: Path) -> Path:
        steps.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    return steps
