"""Engine: sets by hand and by retrieval, rows independent of their batch, an honest trace, clear refusals."""

from __future__ import annotations

import shutil
import threading
from dataclasses import replace

import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, GenerationConfig

from loracompose import COMPOSERS, Adapter, AdapterIndex, Engine, LoraFactors, compose, load_adapter
from loracompose.composers import Lego, Linear, Mixture, RankGating, Selection
from loracompose.composers.base import keeps_factors
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.router import Router
from loracompose.runtime.attach import model_lock
from loracompose.runtime.machine import Machine, save_machine
from tests.engines import CHATML, build_engine, tokenizer
from tests.tiny import base_model, peft_adapter, peft_load

PROMPTS = ["say good night in french", "add two and nine", "mood of the review: dull", "select every name"]
SETS = [["french"], {"sums": 0.6, "mood": -0.4}, [], ["sql", "french", "mood"]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return build_engine(tmp_path_factory.mktemp("engine"))


def texts(answers):
    return [answer.text for answer in answers]


def test_retrieval_gives_each_row_its_own_adapters(engine):
    answers = engine.generate(PROMPTS, k=2, max_new_tokens=4)
    best = [answer.adapters[0].name for answer in answers]
    assert best == ["french", "sums", "mood", "sql"]
    assert all(len(answer.adapters) == 2 for answer in answers)
    assert all(abs(sum(use.weight for use in answer.adapters) - 1) < 1e-5 for answer in answers)
    assert all(use.fingerprint == engine.index.card(use.name).fingerprint for a in answers for use in a.adapters)


@pytest.mark.parametrize("kwargs", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
@pytest.mark.parametrize("composer", ["mixture", "selection", "fusion"])
def test_a_batch_of_different_compositions_equals_its_rows_alone(engine, composer, kwargs):
    kwargs = {"max_new_tokens": 6, "composer": composer, "do_sample": False, **kwargs}
    batch = engine.generate(PROMPTS, adapters=SETS, **kwargs)
    alone = [engine.generate([p], adapters=[s], **kwargs)[0] for p, s in zip(PROMPTS, SETS, strict=True)]
    assert [a.texts for a in batch] == [a.texts for a in alone]
    base = engine.generate(PROMPTS, adapters=[[]] * 4, **kwargs)
    assert [a.texts for a in base][:2] != [a.texts for a in batch][:2]


def test_sixteen_prompts_with_three_adapters_each_run_in_one_generate_call(engine, monkeypatch):
    calls = []
    generate = engine.base.model.generate
    monkeypatch.setattr(engine.base.model, "generate", lambda **kw: calls.append(1) or generate(**kw))
    names = ["french", "sql", "mood", "sums"]
    sets = [{names[i % 4]: 0.5, names[(i + 1) % 4]: 0.3, names[(i + 2) % 4]: 0.01 * i + 0.1} for i in range(16)]
    answers = engine.generate([f"row {i}" for i in range(16)], adapters=sets, max_new_tokens=3)
    assert len(answers) == 16
    assert len(calls) == 1


def test_batch_size_and_order_change_no_answer(engine):
    want = texts(engine.generate(PROMPTS, adapters=SETS, max_new_tokens=5))
    assert texts(engine.generate(PROMPTS, adapters=SETS, max_new_tokens=5, batch_size=3)) == want
    assert texts(engine.generate(PROMPTS[::-1], adapters=SETS[::-1], max_new_tokens=5)) == want[::-1]


def test_one_adapter_answers_as_it_does_in_peft(engine):
    folder = engine.index.path("mood")
    inputs = engine.base.tokenizer([PROMPTS[0]], return_tensors="pt", return_token_type_ids=False)
    output = peft_load(folder).generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    want = engine.base.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for ref in ("mood", folder, load_adapter(folder)):
        got = engine.generate(PROMPTS[:1], adapters=[[ref]], max_new_tokens=8, do_sample=False)
        assert got[0].text == want
        assert got[0].adapters[0].name == "mood"


def test_the_model_is_untouched_between_calls(engine):
    before = {name: tensor.clone() for name, tensor in engine.base.model.state_dict().items()}
    engine.generate(PROMPTS, adapters=SETS, max_new_tokens=2)
    with pytest.raises(ValueError, match="nonsense"):
        engine.generate(PROMPTS, adapters=SETS, max_new_tokens=2, nonsense=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in engine.base.model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in engine.base.model.modules())


def test_removing_an_adapter_changes_no_answer_that_does_not_use_it(tmp_path):
    engine = build_engine(tmp_path)
    sets = [["french"], {"mood": 0.5, "sql": 0.5}]
    want = texts(engine.generate(PROMPTS[:2], adapters=sets, max_new_tokens=6))
    engine.index.remove("sums")
    assert texts(engine.generate(PROMPTS[:2], adapters=sets, max_new_tokens=6)) == want
    with pytest.raises(LookupError, match="'sums'"):
        engine.generate(PROMPTS[:1], adapters=[["sums"]])


def test_one_string_alone_is_one_prompt_of_retrieval_too(engine):
    found = engine.retrieve("add two and nine", k=1)
    assert len(found.scores) == 1
    assert engine.generate("add two and nine", k=1, max_new_tokens=1)[0].adapters[0].name == "sums"


def test_excluded_adapters_are_not_used(engine):
    answers = engine.generate(PROMPTS[:2], k=1, exclude=[["french"], []], max_new_tokens=2)
    assert answers[0].adapters[0].name != "french"
    assert answers[1].adapters[0].name == "sums"


def test_a_set_named_twice_adds_up(engine):
    twice = engine.generate(PROMPTS[:1], adapters=[["mood", "mood"]], max_new_tokens=8)[0]
    once = engine.generate(PROMPTS[:1], adapters=[["mood"]], max_new_tokens=8)[0]
    assert twice.text == once.text
    assert [(use.name, use.weight) for use in twice.adapters] == [("mood", 1.0)]


def test_streamed_pieces_make_up_the_answer(engine):
    want = engine.generate(PROMPTS[:1], adapters=[["sql"]], max_new_tokens=10)[0].text
    pieces = list(engine.stream(PROMPTS[0], adapters=["sql"], max_new_tokens=10))
    assert "".join(pieces) == want


def test_leaving_a_stream_early_removes_the_hooks_and_frees_the_model(engine):
    stream = engine.stream("a b c d e f", adapters=["sql"], max_new_tokens=100, min_new_tokens=100)
    next(stream)
    stream.close()
    assert not any(module._forward_hooks for module in engine.base.model.modules())
    assert model_lock(engine.base.model).acquire(timeout=5)
    model_lock(engine.base.model).release()


def test_an_error_while_streaming_reaches_the_reader(engine):
    with pytest.raises(ValueError, match="nonsense"):
        list(engine.stream(PROMPTS[0], adapters=[], nonsense=1))


def test_threads_share_an_engine_without_mixing_answers(engine):
    want = [engine.generate([p], adapters=[s], max_new_tokens=5)[0].text for p, s in zip(PROMPTS, SETS, strict=True)]
    got: dict[int, str] = {}
    start = threading.Barrier(4)

    def work(i: int) -> None:
        start.wait()
        got[i] = engine.generate([PROMPTS[i]], adapters=[SETS[i]], max_new_tokens=5)[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(4)] == want


def test_chat_messages_are_retrieved_by_the_users_text_and_rendered_by_the_template(tmp_path):
    engine = build_engine(tmp_path)
    engine.base.tokenizer.chat_template = CHATML
    chat = [{"role": "system", "content": "add add add"}, {"role": "user", "content": "say good night in french"}]
    answer, plain = engine.generate([chat, "say good night in french"], k=1, max_new_tokens=3)
    assert answer.adapters[0].name == plain.adapters[0].name == "french"
    assert answer.adapters[0].score == plain.adapters[0].score
    assert answer.prompt == chat


def test_the_trace_names_a_base_that_differs(tmp_path):
    engine = build_engine(tmp_path)
    factors = {"model.layers.0.self_attn.q_proj": LoraFactors(torch.ones(1, 32), torch.ones(32, 1))}
    odd = Adapter("odd", factors, base_model="somebody/else")
    answer = engine.generate(["x"], adapters=[[odd]], max_new_tokens=1)[0]
    assert "somebody/else" in answer.notes[0]
    assert answer.as_dict()["adapters"][0]["name"] == "odd"


def test_a_tokenizer_without_padding_token_is_not_changed():
    bare = tokenizer()
    bare.pad_token = None
    engine = Engine.from_pretrained(base_model(), tokenizer=bare)
    assert engine.base.tokenizer.pad_token == "</s>"
    assert bare.pad_token is None
    assert len(engine.generate(["a", "longer"], adapters=[[], []], max_new_tokens=2)) == 2


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "no prompt", {"prompts": []}),
        (ValueError, "batch_size must be at least 1", {"batch_size": 0}),
        (ValueError, "one set per prompt", {"adapters": [["sql"]]}),
        (ValueError, "one set per prompt", {"adapters": "sql"}),
        (ValueError, "write \\['sql'\\]", {"adapters": ["sql", "mood"]}),
        (ValueError, "finite", {"adapters": [{"sql": float("nan")}, []]}),
        (ValueError, "finite", {"adapters": [{"sql": 1e39}, []]}),
        (ValueError, "must be 0 or", {"adapters": [{"sql": 1e-46}, []]}),
        (TypeError, "a name in the index, a folder or an Adapter", {"adapters": [[1], []]}),
        (LookupError, "the index has sql;", {"adapters": [["sq"], []]}),
        (ValueError, "max_new_tokens=None", {"max_length": 9}),
        (ValueError, "prompt 1 is empty", {"prompts": ["a", ""]}),
        (LookupError, "no adapter 'sqll'.*sql", {"adapters": [["sqll"], []]}),
        (ValueError, "steer retrieval", {"adapters": [[], []], "k": 2}),
        (ValueError, "k must be", {"k": 0}),
        (LookupError, "no composer named 'lora'", {"composer": "lora"}),
        (TypeError, "name or an instance", {"composer": Mixture}),
        (ValueError, "attention_mask", {"attention_mask": None}),
        (ValueError, "a prompt is a string or a list", {"prompts": [{"role": "user"}, "b"]}),
        (ValueError, "one chat message", {"prompts": {"role": "user", "content": "hi"}}),
    ],
)
def test_wrong_calls_are_refused_with_the_reason(engine, error, message, arguments):
    with pytest.raises(error, match=message):
        engine.generate(**{"prompts": ["a", "b"], "max_new_tokens": 1, **arguments})


def test_two_engines_over_one_model_do_not_mix_their_adapters(engine):
    other = Engine.from_pretrained(engine.base.model, tokenizer=engine.base.tokenizer, index=engine.index)
    jobs = [(engine, ["french"]), (other, ["mood"])] * 3
    want = [e.generate(["x y"], adapters=[s], max_new_tokens=8)[0].text for e, s in jobs]
    start, got = threading.Barrier(len(jobs)), {}

    def work(i):
        start.wait()
        got[i] = jobs[i][0].generate(["x y"], adapters=[jobs[i][1]], max_new_tokens=8)[0].text

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[i] for i in range(len(jobs))] == want
    assert want[0] != want[1]


def test_weights_given_by_hand_are_taken_as_they_are(engine):
    double, single = engine.generate(["x y"] * 2, adapters=[{"mood": 2.0}, {"mood": 1.0}], max_new_tokens=8)
    merged = compose([load_adapter(engine.index.path("mood"))], [2.0])
    assert double.text == engine.generate(["x y"], adapters=[[merged]], max_new_tokens=8)[0].text
    assert double.text != single.text
    assert double.adapters[0].weight == 2.0


def test_an_adapter_object_stands_for_its_own_factors(engine):
    mood = load_adapter(engine.index.path("mood"), dtype=torch.bfloat16)
    turned = {module: replace(f, B=-f.B) for module, f in mood.factors.items()}
    a, b = engine.generate(["x y"] * 2, adapters=[[mood], [replace(mood, factors=turned)]], max_new_tokens=8)
    assert a.text != b.text


def test_an_adapter_that_overflows_does_not_reach_rows_that_do_not_use_it(engine):
    factors = {"model.layers.0.self_attn.q_proj": LoraFactors(torch.full((2, 32), 3e38), torch.full((32, 2), 1e-38))}
    prompts, sets = ["x y"] * 3, [[Adapter("evil", factors)], ["sql"], []]
    learns_nothing = {name for name, kind in COMPOSERS.items() if not hasattr(kind, "initial")}
    for composer in sorted(learns_nothing - {"knots", "arrow", "rank_gating"}):
        batch = engine.generate(prompts, adapters=sets, composer=composer, max_new_tokens=5)
        clean = engine.generate(prompts[1:], adapters=sets[1:], composer=composer, max_new_tokens=5)
        assert texts(batch)[1:] == texts(clean), composer


def test_an_adapter_that_changed_on_disk_is_refused(tmp_path):
    engine = build_engine(tmp_path)
    config = engine.index.path("mood") / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 80'))
    with pytest.raises(ValueError, match="mood"):
        engine.generate(["a"], adapters=[["mood"]], max_new_tokens=1)


def test_adapters_without_weight_are_traced_and_not_read(tmp_path):
    engine = build_engine(tmp_path)
    engine.retriever = replace(engine.retriever, weighting="top1")
    shutil.rmtree(engine.index.path("mood"))
    answer = engine.generate(["say good night in french"], k=4, max_new_tokens=2)[0]
    assert [use.weight for use in answer.adapters] == [1.0, 0.0, 0.0, 0.0]
    assert "mood" in [use.name for use in answer.adapters]
    assert engine.store.stats.misses == 1


def test_a_bare_name_is_not_looked_up_in_the_working_directory(engine, tmp_path, monkeypatch):
    monkeypatch.chdir(engine.index.path("mood").parent)
    without = Engine.from_pretrained(engine.base.model, tokenizer=engine.base.tokenizer)
    with pytest.raises(LookupError, match="no adapter 'mood'"):
        without.generate(["a"], adapters=[["mood"]])
    assert without.generate(["a"], adapters=[["./mood"]], max_new_tokens=1)[0].adapters[0].name == "mood"


def test_the_metadata_filter_reaches_the_search(engine):
    answer = engine.generate(["say good night in french"], k=4, where={"name": ["sql", "mood"]}, max_new_tokens=1)[0]
    assert {use.name for use in answer.adapters} == {"sql", "mood"}


def test_decoding_is_greedy_unless_the_call_says_otherwise(tmp_path):
    engine = build_engine(tmp_path)
    engine.base.model.generation_config.do_sample = True
    engine.base.model.generation_config.temperature = 5.0
    greedy = {engine.generate(["x y"], adapters=[["mood"]], max_new_tokens=12)[0].text for _ in range(3)}
    assert len(greedy) == 1
    sampled = {
        engine.generate(["x y"], adapters=[["mood"]], max_new_tokens=12, do_sample=True)[0].text for _ in range(3)
    }
    assert len(sampled | greedy) > 1


def test_a_generation_config_decides_the_length_if_asked_to(engine):
    config = GenerationConfig(max_new_tokens=2)
    answer = engine.generate(["x y"], adapters=[[]], max_new_tokens=None, generation_config=config)[0]
    assert answer.text == engine.generate(["x y"], adapters=[[]], max_new_tokens=2)[0].text
    with pytest.raises(ValueError, match="generation_config says how long"):
        engine.generate(["x y"], adapters=[[]], generation_config=config)


def test_stop_strings_and_a_padding_token_of_the_caller_are_passed_on(engine):
    full = engine.generate(["x y"], adapters=[["mood"]], max_new_tokens=12)[0].text
    cut = engine.generate(["x y"], adapters=[["mood"]], max_new_tokens=12, stop_strings=[full[3]], pad_token_id=0)[
        0
    ].text
    assert cut == full[: full.index(full[3]) + 1]


def test_an_encoder_decoder_answers_a_mixed_batch_as_row_by_row(tmp_path):
    folder, _ = peft_adapter(tmp_path, "both", base="t5", seed=3, scale=0.6)
    engine = Engine.from_pretrained(base_model("t5"), tokenizer=tokenizer())
    prompts, sets = ["first", "a longer second"], [[folder], []]
    batch = engine.generate(prompts, adapters=sets, max_new_tokens=8, num_beams=2)
    alone = [
        engine.generate([p], adapters=[s], max_new_tokens=8, num_beams=2)[0].text
        for p, s in zip(prompts, sets, strict=True)
    ]
    assert texts(batch) == alone
    assert batch[0].text != engine.generate(prompts[:1], adapters=[[]], max_new_tokens=8, num_beams=2)[0].text


def test_an_encoder_that_counts_positions_from_the_first_place_answers_a_batch_as_row_by_row():
    sizes = {"layers": 2, "attention_heads": 4, "ffn_dim": 64}
    config = BartConfig(
        vocab_size=128,
        d_model=32,
        max_position_embeddings=64,
        init_std=0.5,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
        **{f"{part}_{what}": size for part in ("encoder", "decoder") for what, size in sizes.items()},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(config)
    engine = Engine.from_pretrained(model, tokenizer=tokenizer())
    prompts = ["hello", "a much longer prompt than the other one", "xyz?"]
    batch = engine.generate(prompts, adapters=[[]] * 3, max_new_tokens=8)
    assert texts(batch) == [engine.generate(p, adapters=[[]], max_new_tokens=8)[0].text for p in prompts]


@pytest.mark.parametrize("composer", ["ties", "knots", "lego", "mixture"])
def test_what_is_composed_under_autocast_is_what_is_composed_without(tmp_path, composer):
    with build_engine(tmp_path) as engine:
        made = []
        prepare = engine._prepare
        engine._prepare = lambda *given: made.append(prepare(*given)) or made[-1]
        for under in (True, False):
            engine.cache.clear()
            with torch.autocast("cpu", torch.bfloat16, enabled=under):
                engine.generate(PROMPTS[:1], adapters=[["mood", "sql"]], composer=composer, max_new_tokens=2)
    rounded, exact = (request.deltas for request in made)
    for module, delta in exact.items():
        assert torch.equal(delta.A, rounded[module].A)
        assert torch.equal(delta.B, rounded[module].B)


def test_adapters_of_16_bits_given_by_hand_are_composed_in_32(engine):
    narrow = [load_adapter(engine.index.path(name), dtype=torch.bfloat16) for name in ("mood", "sql")]
    sets = [{narrow[0]: 1 / 3, narrow[1]: 2 / 3}]
    made = []
    prepare = type(engine)._prepare
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine), "_prepare", lambda *given: made.append(prepare(*given)) or made[-1])
        engine.generate(PROMPTS[:1], adapters=sets, composer="linear", max_new_tokens=2)
    assert {delta.A.dtype for delta in made[0].deltas.values()} == {torch.float32}


@pytest.mark.parametrize("wide", [False, True])
def test_adapters_are_kept_as_they_run_only_where_nothing_is_computed_of_them(tmp_path, monkeypatch, wide):
    monkeypatch.setenv("LORACOMPOSE_CACHE", str(tmp_path / "cache"))
    save_machine(Machine(wide=wide), torch.device("cpu"), torch.bfloat16)
    with build_engine(tmp_path, dtype=torch.bfloat16) as engine:
        sets, cpu = [["mood", "sql"], {"french": 0.3, "sums": -1.0}], torch.device("cpu")
        rows, _ = engine._rows(PROMPTS[:2], Mixture(), sets, None, None, None)
        adapters = [load_adapter(engine.index.path(name)) for name in ("mood", "sql", "french", "sums")]
        order, weights = content_order(adapters), torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.3, -1.0]])
        banks = gather_banks([adapters[i] for i in order])
        for composer in [Mixture(), Selection(), RankGating(), Lego(), Linear()]:
            made = engine._prepare(PROMPTS[:2], rows, composer, 0.0).deltas
            as_it_runs = keeps_factors(composer) and not wide
            assert {delta.A.dtype for delta in made.values()} == {torch.bfloat16 if as_it_runs else torch.float32}
            for module, want in composer.compose(banks, weights[:, order]).items():
                want, got = want.to(cpu, torch.bfloat16), made[module].to(cpu, torch.bfloat16)
                for side in ("A", "B", "weights"):
                    assert torch.equal(getattr(got, side), getattr(want, side)), (composer, module)


class Halved(Mixture):
    """A mixture whose own `compose` may compute with the factors."""


@pytest.mark.parametrize(
    ("change", "composer", "kept"),
    [
        (lambda model: model, Mixture(), torch.bfloat16),
        (lambda model: model, Halved(), torch.float32),
        (lambda model: model.half(), Mixture(), torch.float32),
        (lambda model: model.model.norm.float(), Mixture(), torch.float32),
        (lambda model: setattr(model.model.embed_tokens, "embed_scale", 2.0), Mixture(), torch.float32),
    ],
)
def test_adapters_are_kept_in_16_bits_only_where_rounding_them_first_changes_nothing(
    tmp_path, monkeypatch, change, composer, kept
):
    monkeypatch.setenv("LORACOMPOSE_CACHE", str(tmp_path / "cache"))
    model = base_model(dtype=torch.bfloat16)
    change(model)
    for dtype in (torch.bfloat16, torch.float16):
        save_machine(Machine(), torch.device("cpu"), dtype)
    with build_engine(tmp_path) as other:
        engine = Engine.from_pretrained(model, tokenizer=tokenizer(), index=other.index)
        rows, _ = engine._rows(PROMPTS[:1], composer, [["mood", "sql"]], None, None, None)
        made = engine._prepare(PROMPTS[:1], rows, composer, 0.0).deltas
    assert {delta.A.dtype for delta in made.values()} == {kept}


def test_the_trace_counts_the_numbers_of_the_ranks_that_run_for_a_prompt(engine):
    alone, both, none = engine.generate(PROMPTS[:3], adapters=[["mood"], ["mood", "sql"], []], max_new_tokens=1)
    size = {name: load_adapter(engine.index.path(name)).nbytes // 4 for name in ("mood", "sql")}
    assert alone.added_parameters == size["mood"]
    assert both.added_parameters == size["mood"] + size["sql"]
    assert none.added_parameters == 0


def test_what_stands_for_nothing_given_is_nothing_given(engine):
    plain = engine.generate(PROMPTS[:1], adapters=[["mood"]], max_new_tokens=4)[0].text
    given = {"stopping_criteria": None, "generation_config": None}
    assert engine.generate(PROMPTS[:1], adapters=[["mood"]], max_new_tokens=4, **given)[0].text == plain
    assert "".join(engine.stream(PROMPTS[0], adapters=["mood"], max_new_tokens=4, **given)) == plain


def test_a_module_that_the_model_never_calls_stands_in_the_trace():
    engine = Engine.from_pretrained(base_model("t5"), tokenizer=tokenizer())
    shared = {"shared": LoraFactors(torch.ones(1, 128), torch.ones(32, 1), "embedding")}
    answer = engine.generate(["abc"], adapters=[[Adapter("idle", shared)]], max_new_tokens=2)[0]
    assert "never called shared" in answer.notes[0]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "keeps its device", {"device": "cpu"}),
        (ValueError, "keeps its device", {"dtype": "float32"}),
        (ValueError, "k=5 .*no index.*leave k out", {"k": 5}),
        (TypeError, "unload", {"model": torch.nn.Linear(1, 1)}),
        (ValueError, "loaded with it", {"model": "some/name"}),
    ],
)
def test_arguments_that_would_have_no_effect_are_refused(error, message, arguments):
    with pytest.raises(error, match=message):
        Engine.from_pretrained(**{"model": base_model(), "tokenizer": tokenizer(), **arguments})


def test_an_index_opened_for_an_engine_that_cannot_be_made_is_closed_and_one_given_stays_open(tmp_path, monkeypatch):
    given = build_engine(tmp_path).index
    encoder, opened, open_index = given.embedder, [], AdapterIndex.open

    def watched(folder):
        opened.append(open_index(folder, embedder=encoder))
        return opened[-1]

    def interrupted(index):
        raise KeyboardInterrupt

    monkeypatch.setattr(AdapterIndex, "open", watched)
    loaded = {"model": base_model(), "tokenizer": tokenizer()}
    with pytest.raises(ValueError, match="k must be"):
        Engine.from_pretrained(**loaded, index=tmp_path / "index", k=0)
    with pytest.raises(ValueError, match="k must be"):
        Engine.from_pretrained(**loaded, index=given, k=0)
    with Engine.from_pretrained(**loaded, index=tmp_path / "index") as engine:
        assert (len(engine.index.cards), engine.retriever.k) == (4, 3)
    monkeypatch.setattr(AdapterIndex, "prepare", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Engine.from_pretrained(**loaded, index=tmp_path / "index")
    assert len(opened) == 3
    for index in opened:
        with pytest.raises(ValueError, match="was closed"):
            index.card("mood")
    assert given.card("mood").name == "mood"
    given.close()


def test_an_engine_without_index_says_so():
    engine = Engine.from_pretrained(base_model(), tokenizer=tokenizer())
    with pytest.raises(ValueError, match="no index"):
        engine.generate(["a"])
    with pytest.raises(LookupError, match="no index"):
        engine.generate(["a"], adapters=[["sql"]])


def test_a_model_without_origin_needs_its_tokenizer():
    with pytest.raises(LookupError, match="tokenizer"):
        Engine.from_pretrained(base_model())


def test_a_router_for_a_composer_that_learns_nothing_is_refused():
    with pytest.raises(ValueError, match="takes no router"):
        Engine.from_pretrained(base_model(), tokenizer=tokenizer(), router=Router("ramole", {}, {}, "base"))
