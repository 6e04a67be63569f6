"""How a result is kept: JSON with as many digits as were measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loracompose.durable import write_whole


def significant(value: Any, digits: int = 4) -> Any:
    """The same JSON with numbers of so many significant digits."""
    if isinstance(value, Mapping):
        return {key: significant(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [significant(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def write_result(result: Mapping[str, Any], file: Path) -> None:
    """Write a result whole, its folder made where there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(significant(result), indent=1) + "\n")
