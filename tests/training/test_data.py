"""Rows: what is read, what is refused and where, and which tokens a response has."""

from __future__ import annotations

import json

import pytest

from loracompose.prompts import encode_prompts
from loracompose.training.data import Example, encode_example, encode_examples, first_prompts, read_examples
from tests.training.tiny_base import tokenizer

GOOD = {"prompt": "ab", "response": "c"}


def test_rows_are_read_from_a_file_or_taken_as_they_are(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({**GOOD, "note": "ignored"}) + "\n\n" + json.dumps(GOOD) + "\n")
    assert read_examples(file) == read_examples(str(file)) == read_examples([GOOD, GOOD])
    assert read_examples([GOOD]) == (Example("ab", "c"),)
    assert read_examples([{**GOOD, "task": "letters"}]) == (Example("ab", "c", "letters"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[1]", "a row must be"),
        ('{"prompt": "a"}', "a row must be"),
        ('{"prompt": "a", "response": 1}', "the response must be a string"),
        ('{"prompt": "a", "response": " "}', "the response must be a string that is not empty"),
        ('{"prompt": " ", "response": "a"}', "the prompt is empty"),
        ('{"prompt": 3, "response": "a"}', "a string or a list of chat messages"),
        ('{"prompt": [{"role": "bot", "content": "a"}], "response": "a"}', "message 0 has role 'bot'"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path, line, message):
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 3: .*{message}"):
        read_examples(file)


def test_no_row_at_all_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    for data in (tmp_path / "rows.jsonl", []):
        with pytest.raises(ValueError, match="holds no"):
            read_examples(data)


@pytest.mark.parametrize("smol", [tokenizer(), tokenizer(None)], ids=["template", "no template"])
def test_the_prompt_is_encoded_as_generation_sees_it_and_the_response_ends(smol):
    encoded = encode_example(smol, Example("ab", "cd"))
    assert list(encoded.prompt) == encode_prompts(smol, ["ab"])["input_ids"][0].tolist()
    assert list(encoded.response) == [*smol("cd", add_special_tokens=False)["input_ids"], smol.eos_token_id]
    assert encoded.length == len(encoded.prompt) + 3


def test_a_tokenizer_without_an_end_token_is_refused():
    with pytest.raises(ValueError, match="has no end token"):
        encode_example(tokenizer(eos=None), Example("ab", "cd"))


def test_a_long_row_is_left_out_and_not_cut():
    smol = tokenizer()
    short, long = Example("ab", "c"), Example("ab", "cd")
    limit = encode_example(smol, short).length
    assert encode_examples(smol, [short, long], limit) == (encode_example(smol, short),)
    with pytest.raises(ValueError, match=f"max_length is 3 and the shortest of 2 rows has {limit} tokens"):
        encode_examples(smol, [short, long], 3)


def test_a_card_without_examples_shows_the_first_distinct_prompts():
    rows = [Example(f"p{i // 2}", "r") for i in range(100)]
    assert first_prompts(rows) == tuple(f"p{i}" for i in range(20))
