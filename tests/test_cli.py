"""The commands do what they say, print JSON for machines, and report errors as one line with status 2."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
from typer.testing import CliRunner

from loracompose import AdapterIndex, load_adapter
from loracompose.cli import app
from loracompose.cli.generating import read_prompts
from tests.engines import build_pool, tokenizer, write_jsonl
from tests.tiny import base_model, relative_error

pytestmark = pytest.mark.real  # the index is built with the real encoder
QUESTION = "write a query that counts the rows"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny base model, a pool and its index, on disk."""
    folder = tmp_path_factory.mktemp("cli")
    base_model().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    build_pool(folder / "pool")
    run("index", "build", folder / "pool", folder / "index")
    return folder


def run(*arguments, status=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == status, result.output + result.stderr
    return result


def read(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


def test_search_finds_the_adapter_of_the_prompt(home):
    found = read("index", "search", home / "index", QUESTION, "-k", "2")[0]["found"]
    assert found[0]["name"] == "sql"
    assert len(found) == 2
    assert "sql" in run("index", "search", home / "index", QUESTION).stdout


def test_adapters_are_listed_added_updated_and_removed(home, tmp_path):
    run("index", "build", home / "pool", tmp_path / "index", "--copy")
    run("index", "remove", tmp_path / "index", "sums")
    assert [card["name"] for card in read("index", "list", tmp_path / "index")] == ["french", "mood", "sql"]
    run("index", "add", tmp_path / "index", home / "pool" / "sums")
    run("index", "add", tmp_path / "index", home / "pool" / "sums", "--update")
    assert len(read("index", "list", tmp_path / "index")) == 4
    assert read("index", "verify", tmp_path / "index") == {"ok": True, "problems": []}


def test_an_index_stays_with_the_encoder_and_the_dtype_that_it_was_built_with(home, tmp_path):
    run("index", "build", home / "pool", tmp_path / "index", "--encoder", ":bfloat16")
    found = read("index", "search", tmp_path / "index", QUESTION, "-k", "1")[0]["found"]
    assert found[0]["name"] == "sql"
    opened = AdapterIndex.open(tmp_path / "index")
    opened.search([QUESTION])
    assert opened.embedder.dtype == "bfloat16"
    with pytest.raises(ValueError, match=r"MiniLM-L6-v2:bfloat16' .*; their vectors do not compare"):
        AdapterIndex.open(tmp_path / "index", embedder="sentence-transformers/all-MiniLM-L6-v2")


def test_a_prompt_may_hold_any_character_of_json(tmp_path):
    prompts = ["one\u2028line", "and\x85another", "plain"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p}, ensure_ascii=False) + "\r\n" for p in prompts), newline="")
    assert read_prompts(file) == prompts


def test_an_adapter_behind_a_link_is_updated_by_the_name_of_the_link_and_its_tags_are_plain_text(home, tmp_path):
    shutil.copytree(home / "pool" / "sums", tmp_path / "elsewhere" / "sums-v2")
    card = tmp_path / "elsewhere" / "sums-v2" / "card.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "tags": ["[/x]", "[en]"]}))
    (tmp_path / "sums").symlink_to(tmp_path / "elsewhere" / "sums-v2")
    run("index", "build", home / "pool", tmp_path / "index")
    run("index", "add", tmp_path / "index", tmp_path / "sums", "--update")
    assert len(read("index", "list", tmp_path / "index")) == 4
    assert "[en]" in run("index", "list", tmp_path / "index").stdout


def test_adding_and_removing_speak_json(home, tmp_path):
    run("index", "build", home / "pool", tmp_path / "index")
    assert read("index", "remove", tmp_path / "index", "sums", "mood") == {"removed": ["sums", "mood"]}
    added = read("index", "add", tmp_path / "index", home / "pool" / "sums", home / "pool" / "mood")
    assert added == [{"name": n, "fingerprint": load_adapter(home / "pool" / n).fingerprint} for n in ("sums", "mood")]
    assert read("index", "add", tmp_path / "index", home / "pool" / "sums", "--update") == added[:1]


def test_a_build_that_indexes_nothing_fails_and_says_why(tmp_path):
    (tmp_path / "pool" / "notes").mkdir(parents=True)
    (tmp_path / "pool" / "[draft]").mkdir()
    told = "nothing was indexed: 2 subfolders looked at"
    result = run("index", "build", tmp_path / "pool", tmp_path / "index", status=1)
    assert told in result.stderr
    assert "notes: no adapter_config.json" in result.stderr
    assert "[draft]: no adapter_config.json" in result.stderr
    result = run("index", "build", tmp_path / "pool", tmp_path / "index", "--overwrite", "--json", status=1)
    assert sorted(json.loads(result.stdout)["skipped"]) == ["[draft]", "notes"]
    assert told in result.stderr
    (tmp_path / "none").mkdir()
    assert "0 subfolders" in run("index", "build", tmp_path / "none", tmp_path / "other", status=1).stderr


def test_verify_fails_when_an_adapter_has_changed(home, tmp_path):
    run("index", "build", home / "pool", tmp_path / "index", "--copy")
    config = next((tmp_path / "index").rglob("sql*/adapter_config.json"))
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    report = json.loads(run("index", "verify", tmp_path / "index", "--json", status=1).stdout)
    assert report["problems"][0]["adapter"] == "sql"
    assert "sql" in run("index", "verify", tmp_path / "index", status=1).stdout


def test_an_index_is_compacted_saved_restored_and_repaired(home, tmp_path):
    index, saved = tmp_path / "index", tmp_path / "saved"
    run("index", "build", home / "pool", index, "--copy")
    assert read("index", "snapshot", index, saved)["adapters"] == 4
    assert "adapters, 0.2 MB" in run("index", "snapshot", index, tmp_path / "again").stdout
    run("index", "remove", index, "sql")
    assert read("index", "compact", index)["deleted"] == []
    assert "leftovers deleted" in run("index", "compact", index).stdout.replace("\n", " ")
    assert read("index", "restore", saved, index) == {"ok": True, "problems": []}
    assert len(read("index", "list", index)) == 4
    (index / "adapters" / "0123456789ab").mkdir()
    shutil.rmtree(next(index.rglob("sql")))
    assert "missing" in run("index", "verify", index, status=1).stdout
    report = json.loads(run("index", "verify", index, "--repair", "--json", status=1).stdout)
    assert ([p["kind"] for p in report["mended"]], [p["kind"] for p in report["problems"]]) == (
        ["leftover"],
        ["missing"],
    )
    repaired = run("index", "verify", index, "--repair", "--look-in", home / "pool").stdout
    assert "1 mended" in repaired
    assert "ok" in repaired
    assert "belongs to --repair" in run("index", "verify", index, "--look-in", saved, status=2).stderr
    (saved / "snapshot.json").write_text("{}")
    assert "format version None" in run("index", "restore", saved, index, status=2).stderr


def test_generate_answers_a_mixed_batch_with_its_trace(home, tmp_path):
    file = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": QUESTION}, {"prompt": "add two and three"}])
    common = ("--index", home / "index", "--base", home / "base", "--max-new-tokens", "3")
    answers = read("generate", "--file", file, *common)
    assert [answer["adapters"][0]["name"] for answer in answers] == ["sql", "sums"]
    shown = run("generate", "--file", file, "--explain", *common).stdout
    assert "sql" in shown
    assert "weight" in shown


def test_generate_takes_sets_composers_and_their_settings(home):
    common = ("--base", home / "base", "--index", home / "index", "--max-new-tokens", "3")
    answer = read("generate", QUESTION, "--adapters", "sql=0.7,mood=0.3", "--composer", "fusion", *common)[0]
    assert {use["name"]: use["weight"] for use in answer["adapters"]} == {"sql": 0.7, "mood": 0.3}
    assert answer["composer"] == "Fusion()"
    assert read("generate", QUESTION, "--adapters", "", *common)[0]["adapters"] == []
    linear = read("generate", QUESTION, "--composer", "linear", "--set", "rank=2", *common)[0]
    assert linear["composer"] == "Linear(rank=2)"


def test_stream_prints_the_same_text(home):
    common = ("--base", home / "base", "--index", home / "index", "--max-new-tokens", "6", "--adapters", "sql")
    answer = read("generate", "a b c", *common)[0]
    assert run("generate", "a b c", "--stream", *common).stdout.strip() == answer["text"].strip()


def test_compose_writes_an_adapter_with_its_recipe(home, tmp_path):
    made = read("compose", home / "pool" / "sql", "mood", "-i", home / "index", "-w", "0.7,0.3", "-o", tmp_path / "out")
    merged = load_adapter(tmp_path / "out")
    assert made["fingerprint"] == merged.fingerprint
    assert [source["weight"] for source in made["sources"]] in ([0.7, 0.3], [0.3, 0.7])
    module = "model.layers.0.self_attn.q_proj"
    parts = [(w, load_adapter(home / "pool" / n).factors[module]) for n, w in (("sql", 0.7), ("mood", 0.3))]
    want = sum(w * (f.B @ f.A) for w, f in parts)
    assert relative_error(merged.factors[module].B @ merged.factors[module].A, want) < 1e-5
    assert "relative error" in run("compose", home / "pool" / "sql", "-o", tmp_path / "two").stdout


def test_compose_takes_from_an_index_what_was_entered_and_no_name_from_the_working_directory(
    home, tmp_path, monkeypatch
):
    closed = []
    monkeypatch.setattr(AdapterIndex, "close", lambda index: closed.append(index.folder))
    run("index", "build", home / "pool", tmp_path / "index", "--copy")
    monkeypatch.chdir(home / "pool")
    common = ("-i", tmp_path / "index", "-o", tmp_path / "out")
    run("index", "remove", tmp_path / "index", "mood")
    message = run("compose", "sql", "mood", *common, status=2).stderr
    assert "no adapter 'mood': the index has" in message
    assert "./mood" in message
    assert "the index has sql" in run("compose", "sqll", *common, status=2).stderr
    config = next((tmp_path / "index").rglob("sql*/adapter_config.json"))
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    assert "its files were changed" in run("compose", "sql", "french", *common, status=2).stderr
    assert not (tmp_path / "out").exists()
    made = read("compose", "french", "./mood", "french", *common)
    assert [source["name"] for source in made["sources"]].count("mood") == 1
    assert closed.count(tmp_path / "index") == 4


def test_names_and_paths_in_brackets_are_shown_as_they_are(home, tmp_path):
    pool, index, out = tmp_path / "[blue]pool", tmp_path / "[red]index", tmp_path / "[bold]out"
    shutil.copytree(home / "pool" / "sql", pool / "[en]sql")
    shown = run("index", "build", pool, index).stdout
    assert "[red]index: 1 adapters" in shown
    assert "[blue]pool" in shown
    assert "[red]index: [en]sql removed" in run("index", "remove", index, "[en]sql").stdout
    assert "[red]index: [en]sql added" in run("index", "add", index, pool / "[en]sql").stdout
    assert "[red]index: " in run("index", "compact", index).stdout
    assert "[bold]out: 1 adapters" in run("index", "snapshot", index, out).stdout
    shown = "".join(run("compose", "[en]sql", "-i", index, "-o", tmp_path / "[dim]made").stdout.split())
    assert "[en]sql" in shown
    assert "[dim]made:" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate",), "no prompt"),
        (("generate", "x", "--composer", "lora"), "no composer named 'lora'"),
        (("generate", "x", "--composer", "mixture", "--set", "k=3"), "has no settings"),
        (("generate", "x", "--index", "nowhere"), "nowhere"),
        (("generate", "a", "b", "--stream", "--adapters", ""), "one answer"),
        (("generate", "a", "--stream", "--json", "--adapters", ""), "--json"),
        (("generate", "a", "--stream", "--explain", "--adapters", ""), "--explain: --stream prints"),
        (("generate", "a", "--stream", "--batch-size", "2", "--adapters", ""), "--batch-size: --stream prints"),
        (("generate", "a", "--stream", "--batch-size", "0", "--adapters", ""), "--batch-size: --stream prints"),
        (("generate", "a", "--stream", "--batch-tokens", "0", "--adapters", ""), "--batch-tokens: --stream prints"),
        (("generate", "a", "--adapters", "", "--seed", "1"), "add --sample"),
        (("compose", "a", "b", "-o", "out", "-w", "1,x"), "one number per adapter"),
        (("generate", "x", "--adapters", "a=1,b"), "every adapter a weight"),
        (("generate", "x", "--adapters", "a=b"), "--adapters 'a=b'"),
        (("index", "search", "nowhere", "x"), "nowhere"),
        (("compose", "nowhere", "-o", "out"), "nowhere"),
    ],
)
def test_errors_are_one_line_without_a_traceback(home, arguments, message):
    base = ("--base", home / "base") if arguments[0] == "generate" else ()
    result = run(*arguments, *base, status=2)
    assert message in result.stderr
    assert "Traceback" not in result.stderr + result.stdout


def test_doctor_reports_versions_models_and_index(home):
    report = read("doctor", "--index", home / "index", "--base", home / "base")
    subjects = {finding["subject"]: finding["state"] for finding in report["findings"]}
    assert subjects["torch"] == subjects["encoder"] == subjects["base model"] == subjects["index"] == "ok"
    assert "mixture" in report["composers"]
    broken = run("doctor", "--index", home / "nowhere", "--base", home / "base", status=1)
    assert "problem" in broken.stdout


def test_train_writes_an_adapter_that_the_index_takes(home, tmp_path):
    rows = [{"prompt": f"add {i} and 1", "response": str(i + 1)} for i in range(24)]
    data, dev = write_jsonl(tmp_path / "train.jsonl", rows), write_jsonl(tmp_path / "dev.jsonl", rows[:4])
    common = ("--base", home / "base", "-r", "2", "--steps", "3", "--batch-size", "4", "--targets", "q_proj,o_proj")
    report = read("train", "adapter", data, "-o", tmp_path / "pool" / "plus", "--dev", dev, *common)
    assert report["steps"] == len(report["losses"]) == 3
    assert report["dev_loss"] > 0
    trained = load_adapter(tmp_path / "pool" / "plus", base=base_model())
    assert {module.rsplit(".", 1)[1] for module in trained.factors} == {"q_proj", "o_proj"}
    assert read("index", "build", tmp_path / "pool", tmp_path / "index")["added"] == ["plus"]
    again = run("train", "adapter", data, "-o", tmp_path / "pool" / "plus", *common, status=2)
    assert "exists" in again.stderr


def test_beamlora_is_trained_and_tells_its_events(home, tmp_path):
    data = write_jsonl(tmp_path / "train.jsonl", [{"prompt": f"add {i}", "response": str(i + 1)} for i in range(24)])
    common = ("train", "adapter", data, "--base", home / "base", "-r", "4", "--steps", "8", "--batch-size", "4")
    beam = ("--method", "beam", "--beam-threshold", "0.5", "--beam-period", "2")
    report = read(*common, "-o", tmp_path / "a", *beam)
    assert [event["step"] for event in report["events"]] == [2, 4]
    assert all(event["replaced"] for event in report["events"])
    assert load_adapter(tmp_path / "a", base=base_model()).factors
    assert "after step 2" in run(*common, "-o", tmp_path / "b", *beam).stdout
    assert read(*common, "-o", tmp_path / "c")["events"] == []
    refused = run(*common, "-o", tmp_path / "d", "--beam-period", "2", status=2)
    assert "belong to --method beam" in refused.stderr
    assert not (tmp_path / "d").exists()


def test_json_shows_prompts_as_they_are(home):
    prompt = ":smile: [red]x[/red] ünï"
    answer = read("generate", prompt, "--adapters", "", "--base", home / "base", "--max-new-tokens", "2")[0]
    assert answer["prompt"] == prompt
    shown = run("generate", prompt, "--adapters", "", "--base", home / "base", "--max-new-tokens", "2").stdout
    assert ":smile: [red]x[/red] ünï" in shown


def test_sampling_with_a_seed_is_repeatable(home):
    common = ("generate", "a b", "--adapters", "", "--base", home / "base", "--max-new-tokens", "12", "--sample")
    first, again = (read(*common, "--seed", "7", "--temperature", "3.0")[0]["text"] for _ in range(2))
    assert first == again
    assert first != read(*common, "--seed", "8", "--temperature", "3.0")[0]["text"]


def test_the_version_is_told():
    assert run("--version").stdout.strip()


def test_a_router_is_trained_and_answers_with_it(home, tmp_path):
    names = ("french", "sql", "mood", "sums")
    rows = [{"prompt": f"{name} {i}", "response": name, "task": name} for name in names for i in range(3)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    base, adapters = ("--base", home / "base"), ("--adapters", home / "index")
    training = ("train", "router", data, *base, *adapters, "--method", "lora_flow", "--steps", "2", "--batch-size", "4")
    options = ("--members", "retrieved", "-k", "2", "--adapter-dropout", "0.5", "--set", "task=sql")
    report = read(*training, *options, "--dev", data, "-o", tmp_path / "flow")
    assert report["steps"] == len(report["losses"]) == 2
    assert report["dev_loss"] == report["dev_losses"]["2"]
    asked = ("generate", QUESTION, *base, "--index", home / "index", "--max-new-tokens", "2")
    learned = ("--composer", "lora_flow", "--router", tmp_path / "flow")
    assert report["fingerprint"][:12] in read(*asked, *learned)[0]["composer"]
    assert "temperature=0.5" in read(*asked, *learned, "--set", "temperature=0.5")[0]["composer"]
    assert "give it a router" in run(*asked, "--composer", "lora_flow", status=2).stderr
    assert "learns nothing" in run(*training, "--method", "mixture", "-o", tmp_path / "m", status=2).stderr
    assert "has no setting tsk" in run(*training, "--set", "tsk=1", "-o", tmp_path / "m", status=2).stderr
    told = run(*training, "-o", tmp_path / "again").stdout
    assert "2 steps on 12 examples" in " ".join(told.split())


def test_a_server_says_what_it_lacks(home, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    said = run("serve", "-i", home / "index", status=2).stderr
    assert "a server needs uvicorn: pip install 'loracompose[server]'" in said
