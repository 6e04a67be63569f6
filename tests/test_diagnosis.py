"""The doctor names what is missing and how to get it."""

from __future__ import annotations

from loracompose import diagnosis
from loracompose.retrieval.embedding import CallableEmbedder
from loracompose.retrieval.index import AdapterIndex
from tests.retrieval.material import TASKS, bag_of_words, make_adapter


def test_a_missing_package_is_a_problem_with_its_remedy(monkeypatch):
    monkeypatch.setattr(diagnosis, "PACKAGES", ("torch", "no-such-package"))
    found = {finding.subject: finding for finding in diagnosis.packages()}
    assert found["torch"].state == "ok"
    assert found["no-such-package"].state == "problem"
    assert found["no-such-package"].remedy == "pip install no-such-package"


def test_an_unknown_model_is_a_problem(tmp_path):
    assert diagnosis.model("base model", str(tmp_path / "nothing")).state == "problem"


def test_adapters_of_another_base_are_a_warning(tmp_path, monkeypatch):
    embedder = CallableEmbedder(bag_of_words, "bag-of-words", "1")
    for seed, (name, examples) in enumerate(TASKS.items()):
        make_adapter(tmp_path / "pool" / name, examples, seed)
    AdapterIndex.build(tmp_path / "pool", tmp_path / "index", embedder=embedder).close()
    opened = AdapterIndex.open
    monkeypatch.setattr(AdapterIndex, "open", lambda folder: opened(folder, embedder=embedder))
    health = list(diagnosis.index_health(tmp_path / "index", "some/other-base"))
    assert [finding.state for finding in health] == ["ok", "warning"]
    assert "tiny/base" in health[1].detail
