"""How the engine decodes: greedily unless the call says otherwise, whatever the model's own config says."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationConfig

from loracompose.decoding import asked, check_prefill, decoding_settings
from loracompose.running import count_new
from tests.engines import build_engine

ONE = {"adapters": [["mood"]], "max_new_tokens": None}


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    return build_engine(tmp_path_factory.mktemp("engine"))


@pytest.fixture
def engine(shared):
    """An engine whose model's own generation config a test may change."""
    own = copy.deepcopy(shared.base.model.generation_config)
    yield shared
    shared.base.model.generation_config = own


def text(engine, **given):
    return engine.generate(["x y"], **{**ONE, **given})[0].text


def sampled(engine, **given):
    torch.manual_seed(0)
    return {text(engine, **given) for _ in range(4)}


def test_a_keyword_goes_before_the_given_config_and_that_before_the_models_own():
    own, given = GenerationConfig(num_beams=4, do_sample=True), GenerationConfig(num_beams=3)
    assert asked("num_beams", {"num_beams": 2, "generation_config": given}, own) == 2
    assert asked("num_beams", {"num_beams": None, "generation_config": given}, own) is None  # as transformers reads it
    assert asked("num_beams", {"generation_config": given}, own) == 3
    assert asked("do_sample", {"generation_config": given}, own) is True
    assert asked("do_sample", {"generation_config": GenerationConfig(do_sample=False)}, own) is False
    assert asked("num_beams", {}, own) == 4
    assert asked("assistant_model", {}, own) is asked("num_beams", {}, None) is None


def test_a_config_that_says_nothing_of_sampling_leaves_decoding_greedy(engine):
    greedy = text(engine, max_new_tokens=12)
    own = engine.base.model.generation_config
    own.do_sample, own.temperature = True, 5.0
    assert sampled(engine, generation_config=GenerationConfig(max_new_tokens=12)) == {greedy}
    assert sampled(engine, generation_config=GenerationConfig(max_new_tokens=12), do_sample=None) == {greedy}
    assert len(sampled(engine, generation_config=GenerationConfig(max_new_tokens=12, do_sample=True))) > 1
    assert len(sampled(engine, generation_config=GenerationConfig(max_new_tokens=12), do_sample=True)) > 1


def test_beams_of_the_models_own_config_are_not_searched_unless_asked_for(engine):
    greedy, beams = text(engine, max_new_tokens=12), text(engine, max_new_tokens=12, num_beams=4)
    assert greedy != beams
    engine.base.model.generation_config.num_beams = 4
    assert text(engine, max_new_tokens=12) == greedy
    assert "".join(engine.stream("x y", adapters=["mood"], max_new_tokens=12)) == greedy
    assert text(engine, generation_config=GenerationConfig(max_new_tokens=12)) == greedy
    assert text(engine, generation_config=GenerationConfig(max_new_tokens=12, num_beams=4)) == beams


@pytest.mark.parametrize("whose", ["given", "own"])
def test_stop_strings_of_a_config_stop(engine, whose):
    full = text(engine, max_new_tokens=12)
    cut = full[: full.index(full[3]) + 1]
    if whose == "own":
        engine.base.model.generation_config.stop_strings = [full[3]]
        assert text(engine, max_new_tokens=12) == cut
        assert "".join(engine.stream("x y", adapters=["mood"], max_new_tokens=12)) == cut
    else:
        config = GenerationConfig(max_new_tokens=12, stop_strings=[full[3]])
        assert text(engine, generation_config=config) == cut


@pytest.mark.parametrize("what", ["output_scores", "output_logits", "output_attentions", "output_hidden_states"])
def test_what_the_answer_cannot_hold_is_refused(engine, what):
    with pytest.raises(ValueError, match=rf"{what}.*answers are texts.*leave"):
        text(engine, max_new_tokens=1, **{what: True})
    with pytest.raises(ValueError, match=rf"{what}.*answers are texts.*leave"):
        text(engine, generation_config=GenerationConfig(max_new_tokens=1, **{what: True}))


ASSISTED = [
    ("prompt_lookup_num_tokens", 3),
    ("assistant_model", "a model"),
    ("assistant_early_exit", 1),
    ("use_mtp", True),
]


@pytest.mark.parametrize(("name", "value"), ASSISTED)
def test_drafts_are_not_taken_for_the_prompt_by_a_composer_that_decides_on_it(name, value):
    whole, token = (SimpleNamespace(scope=scope, name="mole") for scope in ("prompt", "token"))
    configs = [] if name == "assistant_model" else [GenerationConfig(**{name: value})]  # which no config holds
    for settings, own in [({name: value}, None), *(({}, c) for c in configs)]:
        with pytest.raises(ValueError, match=rf"'mole' decides once on the whole prompt.*leave {name} out"):
            check_prefill(whole, settings, own)
        check_prefill(token, settings, own)
        check_prefill(whole, {**settings, name: None}, own)


def test_the_models_own_reading_in_pieces_counts_beside_a_config_that_says_nothing_of_it():
    composer = SimpleNamespace(scope="prompt", name="mole")
    own = GenerationConfig(prefill_chunk_size=2)
    for settings in ({}, {"generation_config": GenerationConfig()}):
        with pytest.raises(ValueError, match="pieces of 2 tokens"):
            check_prefill(composer, settings, own)
    check_prefill(composer, {"prefill_chunk_size": None}, own)


def test_greedy_settings_are_keywords_which_nothing_outranks(engine):
    made = decoding_settings(engine.base.tokenizer, 4, {}, GenerationConfig(do_sample=True, num_beams=4))
    assert (made["do_sample"], made["num_beams"]) == (False, 1)
    assert "tokenizer" not in made


def test_new_tokens_are_counted_up_to_the_first_that_ends_an_answer():
    answers = torch.tensor([[5, 6, 7], [5, 2, 7], [2, 2, 2], [5, 6, 0]])
    assert count_new(answers, frozenset({2, 0})) == [3, 1, 0, 2]


def test_an_answer_knows_the_tokens_that_were_read_and_written(tmp_path):
    with build_engine(tmp_path) as engine:
        short, long = engine.generate(["add two", "count the users with a query"], max_new_tokens=5)
    assert (short.prompt_tokens, long.prompt_tokens) == (len("add two"), len("count the users with a query"))
    assert short.new_tokens == long.new_tokens == (5,)
