"""The harness on a tiny model: equal sets, resumed runs, and costs, through the real engine."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from loracompose import AdapterIndex, running
from loracompose.composers.base import Pool
from loracompose.composers.fusion import Fusion
from loracompose.composers.linear import Linear
from loracompose.composers.mixture import Mixture
from loracompose.composers.mole import Mole
from loracompose.composers.selection import Selection
from loracompose.composition.bank import content_order, gather_banks
from loracompose.composition.router import save_router
from loracompose.evaluation import harness
from loracompose.evaluation.answering import Job, RowBudget, batches, token_budgets
from loracompose.evaluation.cache import AnswerCache
from loracompose.evaluation.harness import Plan, evaluate
from loracompose.evaluation.methods import Question
from loracompose.evaluation.protocols import PROTOCOLS
from loracompose.evaluation.specification import parse_methods
from tests.evaluation.material import CLUSTERS, build_engine, solved_rows, task_rows
from tests.retrieval.material import TASKS
from tests.tiny import peft_adapter

METHODS = (
    "base",
    "oracle",
    "random",
    "uniform_all",
    "few_shot shots=1",
    "mixture",
    "lego weighting=uniform",
    "lorauter",
)
QUICK = {"n": 2, "max_new_tokens": 6, "batch_size": 5, "timed_rows": 0}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    with build_engine(tmp_path_factory.mktemp("harness")) as made:
        yield made


def plan(methods=METHODS, protocols=("in-domain", "masked"), **changed):
    return Plan(parse_methods(methods), tuple(PROTOCOLS[name] for name in protocols), **{**QUICK, **changed})


def run(engine, folder, the_plan=None, rows=None):
    with AnswerCache(folder / "kept.sqlite") as cache:
        return evaluate(engine, rows or task_rows(), the_plan or plan(), cache, solved_rows(), validation=solved_rows())


def timeless(results):
    """Results without the times that they took."""
    return [
        (p.name, p.rows, p.top, p.place, [(m.label, m.composer, m.scores, m.added_bytes) for m in p.methods])
        for p in results.protocols
    ]


def test_every_method_answers_every_row_of_every_protocol(engine, tmp_path):
    results = run(engine, tmp_path)
    assert [protocol.name for protocol in results.protocols] == ["in-domain", "masked"]
    for protocol in results.protocols:
        assert [row.task for row in protocol.rows] == sorted([*CLUSTERS] * 2)
        assert [method.label for method in protocol.methods] == list(METHODS)
        for method in protocol.methods:
            assert all(score is not None and 0 <= score <= 100 for score in method.scores)
    assert results.pool == {card.name: card.fingerprint for card in engine.index.cards}


def test_an_interrupted_run_continues_where_it_stopped_and_ends_the_same(engine, tmp_path, monkeypatch):
    asked = []
    generate = type(engine).generate

    def counted(self, prompts, *, adapters, composer, **kwargs):
        if len(asked) == 3:
            asked.append(None)
            raise KeyboardInterrupt
        answers = generate(self, prompts, adapters=adapters, composer=composer, **kwargs)
        asked.append([(str(p), str(a), repr(composer)) for p, a in zip(prompts, adapters, strict=True)])
        return answers

    monkeypatch.setattr(type(engine), "generate", counted)
    with pytest.raises(KeyboardInterrupt):
        run(engine, tmp_path)
    before = [question for batch in asked[:3] for question in batch]
    with AnswerCache(tmp_path / "kept.sqlite") as cache:
        assert len(cache) == len(before) == 13  # 5 and 3 rows of the base, 5 of the oracle
    resumed = run(engine, tmp_path)
    every = before + [question for batch in asked[4:] for question in batch]
    assert len(every) == len(set(every))  # no row twice, in no protocol
    again = run(engine, tmp_path)
    assert len(every) == sum(len(batch) for batch in asked if batch)
    (tmp_path / "whole").mkdir()
    assert timeless(resumed) == timeless(run(engine, tmp_path / "whole")) == timeless(again)


def test_one_more_method_costs_only_itself(engine, tmp_path, monkeypatch):
    run(engine, tmp_path, plan(["mixture"]))
    composers = []
    generate = type(engine).generate

    def noted(self, prompts, *, composer, **kwargs):
        composers.append(composer.name)
        return generate(self, prompts, composer=composer, **kwargs)

    monkeypatch.setattr(type(engine), "generate", noted)
    run(engine, tmp_path, plan(["mixture", "arrow"]))
    assert set(composers) == {"arrow"}


def test_a_selection_costs_nothing_where_its_winner_was_asked_before_and_scores_as_selection_does(engine, tmp_path):
    def asked(*methods):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        (found,) = run(engine, folder, plan(["mixture k=1", *methods], ["in-domain"])).protocols
        with AnswerCache(folder / "kept.sqlite") as cache:
            return len(cache), {method.label: method for method in found.methods}

    alone, _ = asked()
    flat = "selection weighting=softmax temperature=50"  # its weights are not those of one adapter
    count, found = asked(flat, "fusion k=1", "linear k=1")
    assert count == alone
    assert found[flat].scores == found["mixture k=1"].scores
    assert found[flat].composer == "Selection()"
    assert asked("rank_gating k=1 set.m=1")[0] == alone + 8  # which is not what it is alone
    assert asked("linear k=1 set.rank=1")[0] == alone + 8  # which cuts the adapter
    assert asked("selection weighting=uniform")[0] == alone + 8  # which of equals wins, only the composer knows


@pytest.mark.parametrize("composer", [Selection(), Linear(), Fusion()])
def test_one_adapter_alone_composes_to_what_its_answer_is_kept_as(engine, composer):
    adapters = [engine.store.get(engine.index.path(name)) for name in ("french", "sql")]
    banks = gather_banks(adapters)
    weights = torch.tensor([[0.0, 1.0]])
    for module, delta in composer.compose(banks, weights).items():
        plain = Mixture().compose(banks, weights)[module]
        for one in (delta, plain):
            assert one.gate is None
        got, want = ((d.B * d.weights) @ d.A for d in (delta, plain))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_an_adapter_changed_during_a_run_ends_it_and_no_answer_is_kept_under_its_old_name(tmp_path, monkeypatch):
    answers = harness._run

    def meanwhile(*given):
        shutil.rmtree(tmp_path / "pool" / "sql")
        peft_adapter(tmp_path / "pool", "sql", seed=77, scale=3.0, examples=TASKS["sql"], r=4)
        with AdapterIndex.open(tmp_path / "index", embedder=engine.index.embedder) as theirs:
            theirs.update(tmp_path / "pool" / "sql")
        answers(*given)

    with build_engine(tmp_path) as engine:
        monkeypatch.setattr(harness, "_run", meanwhile)
        asked = replace(plan(["oracle"], ["in-domain"]), tasks=("sql",))
        with pytest.raises(RuntimeError, match=r"adapter 'sql' is now .* run the evaluation again"):
            run(engine, tmp_path, asked)
        with AnswerCache(tmp_path / "kept.sqlite") as cache:
            assert len(cache) == 2  # of the base alone


@pytest.mark.parametrize("weighting", ["posterior", "uniform", "softmax temperature=1", "cautious", "top1"])
def test_where_a_protocol_leaves_no_adapter_to_any_row_the_base_answers(tmp_path, weighting):
    with build_engine(tmp_path) as engine:
        for name in ("french", "mood", "sums"):
            engine.index.remove(name)
        asked = replace(plan([f"mixture weighting={weighting}"], ["masked"]), tasks=("sql",))
        (found,) = run(engine, tmp_path, asked).protocols
    scores = {method.label: method.scores for method in found.methods}
    assert scores[f"mixture weighting={weighting}"] == scores["base"]


def test_methods_use_what_the_protocol_leaves_them(engine, tmp_path, monkeypatch):
    seen = []
    generate = type(engine).generate

    def noted(self, prompts, *, adapters, **kwargs):
        seen.extend(zip(prompts, adapters, strict=True))
        return generate(self, prompts, adapters=adapters, **kwargs)

    monkeypatch.setattr(type(engine), "generate", noted)
    run(engine, tmp_path, plan(["random", "uniform_all", "mixture", "base", "oracle"], ["cluster-masked"]))
    cluster = {row.prompt: row.cluster for row in task_rows()}
    own = {row.prompt: row.task for row in task_rows()}
    for prompt, adapters in seen:
        if set(adapters) == {own[prompt]}:
            continue  # the oracle, which no mask concerns
        assert not {name for name in adapters if CLUSTERS[name] == cluster[prompt]}
    assert sum(set(adapters) == {own[prompt]} for prompt, adapters in seen) == 8


def test_tasks_that_are_not_asked_still_hide_their_clusters_adapters(engine, tmp_path):
    (found,) = run(engine, tmp_path, plan(["mixture"], ["cluster-masked"], tasks=("french",))).protocols
    assert {row.task for row in found.rows} == {"french"}
    assert set(found.top) <= {"sql", "sums"}


def test_a_method_that_learned_is_one_more_line(engine, tmp_path):
    cards = {card.name: card for card in engine.index.cards}
    adapters = [engine.store.get(engine.index.path(name), name=name) for name in cards]
    adapters = [adapters[i] for i in content_order(adapters)]
    banks = gather_banks(adapters)
    start = Mole.initial(Pool("tiny", 32, tuple(a.name for a in adapters), banks), 0, {})
    save_router(start, tmp_path / "mole")
    (found,) = run(engine, tmp_path, plan([f"mole weighting=uniform router={tmp_path / 'mole'}"], ["masked"])).protocols
    learned = found.methods[-1]
    assert learned.label == "mole weighting=uniform"
    assert start.fingerprint[:12] in learned.composer
    assert None not in learned.scores
    ranks = run(engine, tmp_path, plan(["mixture weighting=uniform"], ["masked"])).protocols[0].methods[-1].added_bytes
    assert learned.added_bytes == ranks + sum(tensor.nbytes for tensor in start.tensors.values())


def test_places_and_costs_are_those_of_the_rows(engine, tmp_path):
    in_domain, masked = run(engine, tmp_path).protocols
    assert set(masked.place) == {None}
    assert in_domain.place.count(1) >= 6
    assert [row.task for row, place in zip(in_domain.rows, in_domain.place, strict=True) if place == 1] == [
        top for top, place in zip(in_domain.top, in_domain.place, strict=True) if place == 1
    ]
    cost = {method.label: method.added_bytes for method in in_domain.methods}
    sizes = [engine.store.get(engine.index.path(name)).nbytes for name in CLUSTERS]
    assert cost["base"] == cost["few_shot shots=1"] == 0
    assert cost["uniform_all"] == sum(sizes)
    assert cost["oracle"] == round(sum(sizes) / 4)


def test_the_mixed_stream_is_run_and_gives_the_same_scores(engine, tmp_path):
    both = run(engine, tmp_path, plan(["mixture weighting=uniform"], ["in-domain", "mixed"]))
    plain, mixed = both.protocols
    with AnswerCache(tmp_path / "kept.sqlite") as cache:
        assert len(cache) == 2 * 3 * 8

    def by_row(protocol):
        return [dict(zip((r.id for r in protocol.rows), m.scores, strict=True)) for m in protocol.methods]

    assert by_row(plain) == by_row(mixed)


def test_a_task_without_adapter_has_no_oracle(engine, tmp_path):
    rows = [replace(row, task="letters") if row.task == "sums" else row for row in task_rows()]
    (protocol,) = run(engine, tmp_path, plan(["mixture"], ["masked"]), rows).protocols
    oracle = next(method for method in protocol.methods if method.label == "oracle")
    missing = {row.task for row, score in zip(protocol.rows, oracle.scores, strict=True) if score is None}
    assert missing == {"letters"}


def test_the_score_is_that_of_the_answer_against_the_reference(engine, tmp_path):
    row = task_rows()[3]  # of sql, by exact match
    said = engine.generate([row.prompt], adapters=[[]], max_new_tokens=6)[0].text
    scores = []
    for reference in (said, f"{said} not"):
        folder = tmp_path / str(len(scores))
        (protocol,) = run(engine, folder, plan(["base"], ["in-domain"]), [replace(row, response=reference)]).protocols
        scores.append({method.label: method.scores for method in protocol.methods}["base"])
    assert scores == [(100.0,), (0.0,)]


def test_methods_are_timed_on_answers_of_one_length_that_are_not_kept(engine, tmp_path, monkeypatch):
    untimed = run(engine, tmp_path, plan(["mixture"], ["masked"])).protocols[0]
    asked = []
    generate = type(engine).generate

    def noted(self, prompts, **kwargs):
        asked.append((len(prompts), kwargs["min_new_tokens"], kwargs["max_new_tokens"], kwargs["composer"].name))
        return generate(self, prompts, **kwargs)

    monkeypatch.setattr(type(engine), "generate", noted)
    timed = run(engine, tmp_path, plan(["mixture"], ["masked"], timed_rows=3)).protocols[0]
    assert asked == [(3, 16, 16, "mixture")] * 6  # base, oracle and mixture, twice each
    assert [method.scores for method in timed.methods] == [method.scores for method in untimed.methods]
    assert all(method.ms is None for method in untimed.methods)
    assert all(method.ms > 0 for method in timed.methods)


def test_the_rows_that_are_timed_are_spread_over_the_tasks(engine, tmp_path, monkeypatch):
    rows = task_rows()
    asked = []
    generate = type(engine).generate

    def noted(self, prompts, **kwargs):
        asked.append(list(prompts))
        return generate(self, prompts, **kwargs)

    run(engine, tmp_path, plan(["base"], ["in-domain"], n=None))
    monkeypatch.setattr(type(engine), "generate", noted)
    tasks = {row.task for row in rows}
    run(engine, tmp_path, plan(["base"], ["in-domain"], n=None, timed_rows=len(tasks)))
    of = {row.prompt: row.task for row in rows}
    assert asked
    assert all({of[prompt] for prompt in batch} == tasks for batch in asked)


def test_results_say_which_code_made_them(engine, tmp_path, monkeypatch):
    package = tmp_path / "package"
    package.mkdir()
    (package / "one.py").write_text("x = 1\n")
    monkeypatch.setattr("loracompose.evaluation.harness.PACKAGE", package)
    first = run(engine, tmp_path, plan(["base"], ["in-domain"])).versions["source"]
    assert run(engine, tmp_path, plan(["base"], ["in-domain"])).versions["source"] == first
    (package / "one.py").write_text("x = 2\n")
    assert run(engine, tmp_path, plan(["base"], ["in-domain"])).versions["source"] != first


def test_each_row_stops_at_its_own_budget():
    stop = RowBudget([1, 3])
    assert [stop(torch.zeros(2, 7 + new), None).tolist() for new in (1, 2, 3)] == [
        [True, False],
        [True, False],
        [True, True],
    ]


def test_rows_of_different_budgets_share_a_batch(engine, tmp_path, monkeypatch):
    widths = []
    decode = running._decode

    def noted(base, answers):
        widths.extend((row != 0).sum().item() for row in answers)
        return decode(base, answers)

    monkeypatch.setattr(running, "_decode", noted)
    monkeypatch.setattr(harness, "token_budgets", lambda *_: {"french": 2, "mood": 4, "sql": 3, "sums": 1})
    run(engine, tmp_path, plan(["base"], ["mixed"], batch_size=20))
    assert sorted(set(widths)) == [1, 2, 3, 4]


def test_short_answers_do_not_wait_for_long_ones_except_in_the_mixed_stream():
    jobs = [Job(str(i), Question("p"), budget, frozenset()) for i, budget in enumerate((90, 9, 40, 10, 18, 19))]

    def budgets(size, mixed):
        return [[job.budget for job in batch] for batch in batches(jobs, [1] * 6, size, mixed)]

    assert budgets(9, mixed=False) == [[9, 10], [18, 19], [40], [90]]
    assert budgets(1, mixed=False) == [[9], [10], [18], [19], [40], [90]]
    assert budgets(4, mixed=True) == [[90, 9, 40, 10], [18, 19]]
    assert list(batches([], [], 4, mixed=False)) == []


def test_prompts_of_like_length_run_together_whatever_their_tasks_unless_their_sets_are_kept():
    sets = ("b", "a", "b", "a")
    jobs = [Job(str(i), Question("p", {name: 1.0}), 9, frozenset()) for i, name in enumerate(sets)]

    def keys(by_set):
        return [[job.key for job in batch] for batch in batches(jobs, [4, 1, 2, 3], 2, False, by_set)]

    assert keys(by_set=False) == [["1", "2"], ["3", "0"]]
    assert keys(by_set=True) == [["1", "3"], ["2", "0"]]


def test_budgets_are_the_longest_reference_and_some_slack_below_the_limit(engine):
    rows = task_rows("yes") + task_rows("maybe")
    assert token_budgets(engine, rows, 99) == dict.fromkeys(CLUSTERS, len("maybe") + 8)
    assert token_budgets(engine, rows, 7) == dict.fromkeys(CLUSTERS, 7)


def test_an_engine_without_index_is_refused(engine, tmp_path):
    bare = type(engine)(engine.base, engine.composer, engine.store)
    with pytest.raises(ValueError, match="needs an engine with an index"):
        run(bare, tmp_path)
