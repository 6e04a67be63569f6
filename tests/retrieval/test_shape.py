from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loracompose import AdapterIndex
from loracompose.retrieval.shape import SHAPE_WIDTH, sentences, shape, shapes
from loracompose.retrieval.snapshot import take_snapshot
from tests.retrieval.material import make_adapter

ONE = "The canal, which was dug in 1843, joins the two rivers near the old mill."
TWO = "The canal was dug in 1843. It joins the two rivers near the old mill."


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (ONE, 1),
        (TWO, 2),
        ("Stanley P. Mounts met Mr. Chad (b. 1958) of the U.S. Navy.", 1),
        ("It is sold by Viper, Inc. and others. They are few!", 2),
        ('He said "go." Then he went', 1),
        ("Really?! Yes...", 2),
        ("the price is 4.5 stars, see www.example.org", 0),
        ("all small. like this one.", 1),
        ("no end", 0),
        ("", 0),
    ],
)
def test_sentences_are_counted_by_their_ends_and_not_by_abbreviations(text, count):
    assert sentences(text) == count


@pytest.mark.parametrize("frame", ["{}", "Do this: {}", "{}\nWhat now?", 'What of "{}"?', "Some order.\n{}\nAnswer:"])
@pytest.mark.parametrize("text", [ONE, TWO])
def test_the_shape_of_a_subject_is_that_in_every_phrasing(frame, text):
    of_lines = 3  # the last properties tell of the other lines, which a phrasing adds
    found = shape(frame.format(text))
    np.testing.assert_array_equal(found[:-of_lines], shape(text)[:-of_lines])


def test_one_sentence_and_two_are_far_apart_and_texts_of_a_kind_are_near():
    split, fused, other = shape(ONE), shape(TWO), shape("A church that was built in 1721, burnt down twice.")
    assert np.linalg.norm(split - fused) > 1.4
    assert np.linalg.norm(split - other) < 0.5 * np.linalg.norm(split - fused)


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("play some jazz now", "Play some jazz now"),
        ("call me", "call 911"),
        ("are they the same", "are they the same?"),
        ("eine kuh", "eine größe"),
        ("First text here\nSecond text here", "First text here"),
        ("name: Mill, area: north", "name Mill, area north"),
        ("a b", "abcdefgh ijklmnop"),
    ],
)
def test_a_property_tells_letters_numbers_marks_and_lines_apart(text, other):
    assert np.abs(shape(text) - shape(other)).max() > 0.2


@given(st.text(max_size=60))
def test_every_property_is_in_its_range_for_any_text(text):
    found = shape(text)
    assert found.shape == (SHAPE_WIDTH,)
    assert np.isfinite(found).all()
    assert (found >= 0).all()
    assert (found <= 1).all()


def test_shapes_are_the_shape_of_each_text_and_none_of_no_text():
    np.testing.assert_array_equal(shapes([ONE, TWO]), [shape(ONE), shape(TWO)])
    assert shapes([]).shape == (0, SHAPE_WIDTH)


def subjects(sentences, seed):
    """Texts of so many sentences, of the same words whatever their number."""
    rng = np.random.default_rng(seed)
    words = [" ".join(rng.choice(["mill", "canal", "river", "tower", "bridge"], 6)).capitalize() for _ in range(2)]
    return ". ".join(words) + "." if sentences == 2 else ", and ".join(words) + "."


@pytest.fixture
def index(tmp_path, embedder):
    """Two adapters whose prompts share their words and differ in the instruction and in the number of sentences."""
    orders = {"split": ("Split: {}", "{}\nIn two, please."), "fuse": ("Fuse: {}", "{}\nIn one, please.")}
    for name, frames in orders.items():
        texts = [frames[i % 2].format(subjects(1 + (name == "fuse"), i)) for i in range(12)]
        make_adapter(tmp_path / "pool" / name, texts)
    with AdapterIndex.build(tmp_path / "pool", tmp_path / "index", embedder=embedder) as built:
        yield built


def test_a_prompt_of_an_unseen_phrasing_is_found_by_the_shape_of_its_subject(index):
    asked = [f"Kindly rephrase.\n{subjects(1 + i % 2, 100 + i)}" for i in range(10)]
    found = index.search(asked, k=1)
    names = [found.for_prompt(row)[0].card.name for row in range(len(asked))]
    assert names == ["split", "fuse"] * 5
    assert index.explain(asked[0]).candidates[0].decisive == "shape"


def test_statistics_of_shapes_follow_what_comes_and_goes(index, tmp_path):
    index.search(["x"])
    make_adapter(tmp_path / "more" / "rhyme", ["a rhyme on moon?", "a rhyme on sea?", "and one on tree!"])
    index.add(tmp_path / "more" / "rhyme")
    index.search(["x"])
    index.remove("split")
    index.search(["x"])
    changed = index._snapshot
    rebuilt = take_snapshot(index.catalog, tmp_path / "elsewhere.faiss")
    for mine, expected in zip(changed.statistics, rebuilt.statistics, strict=True):
        np.testing.assert_array_equal(mine.counts, expected.counts)
        np.testing.assert_allclose(mine.sums, expected.sums, atol=1e-5)
        np.testing.assert_allclose(mine.scatter, expected.scatter, atol=1e-5)
