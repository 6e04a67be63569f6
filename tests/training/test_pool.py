from __future__ import annotations

import shutil

import pytest

from loracompose import AdapterIndex
from loracompose.models import open_base
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.training.pool import open_pool
from tests.engines import build_pool, tokenizer
from tests.retrieval.material import TASKS, bag_of_words
from tests.tiny import base_model


@pytest.fixture
def index(tmp_path):
    embedder = CallableEmbedder(bag_of_words, "bag-of-words", "1")
    with AdapterIndex.build(build_pool(tmp_path / "pool"), tmp_path / "index", embedder=embedder, copy=True) as made:
        yield made


@pytest.fixture
def base():
    return open_base(base_model(), "auto", "auto", tokenizer())


def test_the_pool_of_an_index_is_what_the_index_holds(index, base):
    with open_pool(index, base) as loaded:
        assert sorted(loaded.pool.names) == sorted(TASKS)
        assert {a.fingerprint for a in loaded.pool.adapters} == {card.fingerprint for card in index.cards}


def test_an_adapter_that_was_changed_since_it_was_indexed_is_refused(index, base):
    changed, other = (index.path(name) for name in list(TASKS)[:2])
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(other / file, changed / file)
    match = f"and the index knows {next(iter(TASKS))!r} as .*tell the index with update"
    with pytest.raises(ValueError, match=match), open_pool(index, base):
        pass
