"""What a folder of work was made with, so that what stands in it is not taken for the work of other settings."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from loracompose.durable import write_whole

FILE = "made_with.json"


def made_otherwise(work: Path, now: Mapping[str, str | int]) -> str | None:
    """What WORK was made with, if that is something else; None if it is the same, or nothing was made yet.

    Args:
        work: a folder that exists; the first call writes down `now` there.
        now: the settings and the resolved paths that decide what is made.
    """
    kept = work / FILE
    if not kept.exists():
        write_whole(kept, json.dumps(dict(now), indent=1) + "\n")
        return None
    before = json.loads(kept.read_text(encoding="utf-8"))
    return None if before == dict(now) else ", ".join(f"{name} {value}" for name, value in before.items())
