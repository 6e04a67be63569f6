"""Engine with a composer that learns: its router runs, is traced, and is refused by name where it cannot run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM

from loracompose import COMPOSERS, Adapter, AdapterIndex, Engine, LoraFactors, load_adapter
from loracompose.composers.base import Pool
from loracompose.composers.cat import Cat
from loracompose.composers.lora_flow import LoraFlow
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.router import load_router, save_router
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.training.router import train_router
from loracompose.training.router_recipe import RouterRecipe
from tests.engines import build_pool, tokenizer
from tests.retrieval.material import TASKS, bag_of_words
from tests.tiny import base_model, peft_adapter

PROMPTS = ["say good night in french", "add two and nine", "mood of the review: dull"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pool, and routers of three methods trained with it."""
    folder = tmp_path_factory.mktemp("routers")
    build_pool(folder / "pool")
    data = [{"prompt": f"{name} {i}", "response": name, "task": name} for name in TASKS for i in range(2)]
    recipe = RouterRecipe(steps=2, batch_size=4, learning_rate=1.0, warmup=0)
    with make_engine(folder) as engine:
        for method in ("lora_flow", "cat", "xlora"):
            train_router(method, data, engine.index, folder / method, base=engine.base, recipe=recipe, progress=False)
    return folder


def make_engine(home, *, model=None, adapters="pool", **given):
    embedder = CallableEmbedder(bag_of_words, "bag-of-words", "1")
    target = home / f"index of {adapters}"
    index = (
        AdapterIndex.open(target, embedder=embedder)
        if target.exists()
        else AdapterIndex.build(home / adapters, target, embedder=embedder)
    )
    return Engine.from_pretrained(model or base_model(), tokenizer=tokenizer(), index=index, **given)


@pytest.fixture(scope="module")
def engine(home):
    with make_engine(home, composer="lora_flow", router=home / "lora_flow") as made:
        yield made


def texts(answers):
    return [answer.text for answer in answers]


def test_a_router_folder_runs_as_what_was_trained_and_the_trace_names_it(engine, home):
    router = load_router(home / "lora_flow")
    answers = engine.generate(PROMPTS, k=2, max_new_tokens=5)
    assert texts(answers) == texts(engine.generate(PROMPTS, k=2, max_new_tokens=5, composer=LoraFlow(router)))
    assert {answer.composer for answer in answers} == {repr(LoraFlow(router))}
    assert router.fingerprint[:12] in answers[0].composer
    assert answers[0].notes == ()
    start = replace(router, tensors={name: torch.zeros_like(t) for name, t in router.tensors.items()})
    assert texts(answers) != texts(engine.generate(PROMPTS, k=2, max_new_tokens=5, composer=LoraFlow(start)))


def test_a_batch_equals_its_rows_alone_whatever_is_retrieved(engine):
    batch = engine.generate(PROMPTS, k=2, max_new_tokens=5)
    assert texts(batch) == [engine.generate(prompt, k=2, max_new_tokens=5)[0].text for prompt in PROMPTS]


def test_a_gate_that_asks_the_bare_base_first_answers_alone_streamed_and_in_pieces_as_in_a_batch(home):
    with make_engine(home, composer="xlora", router=home / "xlora") as engine:
        batch = texts(engine.generate(PROMPTS, k=2, max_new_tokens=5))
        assert batch == [engine.generate(prompt, k=2, max_new_tokens=5)[0].text for prompt in PROMPTS]
        assert batch == ["".join(engine.stream(prompt, k=2, max_new_tokens=5)) for prompt in PROMPTS]
        assert batch == texts(engine.generate(PROMPTS, k=2, max_new_tokens=5, prefill_chunk_size=3))
        beams = texts(engine.generate(PROMPTS, k=2, max_new_tokens=5, num_beams=3))
        assert beams == texts(engine.generate(PROMPTS, k=2, max_new_tokens=5, num_beams=3, use_cache=False))
        assert batch != texts(engine.generate(PROMPTS, k=2, max_new_tokens=5, composer="mixture"))


def test_a_call_may_name_the_method_of_the_engines_router_and_no_other(engine, home):
    named = engine.generate(PROMPTS, k=2, max_new_tokens=5, composer="lora_flow")
    assert texts(named) == texts(engine.generate(PROMPTS, k=2, max_new_tokens=5))
    assert engine.generate(PROMPTS[0], max_new_tokens=2, composer="mixture")[0].composer.startswith("Mixture")
    with pytest.raises(ValueError, match=r"'cat' runs what it has learned.* This engine has a router of 'lora_flow'"):
        engine.generate(PROMPTS, composer="cat")
    with make_engine(home) as plain, pytest.raises(ValueError, match="This engine has no router"):
        next(iter(plain.stream(PROMPTS[0], composer="lora_flow")))


def test_a_composer_that_learns_needs_its_own_router(home):
    with pytest.raises(ValueError, match=r"'lora_flow' runs what it has learned: give it a router"):
        make_engine(home, composer="lora_flow")
    with pytest.raises(ValueError, match="belongs to the composer 'lora_flow', not to 'cat'"):
        make_engine(home, composer="cat", router=home / "lora_flow")


def test_an_adapter_that_the_router_was_not_trained_for_is_named(engine, home, tmp_path):
    new, _ = peft_adapter(tmp_path, "poems", seed=77)
    for composer in ("lora_flow", Cat(load_router(home / "cat"))):
        with pytest.raises(LookupError, match=r"not trained for the adapter 'poems' .*it knows .*french.*exclude"):
            engine.generate(PROMPTS[:1], adapters=[{"french": 0.5, new: 0.5}], composer=composer)
        assert engine.generate(PROMPTS[:1], adapters=[["french"]], max_new_tokens=2, composer=composer)


def test_a_router_of_an_adapter_that_is_gone_or_changed_is_refused_by_name(home, tmp_path):
    router = home / "lora_flow"
    with make_engine(home) as engine:
        index = AdapterIndex.build(
            home / "pool", tmp_path / "index", embedder=CallableEmbedder(bag_of_words, "bag-of-words", "1"), copy=True
        )
        base = engine.base.model
    index.remove("sums")
    given = {"tokenizer": tokenizer(), "index": index, "composer": "lora_flow", "router": router}
    with pytest.raises(LookupError, match=r"trained for the adapter 'sums' .*it is not there\. Add it"):
        Engine.from_pretrained(base, **given)
    index.add(peft_adapter(tmp_path, "sums", seed=78)[0])
    with pytest.raises(LookupError, match=r"'sums' .*another adapter of that name is there"):
        Engine.from_pretrained(base, **given)
    index.close()


def test_a_router_of_another_base_is_refused_and_another_name_alone_is_noted(home):
    config = base_model().config
    deeper = type(config).from_dict({**config.to_dict(), "num_hidden_layers": 3})
    with pytest.raises(ValueError, match=r"\(2 layers of width 32\); this base is .* \(3 layers of width 32\)"):
        make_engine(home, model=LlamaForCausalLM(deeper).eval(), composer="lora_flow", router=home / "lora_flow")
    elsewhere = replace(load_router(home / "lora_flow"), base_model="somebody/else")
    with make_engine(home, composer="lora_flow", router=elsewhere) as engine:
        notes = engine.generate(PROMPTS[:1], max_new_tokens=2)[0].notes
    assert any("lora_flow router names the base 'somebody/else'" in note for note in notes)


def test_a_router_of_another_base_is_refused_in_a_call_as_well(engine, home):
    router = load_router(home / "lora_flow")
    deeper = replace(router, training={**router.training, "base": {"hidden": 32, "layers": 3}})
    with pytest.raises(ValueError, match=r"\(3 layers of width 32\); this base is"):
        engine.generate(PROMPTS[:1], max_new_tokens=1, composer=LoraFlow(deeper))


def test_a_router_of_wrong_shapes_is_refused_by_name_before_anything_runs(engine, home, tmp_path):
    router = load_router(home / "lora_flow")
    name = "model.layers.0.gate"
    save_router(replace(router, tensors={**router.tensors, name: torch.zeros(3, 32)}), tmp_path / "r")
    message = r"'model.layers.0.gate' has shape \(3, 32\), expected \(4, 32\)"
    with (
        make_engine(home, composer="lora_flow", router=tmp_path / "r") as broken,
        pytest.raises(ValueError, match=message),
    ):
        broken.generate(PROMPTS[:1])


def test_a_static_method_that_learned_is_exported(home, tmp_path):
    from loracompose import compose, save_adapter

    adapters = [load_adapter(home / "pool" / name) for name in ("french", "mood")]
    merged = compose(adapters, composer=Cat(load_router(home / "cat")))
    save_adapter(merged, tmp_path / "merged")
    with make_engine(home, composer="cat", router=home / "cat") as engine:
        learned = engine.generate(PROMPTS[:1], adapters=[["french", "mood"]], max_new_tokens=5)
        plain = engine.generate(PROMPTS[:1], adapters=[[tmp_path / "merged"]], max_new_tokens=5, composer="mixture")
    assert texts(learned) == texts(plain)


LEARNED = {name for name, kind in COMPOSERS.items() if hasattr(kind, "initial")}


@pytest.mark.parametrize("name", sorted(LEARNED - {"smora"}))  # whose canonical ranks are a decomposition: it says so
def test_an_adapter_that_overflows_does_not_reach_rows_that_do_not_use_it(home, name):
    factors = {"model.layers.0.self_attn.q_proj": LoraFactors(torch.full((2, 32), 3e38), torch.full((32, 2), 1e-38))}
    evil, sql = Adapter("evil", factors), load_adapter(home / "pool" / "sql")
    ordered = [(evil, sql)[i] for i in content_order([evil, sql])]
    kind = COMPOSERS[name]
    pool = Pool("base", 32, tuple(adapter.name for adapter in ordered), gather_banks(ordered))
    composer, settings = kind(kind.initial(pool, 0, {})), {"max_new_tokens": 5}
    with make_engine(home) as engine:
        batch = engine.generate(["x y"] * 3, adapters=[[evil], [sql], []], composer=composer, **settings)
        clean = engine.generate(["x y"] * 2, adapters=[[sql], []], composer=composer, **settings)
    assert texts(batch)[1:] == texts(clean)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prefill_chunk_size": 2}, "pieces of 2 tokens"),
        ({"generation_config": GenerationConfig(prefill_chunk_size=2)}, "pieces of 2 tokens"),
        ({"prompt_lookup_num_tokens": 3}, "drafts .*prompt_lookup_num_tokens"),
        ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "drafts .*prompt_lookup_num_tokens"),
    ],
)
def test_a_composer_that_decides_on_the_whole_prompt_is_given_it_in_one_piece_and_alone(engine, given, why):
    kind = COMPOSERS["mole"]
    adapters = [load_adapter(engine.index.path(card.name)) for card in engine.index.cards]
    ordered = [adapters[i] for i in content_order(adapters)]
    pool = Pool("base", 16, tuple(a.name for a in ordered), gather_banks(ordered))
    with pytest.raises(ValueError, match=rf"'mole' decides once on the whole prompt.* {why}"):
        engine.generate(PROMPTS[:1], composer=kind(kind.initial(pool, 0, {})), max_new_tokens=None, **given)
