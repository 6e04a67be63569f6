"""What must not enter is refused by name with the remedy, and the index is what it was, byte by byte."""

from __future__ import annotations

import json
import sqlite3

import numpy as np
import pytest

from loracompose import AdapterIndex
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.retrieval.upkeep import content_digest
from tests.retrieval.material import TASKS, bag_of_words, make_adapter


@pytest.fixture(params=[False, True], ids=["refers", "copies"])
def index(request, pool, tmp_path, embedder):
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder, copy=request.param) as built:
        yield built


def logical(index):
    """Every record, and every file beside the catalog by name and content."""
    files = {
        path: path.read_bytes() for path in index.folder.rglob("*") if path.is_file() and "sqlite" not in path.name
    }
    return content_digest(index.catalog), files, sorted(path.name for path in index.folder.iterdir() if path.is_dir())


def write(folder, text):
    (folder / "card.json").write_text(text)


CARDS = {
    "no card": (lambda folder: (folder / "card.json").unlink(), r"no card\.json beside the adapter; .* Write one"),
    "not JSON": (lambda folder: write(folder, "{examples: ["), r"poem: .*card\.json is not valid JSON"),
    "not text": (
        lambda folder: (folder / "card.json").write_bytes(b"\xff\xfe\x00"),
        "poem: .*is not valid JSON: 'utf-8'",
    ),
    "no object": (lambda folder: write(folder, '["a"]'), "poem: .*must hold a JSON object, got list"),
    "a number that is none": (lambda folder: write(folder, '{"examples": ["a"], "x": NaN}'), "poem: .*NaN is not JSON"),
    "no examples": (lambda folder: write(folder, "{}"), "has no examples .* Give about 20 prompts"),
    "an empty list": (lambda folder: write(folder, '{"examples": []}'), "has no examples"),
    "an empty example": (lambda folder: write(folder, '{"examples": ["a", ""]}'), r"blank examples at positions \[1\]"),
    "a blank example": (lambda folder: write(folder, '{"examples": [" \\n"]}'), r"blank examples at positions \[0\]"),
    "one text": (lambda folder: write(folder, '{"examples": "a b"}'), "must be a list of strings"),
    "a number": (lambda folder: write(folder, '{"examples": [1]}'), "one item is 1"),
    "no Unicode": (lambda folder: write(folder, '{"examples": ["\\ud800"]}'), "is not valid Unicode"),
    "no kind": (lambda folder: write(folder, '{"examples": {}}'), "poem: 'examples' .* names no kind, got {}"),
    "an empty kind": (lambda folder: write(folder, '{"examples": {"a": []}}'), "poem: the kind 'a' .* no examples"),
    "a kind that is no list": (lambda folder: write(folder, '{"examples": {"a": "b"}}'), "list of strings, got 'b'"),
    "a kind of no name": (lambda folder: write(folder, '{"examples": {"": ["b"]}}'), "poem: a kind .* has no name"),
    "torn weights": (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"torn"), "poem"),
}


@pytest.mark.parametrize(("harm", "message"), CARDS.values(), ids=CARDS.keys())
@pytest.mark.parametrize("update", [False, True])
def test_an_adapter_that_cannot_be_found_or_loaded_is_refused(index, tmp_path, harm, message, update):
    folder = make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=9)
    if update:
        index.add(folder)
        folder = make_adapter(tmp_path / "later" / "poem", ["another"], seed=10)
    before = logical(index)
    harm(folder)
    with pytest.raises((ValueError, LookupError), match=message):
        (index.update if update else index.add)(folder)
    assert logical(index) == before


def test_a_taken_name_is_refused(index, tmp_path):
    before = logical(index)
    with pytest.raises(ValueError, match=r"'sql' is in the index already; use update .* or rename the folder"):
        index.add(make_adapter(tmp_path / "late" / "sql", ["another"], seed=9))
    assert logical(index) == before


VECTORS = {
    "nan": lambda rows: np.full_like(rows, np.nan),
    "one nan": lambda rows: np.where(np.arange(rows.size).reshape(rows.shape) == 3, np.nan, rows),
    "infinite": lambda rows: np.full_like(rows, np.inf),
    "zero": np.zeros_like,
    "too few": lambda rows: rows[:1],
    "too wide": lambda rows: np.hstack([rows, rows]),
    "flat": lambda rows: rows[:, 0],
}


@pytest.mark.parametrize("spoil", VECTORS.values(), ids=VECTORS.keys())
@pytest.mark.parametrize("step", ["add", "update", "rebuild", "reopen"])
def test_vectors_that_are_not_finite_or_of_another_shape_are_refused(index, pool, tmp_path, spoil, step):
    spoiled = CallableEmbedder(lambda texts: spoil(bag_of_words(texts)), "bag-of-words", "1")
    spoiled.__dict__["dimension"] = 64
    poem = make_adapter(tmp_path / "late" / "poem", ["write a poem", "rhyme"], seed=9)
    changed = make_adapter(tmp_path / "late" / "sql", ["select", "join"], seed=9)
    before = logical(index)
    with AdapterIndex.open(index.folder, embedder=spoiled) as other:
        acts = {
            "add": lambda: other.add(poem),
            "update": lambda: other.update(changed),
            "rebuild": other.rebuild,
            "reopen": lambda: AdapterIndex.open(index.folder, embedder=spoiled, reembed=True),
        }
        with pytest.raises(ValueError, match=r"embedder 'bag-of-words' returned (a zero or non-finite vector|shape)"):
            acts[step]()
    assert logical(index) == before
    assert index.verify().ok


def test_an_index_of_another_encoder_is_neither_searched_nor_changed(index, pool, tmp_path):
    before = logical(index)
    poem = make_adapter(tmp_path / "late" / "poem", ["write a poem"], seed=9)
    other = CallableEmbedder(bag_of_words, "other", "1")
    message = r"embedded with 'bag-of-words' .* this embedder is 'other' .*reembed=True"
    with pytest.raises(ValueError, match=message):
        AdapterIndex.open(index.folder, embedder=other)
    with AdapterIndex.open(index.folder) as opened:
        opened._embedder = other
        uses = (
            lambda: opened.search(["x"]),
            lambda: opened.add(poem),
            lambda: opened.update(pool / "sql"),
            opened.prepare,
        )
        for use in uses:
            with pytest.raises(ValueError, match=message):
                use()
    assert logical(index) == before


@pytest.mark.parametrize("version", ["1", "2", "99"])
def test_an_index_of_another_format_is_not_opened_and_stays_as_it_is(index, embedder, version):
    index.close()
    file = index.folder / "catalog.sqlite"
    with sqlite3.connect(file) as other:
        other.execute("UPDATE meta SET value = ? WHERE key = 'format'", (version,))
    other.close()
    before = file.read_bytes()
    with pytest.raises(ValueError, match=f"has format version {version}, this loracompose reads version 4; use the"):
        AdapterIndex.open(index.folder, embedder=embedder)
    assert file.read_bytes() == before


def test_a_build_replaces_nothing_if_one_adapter_is_refused(index, pool, embedder):
    before = logical(index)
    write(pool / "sql", json.dumps({"examples": [""]}))
    with pytest.raises(ValueError, match=r"1 adapters cannot be indexed:\n  sql: .*blank examples"):
        AdapterIndex.build(pool, index.folder, embedder=embedder, strict=True, overwrite=True)
    spoiled = CallableEmbedder(lambda texts: np.full((len(texts), 64), np.nan), "bag-of-words", "1")
    spoiled.__dict__["dimension"] = 64
    with pytest.raises(ValueError, match="zero or non-finite"):
        AdapterIndex.build(pool, index.folder, embedder=spoiled, overwrite=True)
    assert logical(index) == before
    assert sorted(card.name for card in index.cards) == sorted(TASKS)
