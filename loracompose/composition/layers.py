"""What the path of a module says: its transformer layer, its part of that layer, and when it runs."""

from __future__ import annotations

import re

LAYER = re.compile(r"^(?P<layer>.*?\.\d+)\.")  # the outermost numbered block: "model.layers.3", "transformer.h.3"
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
CROSS_ATTENTION = re.compile(r"cross_?att|encdecatt|encoder_att", re.IGNORECASE)
# the last projection of an attention or feed-forward part, by its own name
LAST = re.compile(r"^(o|o_.*|out.*|c_proj|proj|dense|dense_4h_to_h|down.*|fc2|wo|w2|lin2)$", re.IGNORECASE)


def layer_of(path: str) -> str:
    """Path of the numbered layer that holds a module, "" if none does."""
    match = LAYER.match(path)
    return match["layer"] if match else ""


def part_of(path: str) -> str:
    """Which part of its layer a module is in: "attention", or "feed_forward" for all that is no attention."""
    inside = path[len(layer_of(path)) :]
    return "attention" if ATTENTION.search(inside) else "feed_forward"


def reads_encoder(path: str) -> bool:
    """Whether a module makes keys or values of cross-attention: it then reads the encoder's tokens."""
    own = path.rpartition(".")[2].lower()
    return bool(CROSS_ATTENTION.search(path)) and own.startswith(("k", "v"))


def running_order(path: str) -> tuple[object, ...]:
    """Sort key: the order in which a model runs its modules, as far as their names tell.

    Encoder before decoder, layer by layer, attention before cross-attention before feed-forward; within a part queries
    first and the projection back to the layer's width last. Modules outside the layers come last.
    """
    layer, own = layer_of(path), path.rpartition(".")[2].lower()
    number = int(layer.rpartition(".")[2]) if layer else 10**9
    decoder, cross = "decoder" in path.split("."), bool(CROSS_ATTENTION.search(path))
    feed_forward = part_of(path) == "feed_forward"
    return (decoder, number, feed_forward, cross, bool(LAST.match(own)), not own.startswith("q"), path)
