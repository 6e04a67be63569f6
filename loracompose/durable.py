"""Files that appear whole or not at all, and that are on the disk when they do."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedWriter
from pathlib import Path


@contextmanager
def whole_file(target: Path) -> Iterator[BufferedWriter]:
    """A stream to a file aside, which is flushed to the disk and takes the target's place when the block ends.

    If the block raises, the target stays as it was and nothing lies beside it.
    """
    aside = target.with_name(f".{target.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with aside.open("wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(target: Path, text: str) -> None:
    """Write a text in UTF-8 that appears whole."""
    with whole_file(target) as stream:
        stream.write(text.encode("utf-8"))
