from __future__ import annotations

import numpy as np
import pytest

from loracompose.retrieval.embedding import (
    CallableEmbedder,
    SentenceTransformerEmbedder,
    as_embedder,
    representation,
    unit_vectors,
)


def returning(value):
    return CallableEmbedder(lambda texts: value, "fixed")


def test_vectors_are_of_norm_one_and_in_the_order_of_the_texts(embedder):
    texts = ["a b c", "d e", "a b c", "f"]
    vectors = unit_vectors(embedder, texts, 64)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    raw = embedder(texts)
    assert np.allclose(vectors, raw / np.linalg.norm(raw, axis=1, keepdims=True))


def test_each_distinct_text_is_embedded_once():
    seen = []

    def function(texts):
        seen.extend(texts)
        return [[len(text), 1.0] for text in texts]

    vectors = unit_vectors(CallableEmbedder(function, "lengths"), ["aa", "b", "aa"])
    assert seen == ["aa", "b"]
    assert np.array_equal(vectors[0], vectors[2])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.ones((1, 3)), r"shape \(1, 3\) for 2 texts, expected \(2, 4\)"),
        (np.ones((2, 3)), r"shape \(2, 3\) for 2 texts, expected \(2, 4\)"),
        (np.ones(4), r"shape \(4,\)"),
        (np.array([[1.0, 0, 0, 0], [0, 0, 0, 0]]), "zero or non-finite vector for 'b'"),
        (np.array([[1.0, np.nan, 0, 0], [0, 1, 0, 0]]), "zero or non-finite vector for 'a'"),
        (np.array([[1.0, 0, 0, 0], [0, np.inf, 0, 0]]), "zero or non-finite vector for 'b'"),
    ],
)
def test_what_an_embedder_must_not_return_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        unit_vectors(returning(value), ["a", "b"], 4)


def test_a_bare_function_is_refused_for_it_has_no_name_to_check():
    with pytest.raises(ValueError, match=r"CallableEmbedder\(function, name\)"):
        as_embedder(lambda texts: texts)
    with pytest.raises(ValueError, match="needs a name"):
        CallableEmbedder(lambda texts: texts, "")


def test_a_name_is_a_sentence_transformers_model_that_is_not_loaded_yet():
    made = as_embedder("no/such-model")
    assert isinstance(made, SentenceTransformerEmbedder)
    assert made.name == "no/such-model"
    assert as_embedder(made) is made
    assert as_embedder(None).name == "sentence-transformers/all-MiniLM-L6-v2"


def test_a_dtype_is_part_of_the_encoders_name_and_float32_is_none(tmp_path):
    half = as_embedder(":bfloat16")
    assert (half.name, half.dtype) == ("sentence-transformers/all-MiniLM-L6-v2:bfloat16", "bfloat16")
    assert as_embedder(half.name).name == half.name  # an index opens the encoder of its name
    assert half.revision == as_embedder(None).revision
    whole = as_embedder("no/such-model:float32")
    assert (whole.name, whole.dtype) == ("no/such-model", "float32")
    with pytest.raises(ValueError, match="'no/such-model:bf16' ends with 'bf16', expected a dtype: float32, bfloat16"):
        as_embedder("no/such-model:bf16")
    folder = tmp_path / "encoder:v2"
    folder.mkdir()
    assert as_embedder(str(folder)).name == str(folder)


def test_an_encoder_in_bfloat16_runs_in_it_and_its_vectors_are_near():
    texts = ["Is this review positive?", "Translate to French: the cat sleeps.", "2 + 2 ="]
    half = SentenceTransformerEmbedder(":bfloat16")
    near, exact = unit_vectors(half, texts), unit_vectors(SentenceTransformerEmbedder(), texts)
    assert {str(parameter.dtype) for parameter in half._model.parameters()} == {"torch.bfloat16"}
    cosines = (near * exact).sum(axis=1)
    assert cosines.min() > 0.999
    assert cosines.max() < 1 - 1e-7  # the same to rounding would mean that it ran in float32


def test_the_representation_is_the_renormalised_mean_of_the_instructed_quarter():
    rows = np.array([[7, 7, 1, 0, 7, 7, 7, 7], [7, 7, 0, 1, 7, 7, 7, 7], [7, 7, 0, 1, 7, 7, 7, 7]], dtype=np.float32)
    assert np.allclose(representation(rows, "x"), np.array([1, 2]) / np.sqrt(5))


def test_examples_that_cancel_out_are_refused_by_name():
    with pytest.raises(ValueError, match="x: the embeddings of its examples are not finite or cancel out"):
        representation(np.array([[1, 0, 1, 0, 1, 0, 1, 0], [1, 0, -1, 0, 1, 0, 1, 0]], dtype=np.float32), "x")


@pytest.mark.parametrize(("device", "given", "asked"), [("cpu", None, 8), ("cuda", None, 32), ("cpu", 5, 5)])
def test_a_pass_on_a_cpu_has_few_texts_so_that_little_is_filled_up(device, given, asked):
    class Model:
        def encode(self, texts, *, batch_size, **_):
            return np.full((len(texts), 2), batch_size)

    embedder = SentenceTransformerEmbedder("a-model", device=device, batch_size=given)
    embedder._model = Model()  # in the place of the one that would be loaded
    assert (embedder(["one", "two"]) == asked).all()


@pytest.mark.real
def test_the_default_encoder_gives_the_same_unit_vectors_alone_and_in_a_batch():
    encoder = as_embedder(None)
    texts = ["Translate to German: a dog.", "Is this review positive?", "Hello"]
    together = unit_vectors(encoder, texts)
    assert together.shape == (3, encoder.dimension) == (3, 384)
    alone = np.concatenate([unit_vectors(encoder, [text]) for text in texts])
    assert np.allclose(together, alone, atol=1e-5)
    assert encoder.revision
