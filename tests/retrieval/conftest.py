"""An embedder without a model, and a pool of four adapters."""

from __future__ import annotations

import pytest

from loracompose import AdapterIndex
from loracompose.retrieval.embedding import CallableEmbedder
from tests.retrieval.material import TASKS, bag_of_words, make_adapter


@pytest.fixture
def embedder():
    return CallableEmbedder(bag_of_words, "bag-of-words", "1")


@pytest.fixture
def pool(tmp_path):
    """A folder of four adapters."""
    for seed, (name, examples) in enumerate(TASKS.items()):
        make_adapter(tmp_path / "pool" / name, examples, seed)
    return tmp_path / "pool"


@pytest.fixture
def index(pool, tmp_path, embedder):
    """An index over the pool."""
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder) as built:
        yield built
