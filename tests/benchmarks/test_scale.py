from __future__ import annotations

import numpy as np

from loracompose.benchmarks.scale_search import Given
from loracompose.retrieval.embedding import CallableEmbedder, features
from loracompose.retrieval.tables import Settings


def test_prompts_that_are_embedded_already_have_the_features_they_were_given():
    rows = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    texts = ["Question: how many?\nAnswer briefly.", "Name the capital.\nOf France"]
    given = rows.reshape(2, 12)
    settings = Settings("synthetic", "1", 3, "Represent the sentence for similar task retrieval: ")
    found = features(CallableEmbedder(Given(given, texts), "synthetic", "1"), texts, settings)
    np.testing.assert_allclose(found, given, rtol=1e-6)
