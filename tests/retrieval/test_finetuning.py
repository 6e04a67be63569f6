"""train_retriever: it brings prompts of one adapter together, resumes exactly, and writes what an index takes."""

from __future__ import annotations

import json
import random
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from loracompose import AdapterIndex
from loracompose.cli import app
from loracompose.encoders import encoder_revision, load_encoder
from loracompose.retrieval.encoder_recipe import EncoderRecipe
from loracompose.retrieval.finetuning import train_retriever
from tests.retrieval.material import PROMPTS, TASKS
from tests.retrieval.tiny_encoder import encoder_folder
from tests.training.interruption import Interrupted, interrupt_at

RECIPE = EncoderRecipe(epochs=5, batch_size=4, learning_rate=1e-2, warmup=2, seed=3, save_every=3)  # 10 steps


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return encoder_folder(tmp_path_factory.mktemp("encoder"))


@pytest.fixture
def train(encoder):
    def run(output, source=TASKS, recipe=RECIPE, **settings):
        given = {"encoder": str(encoder), "device": "cpu", "progress": False, **settings}
        return train_retriever(source, output, recipe=recipe, **given)

    return run


def weights(folder):
    return load_file(folder / "model.safetensors")


def equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def margin(folder):
    """By how much prompts of one adapter are nearer to each other than to those of others, in cosine."""
    texts = [text for group in TASKS.values() for text in group]
    owners = np.repeat(np.arange(len(TASKS)), [len(group) for group in TASKS.values()])
    vectors = load_encoder(str(folder)).encode(texts, normalize_embeddings=True, show_progress_bar=False)
    cosines, same = vectors @ vectors.T, owners[:, None] == owners[None, :]
    return cosines[same & ~np.eye(len(texts), dtype=bool)].mean() - cosines[~same].mean()


def test_training_brings_prompts_of_one_adapter_together(train, tmp_path, encoder):
    report = train(tmp_path / "a", recipe=EncoderRecipe(epochs=40, batch_size=4, learning_rate=3e-3))
    assert np.mean(report.losses[-8:]) < 0.5 * np.mean(report.losses[:4])
    assert margin(tmp_path / "a") > margin(encoder) + 0.3


@pytest.mark.parametrize("stop", [1, 5, 7])
def test_a_resumed_run_equals_one_never_interrupted(train, tmp_path, stop):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", on_step=interrupt_at(stop))
    assert not (tmp_path / "cut").exists()
    seen = []
    resumed = train(tmp_path / "cut", on_step=lambda step: seen.append(step.number))
    assert seen[0] == (stop - 1) // 3 * 3 + 1  # the steps since the last checkpoint are done again, no others
    assert resumed.losses == whole.losses
    assert equal(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert resumed.revision == whole.revision
    assert not (tmp_path / "cut.partial").exists()


def test_a_checkpoint_that_was_not_wholly_written_is_passed_over(train, tmp_path):
    whole = train(tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", on_step=interrupt_at(8))
    newest = tmp_path / "cut.partial" / "checkpoint-6"
    (newest / "complete").unlink()  # written last
    (newest / "model.safetensors").write_bytes(b"")
    seen = []
    resumed = train(tmp_path / "cut", on_step=lambda step: seen.append(step.number))
    assert seen[0] == 4
    assert resumed.losses == whole.losses


def test_a_seed_decides_everything_and_the_random_state_outside_nothing(train, tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(ord(name))
        random.seed(ord(name))
        train(tmp_path / name, recipe=EncoderRecipe(epochs=1, batch_size=4, learning_rate=1e-2, seed=seed))
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert encoder_revision(tmp_path / "a") == encoder_revision(tmp_path / "b")
    assert not equal(weights(tmp_path / "a"), weights(tmp_path / "c"))


def test_the_callers_random_state_is_left_alone(train, tmp_path):
    def drawn():
        return torch.rand(1).item(), random.random(), np.random.rand()  # noqa: NPY002

    def seed():
        torch.manual_seed(9)
        random.seed(9)
        np.random.seed(9)  # noqa: NPY002

    seed()
    expected = drawn()
    seed()
    train(tmp_path / "a", recipe=EncoderRecipe(epochs=1, batch_size=4))
    assert drawn() == expected


def test_a_share_of_0_is_the_encoder_unchanged(train, tmp_path, encoder):
    given = shutil.copytree(encoder, tmp_path / "given")
    (given / "LICENSE.txt").write_text("with every file")
    report = train(tmp_path / "a", share=0, encoder=str(given))
    assert equal(weights(tmp_path / "a"), weights(given))
    assert report.revision == encoder_revision(given) == encoder_revision(tmp_path / "a")
    assert (report.adapters, report.steps) == ((), 0)


def test_a_share_trains_on_that_part_of_the_adapters_only(train, tmp_path):
    half = train(tmp_path / "a", share=0.5)
    assert len(half.adapters) == 2
    others = {name: prompts for name, prompts in TASKS.items() if name in half.adapters}
    same = train(tmp_path / "b", others)
    assert half.losses == same.losses
    assert equal(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert json.loads((tmp_path / "a" / "training.json").read_text())["adapters"] == list(half.adapters)


def test_token_embeddings_stay_even_where_all_layers_learn(train, tmp_path, encoder):
    train(tmp_path / "a", recipe=EncoderRecipe(epochs=1, batch_size=4, depth=1.0))
    before, after = weights(encoder), weights(tmp_path / "a")
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert {name for name in still if "pooler" not in name} == {"embeddings.word_embeddings.weight"}


def test_the_last_half_of_the_layers_learns_unless_told_otherwise(train, tmp_path, encoder):
    train(tmp_path / "a", recipe=EncoderRecipe(epochs=1, batch_size=4))
    before, after = weights(encoder), weights(tmp_path / "a")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("encoder.layer.1.")}


def test_an_index_takes_the_folder_and_remembers_it(train, tmp_path, pool):
    report = train(tmp_path / "encoder", pool)
    folder = str(tmp_path / "encoder")
    with AdapterIndex.build(pool, tmp_path / "index", embedder=folder) as index:
        assert index.catalog.settings.revision == report.revision
        expected = index.search(PROMPTS, k=2)
        assert train(tmp_path / "again", index).revision == report.revision  # the same cards, from the index
    with AdapterIndex.open(tmp_path / "index") as index:
        assert index.search(PROMPTS, k=2).names == expected.names


def test_the_encoder_keeps_its_own_longest_text(train, tmp_path, encoder):
    train(tmp_path / "a", recipe=EncoderRecipe(epochs=1, batch_size=4, max_length=8))
    assert load_encoder(str(tmp_path / "a")).max_seq_length == load_encoder(str(encoder)).max_seq_length == 48


def test_texts_are_cut_in_training(train, tmp_path):
    long = {name: [f"{prompt} and add one" for prompt in prompts] for name, prompts in TASKS.items()}
    runs = [
        train(tmp_path / f"{name}{length}", source, EncoderRecipe(epochs=1, batch_size=4, max_length=length)).losses
        for name, source in (("a", TASKS), ("b", long))
        for length in (8, 40)
    ]
    # the first 8 tokens are those of the instruction or of the text, not what was added at the end
    assert runs[1] != runs[3]
    assert runs[0][0] == runs[2][0]


def test_the_record_says_how_it_was_trained(train, tmp_path, encoder):
    report = train(tmp_path / "a")
    record = json.loads((tmp_path / "a" / "training.json").read_text())
    assert record["revision"] == encoder_revision(encoder) != report.revision
    assert (record["share"], record["steps"], record["examples"]) == (1.0, 10, 12)
    assert record["recipe"] == {**vars(RECIPE)}
    assert record["losses"] == pytest.approx(report.losses, abs=1e-5)


def test_an_existing_folder_is_not_overwritten(train, tmp_path):
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError, match="delete it or choose another"):
        train(tmp_path / "a")


@pytest.mark.parametrize("other", [{"share": 0.5}, {"recipe": EncoderRecipe(batch_size=4, seed=6)}])
def test_the_checkpoint_of_another_run_is_refused_or_deleted(train, tmp_path, other):
    with pytest.raises(Interrupted):
        train(tmp_path / "a", on_step=interrupt_at(4))
    with pytest.raises(ValueError, match="belongs to another run"):
        train(tmp_path / "a", **other)
    assert train(tmp_path / "a", resume=False, **other).steps


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    broken = encoder_folder(tmp_path, weight=float("nan"))
    with pytest.raises(ValueError, match="the contrastive loss is nan"):
        train_retriever(TASKS, tmp_path / "a", encoder=str(broken), device="cpu", progress=False)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({}, "no adapter with examples"),
        ({"a": ["x", "y"], "b": []}, "b: no example prompts"),
        ({"a": ["x", "y"], "b": ["x", " "]}, "b: an example prompt must be a text that is not blank, got ' '"),
        ({"a": ["x", "y"], "b": ["x", None]}, "b: an example prompt must be a text"),
        ({"a": ["x", "y"]}, "leaves 1 with two or more prompts"),
        ({"a": ["x", "y"], "b": ["z", "z"]}, "leaves 1 with two or more prompts"),
        ({"a": ["x", "y"], "b": ["y", "z"]}, "leaves 0 with two or more prompts"),
    ],
)
def test_bad_profiles_are_refused(train, tmp_path, source, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "a", source)
    assert list(tmp_path.iterdir()) == []


def test_the_command_trains_on_a_folder_of_adapters(encoder, pool, tmp_path):
    given = [pool, "--encoder", encoder, "--epochs", 1, "--batch-size", 4, "--device", "cpu", "--json"]
    command = [str(part) for part in ["train", "retriever", *given, "-o", tmp_path / "a"]]
    made = CliRunner().invoke(app, command)
    assert made.exit_code == 0, made.output
    report = json.loads(made.stdout)
    assert (report["steps"], report["examples"]) == (2, 12)
    assert report["revision"] == encoder_revision(tmp_path / "a")
    again = CliRunner().invoke(app, command)
    assert (again.exit_code, "delete it" in again.stderr) == (2, True)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_out_of_range_is_refused(train, tmp_path, share):
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        train(tmp_path / "a", share=share)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 2},
        {"temperature": 0},
        {"learning_rate": float("nan")},
        {"warmup": -1},
        {"views": "all"},
        {"max_length": 4},
        {"seed": -1},
        {"clip": float("inf")},
        {"depth": 0},
    ],
)
def test_a_recipe_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EncoderRecipe(**wrong)
