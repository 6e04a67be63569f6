"""train_smora: it learns, the load evens out, a run resumes exactly, and what is written is what was trained."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from typer.testing import CliRunner

from loracompose import Engine
from loracompose.adapters.checkpoint import load_adapter
from loracompose.adapters.lora import Adapter, LoraFactors
from loracompose.cli import app
from loracompose.composers.smora import Smora
from loracompose.composition.bank import gather_banks
from loracompose.composition.router import Router, RouterAdapter, load_router, save_router
from loracompose.models import load_base
from loracompose.runtime.attach import attach
from loracompose.training.adapter import with_lora
from loracompose.training.batches import response_loss
from loracompose.training.beam_settings import BeamSettings
from loracompose.training.data import encode_examples, read_examples
from loracompose.training.recipe import Recipe
from loracompose.training.smora import train_smora
from loracompose.training.smora_ranks import SmoraRanks
from loracompose.training.smora_settings import SmoraSettings
from tests.training.interruption import Interrupted, interrupt_at
from tests.training.tiny_base import base_folder

YES = [{"prompt": f"say yes {i}", "response": "yes"} for i in range(12)]
COUNT = [{"prompt": f"count {i}", "response": f"{i} {i + 1}"} for i in range(12)]
RECIPE = Recipe(rank=8, steps=9, batch_size=4, learning_rate=2e-2, warmup=2, seed=5, eval_every=4, save_every=3)
FEW = SmoraSettings(active=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def train(base):
    def run(output, recipe=RECIPE, settings=FEW, **more):
        return train_smora(
            [YES, COUNT], output, base=base, recipe=recipe, settings=settings, device="cpu", progress=False, **more
        )

    return run


def tensors(folder):
    return (
        load_file(folder / "adapter_model.safetensors") | load_router(folder.with_name(f"{folder.name}.router")).tensors
    )


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_loss_falls_and_factors_router_and_biases_all_move(train, tmp_path):
    recipe = replace(RECIPE, steps=40, target_modules=("v_proj", "o_proj", "down_proj"))
    report = train(tmp_path / "a", recipe=recipe, dev=[YES[:3], COUNT[:3]])
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.dev_loss < report.losses[0]
    train(tmp_path / "start", recipe=replace(recipe, steps=1, learning_rate=1e-12))
    done, start = tensors(tmp_path / "a"), tensors(tmp_path / "start")
    assert all(not torch.allclose(done[key].float(), start[key].float(), atol=1e-3) for key in done)


def test_an_engine_runs_the_router_as_it_was_written(train, base, tmp_path):
    train(tmp_path / "a", recipe=replace(RECIPE, steps=1))
    router = tmp_path / "a.router"
    assert load_router(router).training["base"] == {"hidden": 32, "layers": 2}
    with Engine.from_pretrained(base, composer="smora", router=router, device="cpu") as engine:
        answer = engine.generate("say yes 1", adapters=[[tmp_path / "a"]], max_new_tokens=2)[0]
    assert answer.composer == repr(Smora(load_router(router)))


@pytest.mark.parametrize("stop", [1, 4, 8])
def test_a_resumed_run_equals_one_never_interrupted(train, tmp_path, stop):
    whole = train(tmp_path / "whole", dev=[YES[:3]])
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", dev=[YES[:3]], on_step=interrupt_at(stop))
    assert not (tmp_path / "cut").exists()
    resumed = train(tmp_path / "cut", dev=[YES[:3]])
    assert (resumed.losses, resumed.dev_losses, resumed.violation) == (whole.losses, whole.dev_losses, whole.violation)
    assert equal(tensors(tmp_path / "cut"), tensors(tmp_path / "whole"))
    loads = [load_router(tmp_path / f"{name}.router").training["load"] for name in ("cut", "whole")]
    assert loads[0] == loads[1]
    assert not (tmp_path / "cut.partial").exists()


def test_a_recipe_of_beam_lora_is_refused(train, tmp_path):
    with pytest.raises(ValueError, match=r"SMoRA .* BeamLoRA .*: leave recipe.beam None, or call train_adapter"):
        train(tmp_path / "a", recipe=replace(RECIPE, beam=BeamSettings()))
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_of_other_settings_is_refused(train, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "a", on_step=interrupt_at(4))
    with pytest.raises(ValueError, match="another run"):
        train(tmp_path / "a", settings=SmoraSettings(active=4))


def test_what_was_written_runs_as_it_was_trained(train, tmp_path, base):
    report = train(tmp_path / "a", dev=[YES, COUNT])
    loaded, adapter = load_base(base, device="cpu"), load_adapter(tmp_path / "a")
    examples = encode_examples(loaded.tokenizer, read_examples([*YES, *COUNT]), 512)
    deltas = Smora(load_router(report.router)).compose(gather_banks([adapter]), torch.ones(len(examples), 1))
    with torch.no_grad(), attach(loaded.model, deltas):
        together = response_loss(loaded.model, examples, 0).item()
    plain = PeftModel.from_pretrained(loaded.model, tmp_path / "a").eval()
    with torch.no_grad():
        ungated = response_loss(plain, examples, 0).item()
    assert together == pytest.approx(report.dev_loss, rel=5e-3)  # factors and W_g were rounded to bfloat16
    assert ungated != pytest.approx(report.dev_loss, rel=5e-3)


def test_training_and_running_give_the_same_logits(base):
    loaded = load_base(base, device="cpu", dtype="float32")
    recipe = replace(RECIPE, alpha=4.0)
    model = with_lora(loaded, recipe)
    torch.manual_seed(0)
    layers = [m for m in model.modules() if hasattr(m, "lora_B")]
    for layer in layers:
        layer.lora_B["default"].weight.data.normal_()
    ranks = SmoraRanks(model, FEW, steps=10, seed=0, base_model="tiny")
    ids = torch.randint(4, 50, (3, 7))
    with torch.no_grad(), ranks.attached():
        want = model(input_ids=ids).logits
    plain = model(input_ids=ids).logits  # the hooks are gone
    names = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_B")}
    factors = {
        name: LoraFactors(m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach() * 4.0 / 8)
        for name, m in names.items()
    }
    own = Adapter("own", factors)
    exact = {name: p.detach() for name, p in ranks.parameters.items()}
    router = ranks.router(RouterAdapter(own.fingerprint, "own"), {})
    router = replace(router, tensors={**router.tensors, **exact})
    bare = load_base(base, device="cpu", dtype="float32").model
    deltas = Smora(router).compose(gather_banks([own]), torch.ones(3, 1))
    with torch.no_grad(), attach(bare, deltas):
        got = bare(input_ids=ids).logits
    assert torch.allclose(got, want, atol=1e-4)
    assert not torch.allclose(plain, want, atol=1e-2)


def test_balancing_evens_out_the_load_and_the_record_shows_it(train, tmp_path):
    recipe = replace(RECIPE, steps=60, learning_rate=1e-4, save_every=60, eval_every=0)
    excess = {}
    for balance in (0.0, 0.004):
        report = train(tmp_path / str(balance), recipe=recipe, settings=SmoraSettings(active=2, balance=balance))
        load = load_router(report.router).training["load"]
        assert load["violation"] == pytest.approx(list(report.violation), abs=1e-4)
        assert {len(blocks) for part in ("first", "last") for blocks in load[part].values()} == {8}
        excess[balance] = {p: sum(8 * max(n) / sum(n) - 1 for n in load[p].values()) for p in ("first", "last")}
    assert excess[0.004]["last"] < 0.5 * excess[0.004]["first"]
    assert excess[0.0]["last"] > 0.8 * excess[0.0]["first"]


@pytest.mark.parametrize("block", [1, 2, 4, 8])
def test_every_granularity_trains(train, tmp_path, block):
    settings = SmoraSettings(active=8 if block == 8 else 4, block=block, normalised=block not in (4, 8))
    train(tmp_path / "a", recipe=replace(RECIPE, steps=2), settings=settings)
    router = load_router(tmp_path / "a.router")
    assert {t.shape[0] for t in router.tensors.values()} == {8 // block}


def test_the_adapter_is_a_plain_one_at_the_scaling_of_its_alpha_with_a_card_of_all_tasks(train, tmp_path):
    train(tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 4.0)  # alpha = 2 k
    card = json.loads((tmp_path / "a" / "card.json").read_text())
    assert {prompt.split()[0] for prompt in card["examples"]} == {"say", "count"}
    router = load_router(tmp_path / "a.router")
    assert [known.fingerprint for known in router.adapters] == [load_adapter(tmp_path / "a").fingerprint]
    assert router.settings["balance"] == pytest.approx(0.5 / 9)
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert record["method"] == "smora"
    assert record["steps"] == len(record["losses"]) == 9


def test_a_taken_folder_dropout_and_a_module_that_is_no_linear_layer_are_refused(train, tmp_path):
    (tmp_path / "a.router").mkdir()
    with pytest.raises(FileExistsError, match=r"a\.router exists"):
        train(tmp_path / "a")
    with pytest.raises(ValueError, match="without dropout"):
        train(tmp_path / "b", recipe=replace(RECIPE, dropout=0.1))
    with pytest.raises(ValueError, match=r"'model\.embed_tokens' is not linear"):
        train(tmp_path / "c", recipe=replace(RECIPE, target_modules=("embed_tokens",)))


def test_the_command_trains_from_several_files(tmp_path, base):
    for name, rows in (("yes", YES), ("count", COUNT)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    files = [str(tmp_path / f"{name}.jsonl") for name in ("yes", "count")]
    numbers = ["--rank", "8", "--active", "2", "--steps", "2", "--batch-size", "4", "--device", "cpu"]
    folders = ["-o", str(tmp_path / "a"), "--router", str(tmp_path / "r"), "--base", str(base)]
    result = CliRunner().invoke(app, ["train", "smora", *files, *folders, *numbers, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["examples"] == 24
    assert load_router(tmp_path / "r").settings["active"] == 2


def figure():
    pytest.importorskip("matplotlib")
    place = Path(__file__).parents[2] / "benchmarks" / "smora_load.py"
    source = importlib.util.spec_from_file_location("smora_load", place)
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def test_the_figure_shows_the_loads_of_a_record_and_is_the_same_file_each_time(tmp_path):
    smora_load = figure()
    load = {"violation": [2.0, 0.5], "first": {"a": [0, 8], "b": [1, 3]}, "last": {"a": [4, 4], "b": [5, 5]}}
    assert smora_load.sorted_loads(load["first"]) == [1.75, 0.25]
    record = tmp_path / "record.json"
    record.write_text(json.dumps({"steps": 2, "load": load, "pool": "left out"}))
    assert smora_load.read(record) == {"steps": 2, "load": load}
    for name in ("one.svg", "two.svg"):
        smora_load.draw(smora_load.read(record)["load"], tmp_path / name)
    drawn = (tmp_path / "one.svg").read_bytes()
    assert drawn == (tmp_path / "two.svg").read_bytes()
    assert b"last tenth of the steps" in drawn
    save_router(Router("smora", {}, {"a": torch.zeros(1)}, "base", training={"load": load}), tmp_path / "with")
    assert smora_load.read(tmp_path / "with") == {"load": load}
    save_router(Router("smora", {}, {"a": torch.zeros(1)}, "base"), tmp_path / "without")
    with pytest.raises(LookupError, match="has no load in its record"):
        smora_load.read(tmp_path / "without")
