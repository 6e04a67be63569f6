"""What the documents say is what the code does: the table of methods, the links, and the snippets with their output."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import re
from pathlib import Path

import pytest

from loracompose import COMPOSERS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = sorted(p for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("index/*.md")])


def table_of_methods():
    rows = [
        line.strip("|").split("|") for line in README.splitlines() if line.startswith("| `") and line.count("|") == 7
    ]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[2:]] for cells in rows}


def test_the_table_of_methods_is_the_table_of_composers():
    said = {"yes": True, "no": False}
    documented = {n: (scope, said[e], said[g], source) for n, (scope, e, g, source) in table_of_methods().items()}
    assert documented == {n: (c.scope, c.exact, c.gauge_invariant, c.source) for n, c in COMPOSERS.items()}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_to_a_file_leads_somewhere(document):
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


def snippets():
    pattern = r"<!-- snippet: (\w+) -->\n```python\n(.*?)```\n(?:```text\n(.*?)```)?"
    return {name: (code, output) for name, code, output in re.findall(pattern, README, re.DOTALL)}


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
        if shown:
            assert printed.getvalue() == shown
    assert (tmp_path / "merged" / "recipe.json").is_file()


def test_the_table_of_the_lego_ablation_is_made_from_its_results():
    source = importlib.util.spec_from_file_location("lego_units", ROOT / "benchmarks" / "lego_units.py")
    lego_units = importlib.util.module_from_spec(source)
    source.loader.exec_module(lego_units)
    results = json.loads((ROOT / "benchmarks" / "results" / "lego_units.json").read_text(encoding="utf-8"))
    assert lego_units.report(results) in (ROOT / "docs" / "lego_units.md").read_text(encoding="utf-8")
