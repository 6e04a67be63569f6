"""What the text of an option becomes."""

from __future__ import annotations

import pytest

from loracompose.cli.options import parse_set


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("", []),
        ("a, b", ["a", "b"]),
        ("a=0.7,b=0.3", {"a": 0.7, "b": 0.3}),
        ("a = 0.7 , b = -0.3", {"a": 0.7, "b": -0.3}),
        ("a=0.75,b=1,a=0.5", {"a": 1.25, "b": 1.0}),
        ("runs/lr=0.1/a,b", ["runs/lr=0.1/a", "b"]),
        ("runs/lr=0.1/a=0.5,b=2", {"runs/lr=0.1/a": 0.5, "b": 2.0}),
    ],
)
def test_a_set_is_a_list_or_weights_by_name_that_add_up(text, want):
    assert parse_set(text) == want


def test_an_equals_sign_of_a_folder_that_is_there_begins_no_weight(tmp_path):
    folder = tmp_path / "rank=8"
    assert parse_set(f"{folder}=2") == {str(folder): 2.0}
    folder.mkdir()
    assert parse_set(f"{folder},b") == [str(folder), "b"]
    assert parse_set(f"{folder}=2") == {str(folder): 2.0}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=1,b", "--adapters 'a=1,b': give every adapter a weight"),
        ("a=x", r"--adapters 'a=x': the weight of 'a' is 'x', expected a number, such as a=0\.7"),
        ("a=", "--adapters 'a=': the weight of 'a' is '', expected a number"),
        ("=0.5", "--adapters '=0.5': there is no name before the weight"),
    ],
)
def test_a_set_that_cannot_be_read_names_the_option(text, message):
    with pytest.raises(ValueError, match=message):
        parse_set(text)
