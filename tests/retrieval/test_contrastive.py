"""The contrastive loss against its formula, and the plan of the batches it sees."""

from __future__ import annotations

import json
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from loracompose.retrieval.contrastive import CHUNK, LengthSorted, info_nce
from loracompose.retrieval.encoder_recipe import EncoderRecipe
from loracompose.retrieval.pairing import gather_material, pair_plan
from loracompose.retrieval.profiles import draw_share, read_profiles, trainable
from tests.retrieval.material import TASKS, make_adapter


def naive(vectors, labels, temperature):
    """The formula, term by term."""
    terms = []
    for i in range(len(labels)):
        for j in range(len(labels)):
            if i != j and labels[i] == labels[j]:
                near = math.exp(float(vectors[i] @ vectors[j]) / temperature)
                far = sum(
                    math.exp(float(vectors[i] @ vectors[n]) / temperature)
                    for n in range(len(labels))
                    if labels[n] != labels[i]
                )
                terms.append(-math.log(near / (near + far)))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("labels", [[0, 0, 1, 1], [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 2]])
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_the_loss_is_the_formula(labels, temperature):
    generator = torch.Generator().manual_seed(0)
    vectors = functional.normalize(torch.randn(len(labels), 5, dtype=torch.float64, generator=generator), dim=1)
    found = info_nce(vectors, torch.tensor(labels), temperature)
    assert found.item() == pytest.approx(naive(vectors, labels, temperature), rel=1e-12)


def test_vectors_of_one_label_do_not_push_each_other_away():
    generator = torch.Generator().manual_seed(0)
    vectors = functional.normalize(torch.randn(6, 5, dtype=torch.float64, generator=generator), dim=1)
    vectors.requires_grad_()
    # of three vectors of one label and one pair of another, the gradient draws the three together
    info_nce(vectors, torch.tensor([0, 0, 0, 1, 1, 2]), 0.5).backward()
    moved = vectors.detach() - 1e-3 * vectors.grad
    same = [(0, 1), (0, 2), (1, 2), (3, 4)]
    assert sum((moved[i] @ moved[j] - vectors[i] @ vectors[j]).item() for i, j in same) > 0


sizes = st.lists(st.integers(2, 9), min_size=2, max_size=12)


@given(sizes, st.integers(3, 8), st.integers(1, 3), st.integers(0, 5))
def test_no_batch_holds_two_pairs_of_one_adapter(sizes, batch_size, epochs, seed):
    for batch in pair_plan(sizes, batch_size=batch_size, epochs=epochs, seed=seed):
        adapters = [adapter for adapter, _, _ in batch]
        assert len(set(adapters)) == len(adapters)
        assert 2 <= len(batch) <= batch_size


@given(st.integers(2, 9), st.integers(2, 12), st.integers(3, 8), st.integers(1, 3))
def test_an_epoch_pairs_every_example_with_another_one(size, adapters, batch_size, epochs):
    plan = pair_plan([size] * adapters, batch_size=batch_size, epochs=epochs, seed=1)
    pairs = [pair for batch in plan for pair in batch]
    assert all(first != second for _, first, second in pairs)
    seen = Counter((adapter, place) for adapter, *two in pairs for place in two)
    assert len(seen) == size * adapters
    assert sum(seen.values()) == epochs * (size + size % 2) * adapters
    assert min(seen.values()) >= epochs


def test_a_plan_is_a_function_of_its_seed():
    plans = [pair_plan([6] * 5, batch_size=3, epochs=2, seed=seed) for seed in (0, 0, 1)]
    assert plans[0] == plans[1] != plans[2]


@pytest.mark.parametrize("views", ["both", "instructed", "plain"])
def test_a_batch_has_two_texts_of_each_adapter_all_instructed_or_none(views):
    profiles = {f"a{i}": tuple(f"prompt {i} {j}" for j in range(4)) for i in range(6)}
    made = gather_material(profiles, EncoderRecipe(epochs=2, batch_size=3, views=views), "Say: ")
    kinds = Counter()
    for batch in made.batches:
        texts = [made.texts[number] for number in batch]
        assert set(Counter(made.labels[number] for number in batch).values()) == {2}
        assert all(text.split()[-2] == str(made.labels[number]) for text, number in zip(texts, batch, strict=True))
        assert len({text.startswith("Say: ") for text in texts}) == 1
        kinds[texts[0].startswith("Say: ")] += 1
    expected = {"both": {True: 4, False: 4}, "instructed": {True: 8}, "plain": {False: 8}}
    assert dict(kinds) == expected[views]


def test_a_batch_is_cut_into_chunks_of_like_length_with_its_labels():
    class Letters:
        def preprocess(self, texts):
            width = max(map(len, texts))
            return {"input_ids": torch.tensor([[ord(c) for c in text.ljust(width)] for text in texts])}

    rows = [{"text": "x" * (1 + 7 * i % 40), "label": i} for i in range(2 * CHUNK + 3)]
    batch = LengthSorted(Letters())(rows)
    widths = [value.shape for key, value in batch.items() if key.endswith("_input_ids")]
    assert [rows for rows, _ in widths] == [CHUNK, CHUNK, 3]
    assert widths[0][1] < widths[1][1] < widths[2][1]
    lengths = [len(rows[label]["text"]) for label in batch["label"].tolist()]
    assert lengths == sorted(lengths)


def test_prompts_of_two_adapters_and_repeated_ones_are_left_out():
    profiles = {"a": ("x", "x", "y", "shared"), "b": ("z", "w", "shared"), "c": ("v", "v")}
    assert trainable(profiles, profiles) == {"a": ("x", "y"), "b": ("z", "w")}
    assert trainable({"a": profiles["a"]}, profiles) == {"a": ("x", "y")}


def test_a_smaller_share_is_part_of_a_larger_one_and_the_seed_draws_it():
    names = [f"adapter{i}" for i in range(48)]
    shares = {share: draw_share(names, share, 0) for share in (0, 0.4, 0.7, 1)}
    assert [len(drawn) for drawn in shares.values()] == [0, 19, 34, 48]
    assert set(shares[0.4]) < set(shares[0.7]) < set(shares[1])
    assert draw_share(reversed(names), 0.4, 0) == shares[0.4] != draw_share(names, 0.4, 1)


def test_profiles_are_read_from_a_folder_an_index_and_a_file(pool, index, tmp_path):
    expected = {name: tuple(prompts) for name, prompts in TASKS.items()}
    lines = [{"adapter": name, "prompt": prompt, "x": 1} for name, prompts in TASKS.items() for prompt in prompts]
    file = tmp_path / "profiles.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (pool / "notes").mkdir()
    for source in (pool, str(pool), index, index.folder, file, TASKS):
        assert read_profiles(source) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: a line must be"),
        ('{"adapter": "a"}', "line 2: a line must be"),
        ('{"adapter": 1, "prompt": "x"}', "line 2: the adapter must be a name, got 1"),
        ('{"adapter": "a", "prompt": " "}', "a: an example prompt must be a text that is not blank"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "profiles.jsonl"
    file.write_text('{"adapter": "a", "prompt": "x"}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_profiles(file)


def test_a_source_that_is_not_there_or_lacks_cards_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="give an index, a folder of adapters or a JSONL file"):
        read_profiles(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no adapter with examples"):
        read_profiles(tmp_path / "empty")
    (make_adapter(tmp_path / "pool" / "a", ["x"]) / "card.json").unlink()
    with pytest.raises(ValueError, match=r"a: no card\.json"):
        read_profiles(tmp_path / "pool")
