"""train_router: it learns, resumes exactly, stops early, leaves base and adapters alone, and writes what runs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from loracompose import AdapterIndex
from loracompose.adapters.lora import LoraFactors
from loracompose.composers import COMPOSERS, get_composer
from loracompose.composers.cat import Cat
from loracompose.composers.lora_flow import LoraFlow
from loracompose.composition.router import load_router
from loracompose.models import load_base
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.training.router import train_router
from loracompose.training.router_loop import Material, composed_loss, prompt_mask
from loracompose.training.router_recipe import RouterRecipe
from tests import laws
from tests.engines import build_pool
from tests.retrieval.material import TASKS, bag_of_words
from tests.tiny import VOCABULARY
from tests.training.interruption import Interrupted, interrupt_at
from tests.training.tiny_base import base_folder

WORDS = ("yes", "no", "maybe")
ROWS = [{"prompt": f"say {word} {i}", "response": word, "task": word} for i in range(8) for word in WORDS]
DEV = [{"prompt": f"speak {word}", "response": word, "task": word} for word in WORDS]
RECIPE = RouterRecipe(
    steps=7, batch_size=6, learning_rate=0.05, warmup=2, seed=5, eval_every=2, save_every=3, adapter_dropout=0.5
)


@pytest.fixture(scope="module")
def adapters():
    return [
        laws.random_adapter(word, "llama", seed=seed, rank=seed + 1, scale=0.15, modules=("q_proj", "o_proj"))
        for seed, word in enumerate(WORDS, 1)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    loaded = load_base(base_folder(tmp_path_factory.mktemp("base")), device="cpu")
    loaded.tokenizer.chat_template = None  # a tenth of the tokens
    return loaded


@pytest.fixture
def train(base, adapters):
    def run(output, method: Any = "lora_flow", data=ROWS, recipe=RECIPE, **given):
        settings = {"base": base, "progress": False, **given}
        return train_router(method, data, settings.pop("adapters", adapters), output, recipe=recipe, **settings)

    return run


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("method", ["mole", "milora", "phatgoose", "xlora"])
def test_routers_of_prompts_and_gate_vectors_are_trained_by_the_same_loop(train, tmp_path, method):
    recipe = RouterRecipe(steps=12, batch_size=12, learning_rate=0.1, members="own" if method == "phatgoose" else "all")
    report = train(tmp_path / "r", method, recipe=recipe)
    assert min(report.losses[-4:]) < report.losses[0]
    moved = COMPOSERS[method].initial(loaded_pool(train, tmp_path, method), 0, {}).tensors
    assert all(not torch.equal(moved[name], tensor) for name, tensor in report.router.tensors.items())
    assert get_composer(method, load_router(tmp_path / "r")).router.fingerprint == report.router.fingerprint


@pytest.mark.parametrize("granularity", ["matrix", "network"])
def test_mole_is_trained_also_with_adapters_of_the_output_head(train, tmp_path, adapters, granularity):
    head = LoraFactors(0.1 * torch.ones(1, 32), 0.1 * torch.ones(VOCABULARY, 1))
    headed = [
        replace(adapter, factors={**adapter.factors, "lm_head": head}, known_fingerprint=None) for adapter in adapters
    ]
    recipe = RouterRecipe(steps=2, batch_size=6)
    report = train(tmp_path / "r", "mole", adapters=headed, recipe=recipe, settings={"granularity": granularity})
    assert report.steps == 2
    assert not any("lm_head" in name for name in report.router.tensors)


@pytest.mark.parametrize("method", ["lora_flow", "cat"])
def test_the_loss_falls_and_every_tensor_is_reached(train, tmp_path, method):
    start = {"lora_flow": LoraFlow, "cat": Cat}[method]
    recipe = RouterRecipe(steps=30, batch_size=12, learning_rate=0.1, eval_every=10)
    report = train(tmp_path / "r", method, recipe=recipe, dev=DEV)
    assert report.dev_losses[30] < 0.95 * report.losses[0]
    assert min(report.losses[-5:]) < 0.9 * report.losses[0]
    before = start.initial(loaded_pool(train, tmp_path, method), 0, {}).tensors
    assert before.keys() == report.router.tensors.keys()
    assert all(not torch.equal(before[name], tensor) for name, tensor in report.router.tensors.items())
    assert report.parameters == sum(tensor.numel() for tensor in before.values())


def loaded_pool(train, tmp_path, method):
    """The pool that a training hands to `initial`."""
    seen = []

    class Spy(COMPOSERS[method]):  # type: ignore[misc]
        @classmethod
        def initial(cls, pool, seed, settings):
            seen.append(pool)
            return super().initial(pool, seed, settings)

    train(tmp_path / "spied", Spy, recipe=RouterRecipe(steps=1, members="own"))
    return seen[0]


def test_step_0_of_lora_flow_is_the_adapter_of_the_task(train, tmp_path, base, adapters):
    report = train(tmp_path / "flow", settings={"task": "no"}, recipe=RouterRecipe(steps=1, batch_size=6, warmup=0))
    own = [row | {"task": "no"} for row in ROWS]
    alone = train(tmp_path / "alone", "cat", data=own, recipe=RouterRecipe(steps=1, batch_size=6, members="own"))
    everyone = train(tmp_path / "all", data=own, settings={"task": "no"}, recipe=RouterRecipe(steps=1, batch_size=6))
    assert everyone.losses[0] == pytest.approx(alone.losses[0], rel=1e-5)
    assert report.losses[0] != pytest.approx(alone.losses[0], rel=1e-3)


@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_resumed_run_equals_one_never_interrupted(train, tmp_path, stop):
    whole = train(tmp_path / "whole", dev=DEV)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", dev=DEV, on_step=interrupt_at(stop))
    assert not (tmp_path / "cut").exists()
    seen = []
    resumed = train(tmp_path / "cut", dev=DEV, on_step=lambda step: seen.append(step.number))
    assert seen[0] == stop // 3 * 3 + 1  # the steps since the last checkpoint are done again, no others
    assert (resumed.losses, resumed.dev_losses) == (whole.losses, whole.dev_losses)
    assert resumed.router.fingerprint == whole.router.fingerprint
    assert not (tmp_path / "cut.partial").exists()


def test_a_seed_decides_everything_and_the_callers_random_state_is_left_alone(train, tmp_path):
    state = torch.get_rng_state()
    one, two = train(tmp_path / "a", "cat"), train(tmp_path / "b", "cat")
    other = train(tmp_path / "c", "cat", recipe=replace(RECIPE, seed=6))
    assert one.router.fingerprint == two.router.fingerprint != other.router.fingerprint
    assert one.losses == two.losses != other.losses
    assert torch.equal(torch.get_rng_state(), state)


def test_measuring_the_dev_loss_changes_no_step(train, tmp_path):
    assert train(tmp_path / "a").losses == train(tmp_path / "b", dev=DEV).losses


def test_base_and_adapters_are_bit_identical_afterwards_and_trainable_as_before(train, tmp_path, base, adapters):
    weights, prints = copy.deepcopy(base.model.state_dict()), [adapter.fingerprint for adapter in adapters]
    base.model.lm_head.weight.requires_grad_(False)
    attention = base.model.config._attn_implementation
    train(tmp_path / "r")
    assert same(weights, base.model.state_dict())
    fresh = [replace(adapter, known_fingerprint=None).fingerprint for adapter in adapters]
    assert fresh == prints
    assert all(p.grad is None for p in base.model.parameters())
    frozen = {name for name, p in base.model.named_parameters() if not p.requires_grad}
    assert frozen == {"lm_head.weight"}
    assert not base.model.training
    assert base.model.config._attn_implementation == attention
    base.model.lm_head.weight.requires_grad_(True)


def test_training_stops_when_the_dev_loss_no_longer_falls_and_keeps_the_best(train, tmp_path):
    recipe = RouterRecipe(steps=40, batch_size=6, learning_rate=3.0, warmup=0, schedule="constant", eval_every=1)
    free = train(tmp_path / "free", recipe=replace(recipe, steps=20), dev=DEV)
    stopped = train(tmp_path / "stopped", recipe=replace(recipe, patience=3), dev=DEV)
    assert stopped.steps == stopped.best_step + 3 < 20
    assert stopped.losses == free.losses[: stopped.steps]
    assert stopped.dev_loss == min(stopped.dev_losses.values()) < stopped.dev_losses[stopped.steps]
    until = train(tmp_path / "until", recipe=replace(recipe, steps=stopped.best_step), dev=DEV)
    assert until.router.fingerprint == stopped.router.fingerprint


def test_a_row_that_loses_all_its_adapters_is_the_base_and_gradients_stay_finite(train, tmp_path, base):
    gone = RouterRecipe(steps=3, batch_size=6, adapter_dropout=1.0, keep_one=False)
    for method in ("lora_flow", "cat"):
        report = train(tmp_path / f"none {method}", method, recipe=gone)
        start = train(tmp_path / f"start {method}", method, recipe=replace(gone, steps=1))
        assert same(report.router.tensors, start.router.tensors)  # nobody was there to learn from
        some = train(tmp_path / f"some {method}", method, recipe=replace(gone, adapter_dropout=0.7, steps=6))
        assert all(torch.isfinite(tensor).all() for tensor in some.router.tensors.values())
        assert not same(some.router.tensors, start.router.tensors)


@dataclass(frozen=True)
class Balanced(Cat):
    """CAT with a loss of its own and a tensor that follows the steps."""

    name: ClassVar[str] = "cat"

    @classmethod
    def initial(cls, pool, seed, settings):
        start = Cat.initial(pool, seed, settings)
        return replace(start, tensors={**start.tensors, "steps": torch.zeros(1)})

    @property
    def untrained(self):
        return frozenset({"steps"})

    def auxiliary_loss(self, scratch):
        assert "steps" not in scratch
        return sum(tensor.square().sum() for name, tensor in self.router.tensors.items() if name != "steps")

    def after_step(self, scratch):
        return {"steps": self.router.tensors["steps"] + 1}


def test_the_methods_own_loss_and_its_untrained_tensors_take_part(train, tmp_path):
    recipe = RouterRecipe(steps=4, batch_size=6, learning_rate=0.2, warmup=0, auxiliary=1e4)
    report = train(tmp_path / "r", Balanced, recipe=recipe)
    assert report.router.tensors["steps"].item() == 4
    assert report.auxiliary[-1] < 0.5 * report.auxiliary[0]
    assert report.parameters == sum(t.numel() for name, t in report.router.tensors.items() if name != "steps")
    without = train(tmp_path / "s", Balanced, recipe=replace(recipe, auxiliary=0.0))
    assert set(without.auxiliary) == {0.0}
    assert without.router.tensors["steps"].item() == 4


@dataclass(frozen=True)
class Detour(Balanced):
    """Trained as something else than what it runs."""

    @classmethod
    def training(cls, router):
        return Balanced(router)

    def compose(self, banks, weights):
        raise NotImplementedError


def test_a_method_may_train_other_gates_than_it_runs(train, tmp_path):
    recipe = RouterRecipe(steps=2, batch_size=6)
    report, plain = train(tmp_path / "r", Detour, recipe=recipe), train(tmp_path / "s", Balanced, recipe=recipe)
    assert report.router.fingerprint == plain.router.fingerprint


@dataclass(frozen=True)
class Overreaching(Balanced):
    def after_step(self, scratch):
        return {next(iter(set(self.router.tensors) - {"steps"})): torch.zeros(3)}


def test_a_method_may_not_overwrite_what_gradients_train(train, tmp_path):
    with pytest.raises(LookupError, match="list them as untrained"):
        train(tmp_path / "r", Overreaching)


def test_what_is_saved_is_what_ran(train, tmp_path, base, adapters):
    report = train(tmp_path / "r", dev=DEV)
    read = load_router(tmp_path / "r")
    assert same(read.tensors, report.router.tensors)
    assert read.fingerprint == report.router.fingerprint
    deltas = [
        laws.compose_rows(LoraFlow(router), [a.to(dtype=torch.float32) for a in adapters], [[1.0, 0.5, 0.0]])
        for router in (read, report.router)
    ]
    logits = [laws.logits(base.model, each, "llama", batch=1) for each in deltas]
    assert torch.equal(*logits)


def test_the_record_says_how_it_was_trained(train, tmp_path, base, adapters):
    report = train(tmp_path / "r", recipe=replace(RECIPE, per_task=2, max_length=40), dev=DEV)
    record = json.loads((tmp_path / "r" / "router.json").read_text())
    training = record["training"]
    assert record["base_model"] == base.name
    assert training["recipe"] == json.loads(json.dumps(asdict(replace(RECIPE, per_task=2, max_length=40))))
    assert training["base"] == {"hidden": 32, "layers": 2}
    assert training["tasks"] == {"maybe": 2, "no": 2, "yes": 2}
    assert {entry["name"]: entry["fingerprint"] for entry in training["pool"]} == {
        adapter.name: adapter.fingerprint for adapter in adapters
    }
    assert training["losses"] == pytest.approx(report.losses, abs=1e-5)
    assert training["dev_losses"].keys() == {"2", "4", "6", "7"}
    assert (training["steps"], training["examples"], training["parameters"]) == (7, 6, report.parameters)
    assert training["versions"].keys() == {"loracompose", "torch", "transformers"}
    assert len({training["data"], training["dev"]}) == 2


@pytest.mark.parametrize(
    "other", [{"data": ROWS[1:]}, {"recipe": replace(RECIPE, seed=6)}, {"dev": DEV[:1]}, {"settings": {"task": "no"}}]
)
def test_the_checkpoint_of_another_run_is_refused_or_deleted(train, tmp_path, other):
    with pytest.raises(Interrupted):
        train(tmp_path / "r", on_step=interrupt_at(4))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tmp_path / "r", **other)
    assert train(tmp_path / "r", resume=False, **other).steps == 7


def test_other_adapters_are_another_run(train, tmp_path, adapters):
    with pytest.raises(Interrupted):
        train(tmp_path / "r", on_step=interrupt_at(4))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tmp_path / "r", adapters=adapters[:2])


def test_adapters_that_swapped_their_names_are_another_run(train, tmp_path, adapters):
    recipe = replace(RECIPE, members="own")
    with pytest.raises(Interrupted):
        train(tmp_path / "r", recipe=recipe, on_step=interrupt_at(4))
    swapped = [replace(adapters[0], name="no"), replace(adapters[1], name="yes"), adapters[2]]
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tmp_path / "r", recipe=recipe, adapters=swapped)


@pytest.mark.parametrize("changed", ["rows", "dev rows"])
def test_an_index_that_finds_others_for_the_prompts_makes_another_run(train, tmp_path, monkeypatch, changed):
    pool, embedder = build_pool(tmp_path / "pool"), CallableEmbedder(bag_of_words, "bag-of-words", "1")
    rows = [{"prompt": prompt, "response": "x", "task": task} for task, prompts in TASKS.items() for prompt in prompts]
    given = {"data": rows, "dev": rows[::3], "recipe": replace(RECIPE, members="retrieved", k=1)}
    with AdapterIndex.build(pool, tmp_path / "index", embedder=embedder) as index:
        with pytest.raises(Interrupted):
            train(tmp_path / "r", adapters=index, on_step=interrupt_at(4), **given)
        search, asked = index.search, []

        def as_after_a_change(prompts, *more, **options):
            asked.append("rows" if not asked else "dev rows")  # the order in which they are looked up
            return search(["add one"] * len(prompts) if asked[-1] == changed else prompts, *more, **options)

        monkeypatch.setattr(index, "search", as_after_a_change)
        with pytest.raises(ValueError, match="belongs to another run"):
            train(tmp_path / "r", adapters=index, **given)
    assert asked == ["rows", "dev rows"]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"method": "mixture"}, LookupError, "'mixture' learns nothing; a router can be trained for .*lora_flow"),
        ({"method": "flow"}, LookupError, "'flow' is no composer"),
        ({"settings": {"temperatur": 1}}, ValueError, "LoraFlow has no setting temperatur; it has task, temperature"),
        ({"settings": {"task": "sst2"}}, LookupError, "no adapter is named 'sst2'"),
        ({"adapters": []}, ValueError, "got none"),
        ({"recipe": RouterRecipe(tasks=("si",))}, LookupError, "no task si; it has maybe, no, yes"),
        ({"recipe": RouterRecipe(members="retrieved")}, ValueError, "needs an index"),
        ({"recipe": RouterRecipe(eval_every=2, patience=3)}, ValueError, "patience is 3, .* no dev rows: give dev"),
        ({"recipe": RouterRecipe(max_length=5)}, ValueError, "all 8 rows of task 'maybe' are longer"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(train, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        train(tmp_path / "r", **given)
    assert not (tmp_path / "r").exists()


def test_one_adapter_twice_or_two_of_one_name_are_refused(train, tmp_path, adapters):
    with pytest.raises(ValueError, match="'yes' and 'again' are the same"):
        train(tmp_path / "r", adapters=[*adapters, replace(adapters[0], name="again")])
    with pytest.raises(ValueError, match="two adapters of the pool are named 'no'"):
        train(tmp_path / "r", adapters=[adapters[0], adapters[1], replace(adapters[2], name="no")])


def test_an_existing_folder_is_not_overwritten(train, tmp_path):
    (tmp_path / "r").mkdir()
    with pytest.raises(FileExistsError, match="delete it or choose another"):
        train(tmp_path / "r")


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    broken = load_base(base_folder(tmp_path, head=float("nan")), device="cpu")
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        train(tmp_path / "r", base=broken)
    assert not (tmp_path / "r").exists()


def test_an_encoder_decoder_is_trained_too(tmp_path):
    adapters = [
        laws.random_adapter(word, "t5", seed=seed, rank=3, scale=0.15, modules=("q", "v"))
        for seed, word in enumerate(WORDS, 1)
    ]
    report = train_router(
        "lora_flow",
        ROWS,
        adapters,
        tmp_path / "r",
        base=base_folder(tmp_path, "t5"),
        recipe=RouterRecipe(steps=20, batch_size=12, learning_rate=0.1),
        device="cpu",
        progress=False,
    )
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize("on", ["llama", "t5"])
def test_gates_are_told_which_tokens_are_prompts(on, tmp_path):
    from tests.runtime.toy import Recorder

    loaded = load_base(base_folder(tmp_path, on), device="cpu")
    from loracompose.training.data import EncodedExample

    batch = [EncodedExample((5, 6, 7), (8, 2)), EncodedExample((9,), (8, 8, 8, 2))]
    gates: list[Recorder] = []

    class Watching:
        def compose(self, banks, weights):
            deltas = Cat(Cat.initial(laws.everyone(), 0, {})).compose(banks, weights)
            gates.extend(Recorder() for _ in deltas)
            return {m: replace(d, gate=g) for (m, d), g in zip(deltas.items(), gates, strict=True)}

    adapter = laws.hostile_adapters(on)[0].to(dtype=torch.float32)
    banks = laws.gather_banks([adapter])
    material = Material(loaded.model, banks, 0, None, None)  # type: ignore[arg-type]
    with torch.no_grad():
        composed_loss(material, Watching(), batch, torch.ones(2, 1))  # type: ignore[arg-type]
    lengths = [[True, True, True, False, False], [True, False, False, False, False]]
    if on == "llama":
        assert prompt_mask(batch, loaded.model).tolist() == lengths
        assert all(gate.seen[0].prompt(5).tolist() == lengths for gate in gates)
        return
    for module, gate in zip(banks, gates, strict=True):
        reads_prompts = module.startswith("encoder") or module.endswith(("EncDecAttention.k", "EncDecAttention.v"))
        starts = [[True, False, False, False]] * 2
        wanted = [row[:3] for row in lengths] if reads_prompts else starts
        assert gate.seen[0].prompt(len(wanted[0])).tolist() == wanted, module
