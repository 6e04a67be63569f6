from __future__ import annotations

import json

import pytest

from loracompose.retrieval.cards import Card, read_card


def write(folder, content):
    folder.mkdir(exist_ok=True)
    (folder / "card.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def nested(levels):
    """Lists and objects in turn, so many of them around a number."""
    value = 1
    for level in range(levels):
        value = [value] if level % 2 else {"in": value}
    return value


def test_a_card_takes_its_name_from_the_folder_and_keeps_unknown_keys(tmp_path):
    folder = write(
        tmp_path / "sql",
        {"description": "d", "examples": ["a", "b"], "tags": ["t"], "license": "mit", "name": "other", "n": 3},
    )
    expected = Card("sql", "d", ("a", "b"), ("t",), "mit", extra={"name": "other", "n": 3})
    assert read_card(folder) == expected
    assert hash(read_card(folder)) == hash(expected)


def test_only_examples_are_required(tmp_path):
    assert read_card(write(tmp_path / "sql", {"examples": ["a"]})) == Card("sql", examples=("a",))


def test_kinds_are_read_one_after_the_other_and_a_single_one_is_a_list(tmp_path):
    kinds = {"sums": ["one", "two"], "french": ["un"]}
    expected = Card("a", examples=("one", "two", "un"), kinds=("sums", "sums", "french"))
    assert read_card(write(tmp_path / "a", {"examples": kinds})) == expected
    assert hash(expected) != hash(Card("a", examples=expected.examples))
    assert read_card(write(tmp_path / "b", {"examples": {"sums": ["one"]}})) == Card("b", examples=("one",))
    shared = {"x": ["same", "own"], "y": ["same"]}
    assert read_card(write(tmp_path / "c", {"examples": shared})).examples == ("same", "own", "same")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"card\.json is not valid JSON"),
        ([], r"card\.json must hold a JSON object, got list"),
        ('{"examples": ["a"], "examples": ["b"]}', "the key 'examples' occurs twice"),
        ('{"examples": {"x": ["a"], "x": ["b"]}}', "the key 'x' occurs twice"),
        ('{"examples": ["a"], "score": NaN}', "NaN is not JSON"),
        ('{"examples": ["a"], "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
        ({"examples": ["a"], "x": nested(101)}, r"'x' in card.json is nested more than 100 levels deep; flatten it"),
        ({}, "no examples"),
        ({"examples": []}, "no examples"),
        ({"example": ["a"]}, r"its keys are \['example'\]"),
        ({"examples": "a"}, "'examples' .* list of strings, got 'a'"),
        ({"examples": ["a", 3]}, "one item is 3"),
        ({"examples": ["a", None]}, "one item is None"),
        ({"examples": ["a", " \n"]}, r"blank examples at positions \[1\]"),
        ({"examples": ["a"], "tags": "t"}, "'tags' .* list of strings"),
        ({"examples": ["a"], "description": None}, "'description' .* must be a string, got None"),
        ({"examples": ["a"], "license": 3}, "'license' .* must be a string, got 3"),
        ({"examples": ["\ud800"]}, "'examples' .* not valid Unicode"),
        ({"examples": {}}, r"'examples' .* names no kind, got \{\}, expected \{kind: \[prompt, ...\]\}; name each"),
        ({"examples": {"x": ["a"], "y": []}}, r"kind 'y' .* no examples, got \[\]; give prompts of it, or leave it"),
        ({"examples": {"x": ["a"], "y": ["b", " "]}}, r"blank examples of the kind 'y' at positions \[1\]; remove"),
        ({"examples": {"x": "a"}}, "kind 'x' .* must be a list of strings, got 'a'"),
        ({"examples": {"x": ["a", 3]}}, "kind 'x' .* must be a list of strings, one item is 3"),
        ({"examples": {"x": ["a"], "": ["b"]}}, "a kind .* has no name, got ''; give it one"),
        ({"examples": {"x": ["a"], " ": ["b"]}}, "a kind .* has no name, got ' '; give it one"),
        ({"examples": {"x": ["a"], "\ud800": ["b"]}}, "the name of a kind .* not valid Unicode"),
        ({"examples": {"x": ["a"], "y": ["\ud800"]}}, "kind 'y' .* not valid Unicode"),
    ],
)
def test_a_wrong_card_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_card(write(tmp_path / "sql", content))
    assert str(caught.value).startswith(("sql: ", "'sql': "))


def test_a_card_that_is_not_utf8_is_refused(tmp_path):
    folder = write(tmp_path / "sql", "{}")
    (folder / "card.json").write_bytes(b'{"examples": ["\xff"]}')
    with pytest.raises(ValueError, match=r"sql: .*card\.json is not valid JSON: 'utf-8'"):
        read_card(folder)


def test_a_missing_card_is_refused_with_the_format_to_write(tmp_path):
    (tmp_path / "sql").mkdir()
    with pytest.raises(ValueError, match=r'sql: no card.json .*"examples": \[prompt, ...\]'):
        read_card(tmp_path / "sql")


def test_what_a_card_holds_besides_may_be_nested_within_reason(tmp_path):
    assert read_card(write(tmp_path / "sql", {"examples": ["a"], "x": nested(100)})).extra == {"x": nested(100)}


def test_a_card_larger_than_the_limit_is_refused_before_it_is_read(tmp_path):
    folder = write(tmp_path / "sql", {"examples": ["a"]})
    with (folder / "card.json").open("r+b") as file:  # a sparse file: the bytes are never written
        file.truncate(2**30)
    with pytest.raises(ValueError, match=r"^sql: .*card\.json has 1073741824 bytes, at most 16000000 are read"):
        read_card(folder)
