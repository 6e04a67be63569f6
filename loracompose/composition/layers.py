"""Which transformer layer a module belongs to."""

from __future__ import annotations

import re

LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.")  # the outermost numbered block: "model.layers.3", "transformer.h.3"


def layer_of(path: str) -> str:
    """Path of the numbered layer that holds a module, "" if none does."""
    match = LAYER.match(path)
    return match["layer"] if match else ""
