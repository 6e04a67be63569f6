"""The vectors that adapters are compared by: of whole prompts, of their edges, and of the shapes of their subjects.

All three are compared alike, each by a discriminant of its own; faiss searches the first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from loracompose.retrieval.embedding import edges, whole
from loracompose.retrieval.shape import SHAPE_WIDTH, shapes

Singles = NDArray[np.float32]
Parts = tuple[Singles, Singles, Singles]

WHOLE, EDGE, SHAPE = range(3)


def parts_of(features: Singles, prompts: Sequence[str]) -> Parts:
    """The parts of prompts, given by their features (n, width) as well, each (n, D)."""
    return whole(features), edges(features), shapes(prompts)


def part_widths(width: int) -> tuple[int, int, int]:
    """How many numbers each part has, D, where features have so many."""
    return width // 2, width // 2, SHAPE_WIDTH
