"""train_adapter: it learns, resumes exactly, leaves the world alone and writes what PEFT loads."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from loracompose.adapters.checkpoint import load_adapter
from loracompose.models import load_base
from loracompose.training.adapter import CardText, train_adapter
from loracompose.training.batches import response_loss
from loracompose.training.data import encode_examples, read_examples
from loracompose.training.recipe import Recipe
from tests.training.interruption import Interrupted, interrupt_at
from tests.training.tiny_base import base_folder

ROWS = [{"prompt": f"say {word} {i}", "response": word} for i in range(12) for word in ("yes", "no", "maybe")]
RECIPE = Recipe(
    rank=4, steps=12, batch_size=8, learning_rate=2e-2, warmup=2, dropout=0.1, seed=5, eval_every=5, save_every=3
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def train(base):
    def run(output, data=ROWS, recipe=RECIPE, **settings):
        return train_adapter(data, output, base=base, recipe=recipe, device="cpu", progress=False, **settings)

    return run


def weights(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_the_loss_falls_on_the_data_and_on_dev_rows(train, tmp_path):
    recipe = Recipe(
        rank=8, steps=40, learning_rate=3e-3, eval_every=10, target_modules=("v_proj", "o_proj", "down_proj")
    )
    report = train(tmp_path / "a", recipe=recipe, dev=ROWS[:9])
    assert report.losses[-1] < 0.5 * report.losses[0]
    assert report.dev_loss < report.dev_losses[10] < report.losses[0]
    assert list(report.dev_losses) == [10, 20, 30, 40]


@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_resumed_run_equals_one_never_interrupted(train, tmp_path, stop):
    whole = train(tmp_path / "whole", dev=ROWS[:9])
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", dev=ROWS[:9], on_step=interrupt_at(stop))
    assert not (tmp_path / "cut").exists()
    seen = []
    resumed = train(tmp_path / "cut", dev=ROWS[:9], on_step=lambda step: seen.append(step.number))
    assert seen[0] == stop // 3 * 3 + 1  # the steps since the last checkpoint are done again, no others
    assert (resumed.losses, resumed.dev_losses) == (whole.losses, whole.dev_losses)
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert not (tmp_path / "cut.partial").exists()


def test_a_seed_decides_everything(train, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(ord(name))
        train(tmp_path / name, recipe=Recipe(rank=4, steps=3, dropout=0.1, seed=seed))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_measuring_the_dev_loss_changes_nothing(train, tmp_path):
    train(tmp_path / "a")
    train(tmp_path / "b", dev=ROWS[:9])
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_the_gradient_is_clipped(train, tmp_path):
    # Adam divides by the gradient's size, but not below its epsilon of 1e-8: so small a step moves next to nothing
    train(tmp_path / "a", recipe=Recipe(steps=5, clip=1e-12))
    assert all(tensor.abs().max() < 1e-4 for key, tensor in weights(tmp_path / "a").items() if "lora_B" in key)


def test_the_callers_random_state_is_left_alone(train, tmp_path):
    before = torch.get_rng_state()
    train(tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)


def test_peft_loads_what_was_written_to_the_same_loss(train, tmp_path, base):
    dev = ROWS[:9]
    report = train(tmp_path / "a", dev=dev)
    loaded = load_base(base, device="cpu")
    examples = encode_examples(loaded.tokenizer, read_examples(dev), 512)
    model = PeftModel.from_pretrained(loaded.model, tmp_path / "a").eval()
    assert {tensor.dtype for tensor in weights(tmp_path / "a").values()} == {torch.bfloat16}
    # bfloat16 factors keep 8 bits of the float32 ones that the report measured
    assert response_loss(model, examples, 0).item() == pytest.approx(report.dev_loss, rel=1e-2)


def test_the_result_is_an_adapter_of_the_base(train, tmp_path, base):
    train(tmp_path / "a")
    adapter = load_adapter(tmp_path / "a", base=load_base(base, device="cpu").model)
    assert adapter.base_model == str(base)
    assert {factors.rank for factors in adapter.factors.values()} == {4}
    assert len(adapter.factors) == 4  # q and v of two layers


def test_an_encoder_decoder_is_trained_too(tmp_path):
    report = train_adapter(
        ROWS,
        tmp_path / "a",
        base=base_folder(tmp_path, "t5"),
        recipe=Recipe(steps=20, learning_rate=2e-2, target_modules=("q", "v")),
        device="cpu",
        progress=False,
    )
    assert report.losses[-1] < report.losses[0]
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"


def test_the_card_is_the_authors_or_shows_the_first_prompts(train, tmp_path):
    short = Recipe(steps=1)
    train(tmp_path / "a", recipe=short)
    train(tmp_path / "b", recipe=short, card=CardText("says yes", ("one", "two"), ("toy",), "apache-2.0"))
    first, given = (json.loads((tmp_path / name / "card.json").read_text()) for name in "ab")
    assert first["examples"] == [row["prompt"] for row in ROWS[:20]]
    assert given == {"description": "says yes", "examples": ["one", "two"], "tags": ["toy"], "license": "apache-2.0"}


def test_the_record_says_how_it_was_trained(train, tmp_path):
    report = train(tmp_path / "a", dev=ROWS[:9], recipe=Recipe(steps=2, seed=9, max_length=35))
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert record["recipe"]["seed"] == 9
    assert (record["steps"], record["examples"], record["left_out"]) == (2, report.examples, report.left_out)
    assert record["losses"] == pytest.approx(report.losses, abs=1e-5)
    assert record["versions"].keys() == {"loracompose", "torch", "transformers", "peft"}
    assert report.examples + report.left_out == len(ROWS)
    assert report.left_out > 0
    assert sorted(file.name for file in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "card.json",
        "training.json",
    ]


def test_an_existing_folder_is_not_overwritten(train, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="delete it or choose another"):
        train(tmp_path / "a")


@pytest.mark.parametrize("other", [{"data": ROWS[1:]}, {"recipe": Recipe(steps=12, seed=6)}, {"dev": ROWS[:1]}])
def test_the_checkpoint_of_another_run_is_refused_or_deleted(train, tmp_path, other):
    with pytest.raises(Interrupted):
        train(tmp_path / "a", on_step=interrupt_at(4))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tmp_path / "a", **other)
    assert train(tmp_path / "a", resume=False, **other).steps == 12


def test_a_row_that_moved_from_the_data_to_the_dev_rows_makes_another_run(train, tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "a", data=ROWS[:30], dev=ROWS[30:], on_step=interrupt_at(4))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tmp_path / "a", data=ROWS[:29], dev=ROWS[29:])


def test_an_unknown_target_module_is_refused_with_those_there_are(train, tmp_path):
    with pytest.raises(ValueError, match=r"no module named query; it has .*q_proj"):
        train(tmp_path / "a", recipe=Recipe(target_modules=("q_proj", "query")))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        train_adapter(ROWS, tmp_path / "a", base=base_folder(tmp_path, head=float("nan")), device="cpu", progress=False)
    assert not (tmp_path / "a").exists()
