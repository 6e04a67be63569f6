"""The prompt function: no system turn but the user's, one text for trainer, engine and evaluation."""

from __future__ import annotations

import pytest

from loracompose.models import DEFAULT_BASE, load_tokenizer
from loracompose.prompts import as_prompts, chat_text, encode_prompts, user_text
from tests.training.tiny_base import tokenizer

SYSTEM = {"role": "system", "content": "Rhyme."}
USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "good day"}
HELLO = "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"

# Begins with a text token and a system turn of its own, as Llama 3 does.
BEGINS_ONCE = (
    "{{ bos_token }}[system] today [/system]{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)
# Every user turn begins with the text token, as in Llama 2.
BEGINS_OFTEN = "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{% endif %}({{ m.content }}){% endfor %}"
# Writes a turn differently when it is not the last.
LOOKS_BACK = "{% for m in messages %}{% if loop.last %}now {% else %}then {% endif %}{{ m.content }};{% endfor %}"


def test_the_system_turn_that_a_template_inserts_is_cut():
    assert chat_text(tokenizer(), "hello") == HELLO
    assert chat_text(tokenizer(), [USER, ASSISTANT, USER]) == (
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\ngood day<|im_end|>\n" + HELLO
    )


def test_a_system_turn_of_the_user_is_kept():
    assert chat_text(tokenizer(), [SYSTEM, USER]) == "<|im_start|>system\nRhyme.<|im_end|>\n" + HELLO


def test_a_text_token_before_the_system_turn_is_kept_once():
    assert chat_text(tokenizer(BEGINS_ONCE, bos="<s>"), "hello") == "<s>[user]hello>"


def test_a_text_token_that_belongs_to_the_turn_is_not_doubled():
    assert chat_text(tokenizer(BEGINS_OFTEN, bos="<s>"), "hello") == "<s>(hello)"
    assert chat_text(tokenizer(BEGINS_OFTEN, bos="<s>"), [USER, ASSISTANT, USER]) == "<s>(hello)(good day)<s>(hello)"


def test_a_template_that_treats_earlier_turns_differently_is_used_as_it_is():
    assert chat_text(tokenizer(LOOKS_BACK), "hello") == "now hello;"


def test_a_prompt_that_looks_like_the_template_changes_nothing():
    assert chat_text(tokenizer(), "X") == HELLO.replace("hello", "X")
    assert chat_text(tokenizer(), HELLO) == f"<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template_a_string_is_its_own_text_with_the_tokenizers_special_tokens():
    bare = tokenizer(None)
    assert chat_text(bare, "hello") == "hello"
    assert encode_prompts(bare, ["hello"])["input_ids"].tolist() == [bare("hello")["input_ids"]]
    assert bare("hello")["input_ids"][0] == 3


def test_without_a_template_messages_are_refused():
    with pytest.raises(ValueError, match="has none: give a string"):
        chat_text(tokenizer(None), [USER])


def test_a_batch_is_padded_on_the_left_and_holds_each_prompt_alone():
    alone = [encode_prompts(tokenizer(), [prompt])["input_ids"][0].tolist() for prompt in ("hello", "hello you")]
    batch = encode_prompts(tokenizer(), ["hello", "hello you"])
    assert batch["input_ids"].tolist() == [[0, 0, 0, 0, *alone[0]], alone[1]]
    assert batch["attention_mask"].tolist() == [[0] * 4 + [1] * len(alone[0]), [1] * len(alone[1])]


def test_padding_goes_to_the_side_asked_for_and_leaves_no_trace_in_the_tokenizer():
    right = tokenizer()
    alone = [encode_prompts(right, [prompt])["input_ids"][0].tolist() for prompt in ("hello", "hello you")]
    batch = encode_prompts(right, ["hello", "hello you"], padding_side="right")
    assert batch["input_ids"].tolist() == [[*alone[0], 0, 0, 0, 0], alone[1]]
    assert batch["attention_mask"].tolist() == [[1] * len(alone[0]) + [0] * 4, [1] * len(alone[1])]
    assert right.backend_tokenizer.padding is None  # another thread's call would be padded by it


def test_the_tokenizer_adds_no_special_token_to_a_template():
    ids = encode_prompts(tokenizer(), ["hello"])["input_ids"][0].tolist()
    assert [token for token in ids if token < 4] == [1, 2, 1]
    assert ids == tokenizer()(HELLO, add_special_tokens=False)["input_ids"]


def test_retrieval_sees_the_last_turn_of_the_user():
    assert user_text("hello") == "hello"
    assert user_text([SYSTEM, USER, ASSISTANT, {"role": "user", "content": "and now?"}]) == "and now?"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (7, "a string or a list of chat messages, got 7"),
        (b"hello", "a string or a list of chat messages"),
        ([], r"got roles \[\]"),
        (["hello"], "message 0 must be"),
        ([{"role": "bot", "content": "hi"}], "message 0 has role 'bot', expected one of system, user, assistant"),
        ([USER, {"role": "assistant"}, USER], "message 1 must have a string as content, got None"),
        ([USER, ASSISTANT], r"end with the user, got roles \['user', 'assistant'\]"),
        ([ASSISTANT, USER], "must begin"),
        ([SYSTEM], "must begin"),
    ],
)
def test_an_invalid_prompt_is_refused_with_its_place(prompt, message):
    for see in (user_text, lambda p: chat_text(tokenizer(), p)):
        with pytest.raises(ValueError, match=message):
            see(prompt)


def test_one_string_is_one_prompt_and_one_message_is_none():
    assert as_prompts("add two") == ["add two"]
    assert as_prompts(("a", [USER])) == ["a", [USER]]
    with pytest.raises(ValueError, match=r"one chat message, .*'hello'.*write \[\[\{...\}\]\]"):
        as_prompts(USER)


def test_an_empty_batch_is_refused():
    with pytest.raises(ValueError, match="no prompt"):
        encode_prompts(tokenizer(), [])


@pytest.mark.real
def test_the_default_base_gets_the_tokens_its_adapters_were_trained_on():
    smol = load_tokenizer(DEFAULT_BASE)
    tokens = encode_prompts(smol, ["hi", "hello you there"])
    assert tokens["input_ids"].tolist() == [
        [2, 2, 1, 4093, 198, 6004, 2, 198, 1, 520, 9531, 198],
        [1, 4093, 198, 28120, 346, 665, 2, 198, 1, 520, 9531, 198],
    ]
    assert chat_text(smol, "hi") == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
