"""What the documents say is what the code does: the table of methods, the links, and the snippets with their output."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from fastapi.testclient import TestClient

from loracompose import COMPOSERS, Adapter, AdapterIndex, Engine, LoraFactors, compose
from loracompose.composers import Composer, get_composer
from loracompose.marked import fill
from loracompose.serving.app import create_app
from loracompose.serving.messages import ChatRequest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
ROOMS = ("docs", "index", "tests", "benchmarks", "loracompose")
DOCUMENTS = sorted(p for p in [*ROOT.glob("*.md"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.md"))])


def table_of_methods():
    rows = [
        line.strip("|").split("|") for line in README.splitlines() if line.startswith("| `") and line.count("|") == 7
    ]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[2:]] for cells in rows}


def test_the_table_of_methods_is_the_table_of_composers():
    said = {"yes": True, "no": False}
    documented = {n: (scope, said[e], said[g], source) for n, (scope, e, g, source) in table_of_methods().items()}
    assert documented == {n: (c.scope, c.exact, c.gauge_invariant, c.source) for n, c in COMPOSERS.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def snippets():
    pattern = r"<!-- snippet: (\w+) -->\n```python\n(.*?)```\n(?:```text\n(.*?)```)?"
    return {name: (code, output) for name, code, output in re.findall(pattern, README, re.DOTALL)}


def test_the_quickstart_shows_what_it_prints():
    assert snippets()["quickstart"][1].count("\n") == 3  # one line for each of its prompts


def example_composer():
    block = re.search(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    assert block is not None
    return block[1]


def test_the_example_composer_runs_as_it_stands(monkeypatch):
    example = ModuleType("drop_small")
    monkeypatch.setitem(sys.modules, "drop_small", example)  # dataclass looks its module up
    exec(compile(example_composer(), "drop_small", "exec"), example.__dict__)
    composer = get_composer(example.DropSmall(floor=0.5))
    assert isinstance(composer, Composer)
    eye = torch.eye(2, dtype=torch.float64)
    merged = compose([Adapter("a", {"m": LoraFactors(eye, eye)})], [2.0], example.DropSmall(floor=1.0))
    assert torch.equal(merged.factors["m"].B @ merged.factors["m"].A, 2 * eye)
    sizes = torch.tensor([[4.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    merged = compose([Adapter("b", {"m": LoraFactors(eye, sizes)})], [1.0], composer)
    assert merged.factors["m"].rank == 1  # the rank of a quarter of the size is switched off
    assert merged.recipe["hyper_parameters"] == {"floor": 0.5}


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=" ".join)
def test_the_example_composer_passes_the_linter(command):
    place = ["--stdin-filename", "loracompose/composers/drop_small.py", "-"]
    ruff = subprocess.run(
        [sys.executable, "-m", "ruff", *command, *place],
        input=example_composer(),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert ruff.returncode == 0, ruff.stdout + ruff.stderr


@pytest.mark.real
def test_the_snippets_of_the_readme_run_and_print_what_they_show(tmp_path, monkeypatch):
    (tmp_path / "index").mkdir()
    (tmp_path / "index" / "pool").symlink_to(ROOT / "index" / "pool")
    monkeypatch.chdir(tmp_path)
    names = {}
    found = snippets()
    assert set(found) == {"quickstart", "more"}
    for name in ("quickstart", "more"):
        code, shown = found[name]
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, name, "exec"), names)
        if name == "quickstart":  # the other streams, and shows no output
            assert printed.getvalue() == shown
    assert (tmp_path / "merged" / "recipe.json").is_file()


def script(name):
    source = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    return module


def test_the_tables_of_learned_methods_are_made_from_their_results():
    learned_report = script("learned_report")
    text = learned_report.DOCUMENT.read_text(encoding="utf-8")
    assert fill(text, {learned_report.BLOCK: learned_report.report()}) == text


def test_the_tables_of_response_losses_are_made_from_their_results():
    losses = script("response_loss_report")
    for document in (losses.DOCUMENT, losses.README):
        assert losses.filled(document) == document.read_text(encoding="utf-8")


def test_a_lower_loss_is_a_gain_and_claims_are_told_by_their_intervals():
    losses = script("response_loss_report")
    tasks, jitter = ["a", "b"] * 20, [0.01 * (i % 7) for i in range(40)]
    dropout = {p: [1.0 if task == "b" else 9.0 for task in tasks] for p in losses.PROTOCOLS}
    none = [2.0 + j if task == "b" else 1.0 for task, j in zip(tasks, jitter, strict=True)]
    methods = {
        "lora_flow": {p: [1.0 + j for j in jitter] for p in losses.PROTOCOLS},
        "cat": {"in-domain": [2.0 + j for j in jitter[::-1]], "masked": [0.5 + j for j in jitter[::-1]]},
        losses.DROPOUT: dropout,
        losses.NO_DROPOUT: dict.fromkeys(losses.PROTOCOLS, none),
    }
    found = losses.scores({"about": {"tasks": tasks, "unseen": ["b"]}, "methods": methods})
    told = losses.claimed("claim", "lora_flow", "cat", found)
    assert told.startswith("| claim | +1.0")
    assert told.endswith("| confirmed in-domain, refuted masked |")
    (dropout,) = (claim for claim in losses.CLAIMS if claim[1] == losses.DROPOUT)
    assert losses.claimed(*dropout, found).endswith("| confirmed |")  # on the tasks that were not seen alone
    assert losses.claimed("claim", "lora_flow", "mole", found) == ""


def test_the_tables_of_speed_are_made_from_their_results():
    speed_report = script("speed_report")
    for document in speed_report.DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        assert speed_report.filled(document, text) == text


def test_the_table_of_the_lego_ablation_is_made_from_its_results():
    lego_units = script("lego_units")
    results = json.loads((ROOT / "benchmarks" / "results" / "lego_units.json").read_text(encoding="utf-8"))
    assert lego_units.report(results) in (ROOT / "docs" / "lego_units.md").read_text(encoding="utf-8")


def test_the_tables_of_encoders_and_of_kinds_are_made_from_their_results():
    retriever_report = script("retriever_report")
    text = retriever_report.DOCUMENT.read_text(encoding="utf-8")
    assert retriever_report.filled(text) == text


RETRIEVAL_ROWS = {
    "BM25 over the example prompts": "bm25",
    "mean, as in LoraRetriever's code": "mean, as in the paper's code",
    "renormalised mean, instructed": "mean",
    "meaning: a closed-form discriminant": "meaning",
    "edges: the same on openings and closings": "edges",
    "wording: evidence of n-grams": "wording",
    "shape: sentences, words and marks of the subject": "shape",
    "the first three channels": "meaning + edges + wording",
    "**hybrid of the four, the default**": "hybrid",
}

RETRIEVAL_DOC_ROWS = {
    "meaning": "meaning",
    "shape": "shape",
    "meaning and shape": "meaning + shape",
    "without shape": "meaning + edges + wording",
    "all four": "hybrid",
}


def test_the_retrieval_pages_numbers_are_those_of_the_results():
    results = [
        json.loads((ROOT / "benchmarks" / "results" / f"retrieval_{name}.json").read_text())
        for name in ("flan48", "tasks", "tasks_60")
    ]
    page = (ROOT / "docs" / "retrieval.md").read_text(encoding="utf-8").split("own adapter first", 1)[1]
    for title, scoring in RETRIEVAL_DOC_ROWS.items():
        flan48, *tasks = [result["scorings"][scoring] for result in results]
        parts = [flan48["all"], *(task[part] for task in tasks for part in ("seen", "unseen"))]
        cells = " | ".join(f"{part['hit']['1']['share']:.1f}" for part in parts)
        assert f"| {title} | {cells} |" in page


def test_the_readmes_retrieval_numbers_are_those_of_the_results():
    results = [
        json.loads((ROOT / "benchmarks" / "results" / f"retrieval_{name}.json").read_text())
        for name in ("flan48", "tasks", "tasks_60")
    ]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in README.splitlines() if line[:2] == "| "]
    table = {cells[0]: cells[1:] for cells in rows if cells[0] in RETRIEVAL_ROWS}
    assert set(table) == set(RETRIEVAL_ROWS)
    for title, scoring in RETRIEVAL_ROWS.items():
        flan48, *tasks = [result["scorings"][scoring] for result in results]
        expected = [flan48["all"]["hit"][k]["share"] for k in ("1", "3", "5", "8")]
        expected += [task[part]["hit"]["1"]["share"] for task in tasks for part in ("seen", "unseen")]
        assert table[title] == [f"{share:.1f}" for share in expected], title


@pytest.mark.real
def test_the_server_answers_as_its_page_shows(tmp_path):
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    sent = re.search(r"<!-- request -->\n```console\n.*? -d '(.*?)'\n```", page, re.DOTALL)
    shown = re.search(r"<!-- response -->\n```json\n(.*?)```", page, re.DOTALL)
    assert sent is not None
    assert shown is not None
    AdapterIndex.build(ROOT / "index" / "pool", tmp_path / "index").close()
    with Engine.from_pretrained(index=tmp_path / "index") as engine, TestClient(create_app(engine)) as client:
        found = client.post("/v1/chat/completions", json=json.loads(sent[1])).json()
    assert comparable(json.loads(shown[1])) == comparable(found)


def comparable(completion):
    """A completion without what differs from run to run, rounded as the page shows it."""
    trace = completion["loracompose"]
    adapters = [
        (use["name"], use["fingerprint"][:12], round(use["score"], 1) + 0.0, round(use["weight"], 3))
        for use in trace["adapters"]
    ]
    stages = set(trace["timings"])
    rest = {key: value for key, value in trace.items() if key not in ("adapters", "timings", "from_cache")}
    kept = {key: completion[key] for key in ("object", "model", "choices", "usage")}
    return {**kept, "adapters": adapters, "stages": stages, **rest}


def test_the_servers_page_names_every_field_of_a_request():
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    fields = re.findall(r"^\| (`.*?) \|", page, re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(fields))) == set(ChatRequest.model_fields)
