"""The measurement of speed measures what it says: equal work, sets as drawn, times of the right thing."""

from __future__ import annotations

import json
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from loracompose.benchmarks.speed.answers import Asked
from loracompose.benchmarks.speed.answers import measure as measure_answers
from loracompose.benchmarks.speed.case import Case, make_adapters, write_adapters
from loracompose.benchmarks.speed.composing import measure as measure_composing
from loracompose.benchmarks.speed.figure import draw, draw_answers, draw_composing, draw_stream
from loracompose.benchmarks.speed.measure import Setting, agree, exact_logits, measure, opened, token_ids
from loracompose.benchmarks.speed.published import Einsum, MergeAndRestore
from loracompose.benchmarks.speed.rounds import Samples, compared, one_round, summary, time_rounds
from loracompose.benchmarks.speed.stream import Stream, write_pool
from loracompose.benchmarks.speed.stream import measure as measure_stream
from loracompose.models import BaseModel
from loracompose.runtime.machine import DEFAULT
from tests.engines import build_engine
from tests.tiny import base_model
from tests.training.tiny_base import base_folder

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
CASE = Case(rows=4, k=2, distinct=3, ranks=(2, 3), tokens=6, steps=2)


@pytest.fixture(scope="module")
def base() -> BaseModel:
    model = base_model("llama")
    return BaseModel(model, None, "tiny", "given", model.device, model.dtype)  # type: ignore[arg-type]


def test_rows_have_the_distinct_sets_in_turn_and_every_set_k_members() -> None:
    case = Case(rows=7, k=3, distinct=5)
    sets = case.sets()
    assert len(set(sets)) == 5
    assert sets[5] == sets[0]
    assert all(len(set(members)) == 3 for members in sets)
    torch.testing.assert_close(case.weights().sum(dim=1), torch.ones(7))


def test_one_set_needs_only_its_own_adapters() -> None:
    assert Case(rows=4, k=3, distinct=1).adapters == 3


@pytest.mark.parametrize("field", ["rows", "k", "tokens", "steps"])
def test_a_case_of_nothing_is_refused(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        replace(CASE, **{field: 0})


def test_adapters_have_unequal_ranks_and_modules(base: BaseModel) -> None:
    adapters = make_adapters(CASE, base.model)
    ranks = {next(iter(adapter.factors.values())).rank for adapter in adapters}
    assert ranks == {2, 3}
    assert len({frozenset(adapter.factors) for adapter in adapters}) > 1


def test_every_way_that_claims_the_mixture_computes_it(base: BaseModel) -> None:
    ids = token_ids(base, CASE, 0)[:, : CASE.tokens + 1]
    with opened(base, CASE, 0, DEFAULT, slow=True) as ways:
        found = agree(ways, ids)
    assert {name.split(",")[0] for name in found} >= {"loracompose", "PEFT set_adapter", "LoraRetriever's einsum"}
    assert max(found.values()) < 1e-5


def test_ways_that_differ_are_not_timed(base: BaseModel) -> None:
    adapters = make_adapters(CASE, base.model)
    other = make_adapters(CASE, base.model, seed=1)
    ids = token_ids(base, CASE, 0)[:, : CASE.tokens + 1]
    with pytest.raises(ArithmeticError, match="do not compute the same"):
        agree([Einsum(base.model, adapters, CASE, "mixture"), Einsum(base.model, other, CASE, "mixture")], ids)


def test_one_row_that_differs_is_enough_in_16_bits_too(base: BaseModel) -> None:
    @dataclass(frozen=True, eq=False)
    class Given:
        name: str
        logits: torch.Tensor
        computes: str = "the mixture"
        once: float = 0.0
        slow: bool = False

        @contextmanager
        def ready(self):
            yield lambda ids, cache: (self.logits, None)

    right = torch.randn(512, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    near, wrong = right * (1 + 2**-7), right.clone()
    wrong[5] = wrong[5].roll(1)
    ids = torch.zeros(512, 2, dtype=torch.long)
    assert agree([Given("ours", right), Given("near", near)], ids)["near"] < 0.02
    with pytest.raises(ArithmeticError, match="'wrong' differs from 'ours'"):
        agree([Given("ours", right), Given("wrong", wrong)], ids)


def test_in_16_bits_ways_agree_in_float32_first_and_then_with_its_logits(base: BaseModel, monkeypatch) -> None:
    half = replace(base, model=deepcopy(base.model).bfloat16(), dtype=torch.bfloat16)
    ids = token_ids(half, CASE, 0)[:, : CASE.tokens + 1]
    assert exact_logits(base, CASE, 0, DEFAULT, ids) is None
    exact = exact_logits(half, CASE, 0, DEFAULT, ids)
    assert {logits.dtype for logits in exact} == {torch.float32}
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    with opened(half, CASE, 0, DEFAULT, slow=False) as ways:
        assert 1e-4 < max(agree(ways, ids, exact).values()) < 0.03
        with pytest.raises(ArithmeticError, match="'loracompose' differs from float32"):
            agree(ways, ids, tuple(1.1 * logits for logits in exact))

    right = Einsum._hook  # one weight in a hundred wrong: less than 16 bits show of it
    monkeypatch.setattr(Einsum, "_hook", lambda self, A, B, weights: right(self, A, B, 1.01 * weights))
    with opened(half, CASE, 0, DEFAULT, slow=False) as ways:
        agree(ways, ids, exact)
    with pytest.raises(ArithmeticError, match="\"LoraRetriever's einsum, mixture\" differs from 'loracompose'"):
        exact_logits(half, CASE, 0, DEFAULT, ids)


def test_merging_and_restoring_leaves_the_weights_bit_equal(base: BaseModel) -> None:
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    one_round(MergeAndRestore(base.model, make_adapters(CASE, base.model), CASE), token_ids(base, CASE, 0), 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.model.state_dict().items())


def test_slow_ways_are_timed_on_the_prompts_of_all_others() -> None:
    passes: dict[str, list[int]] = {"fast": [], "slow": []}

    class Noted:
        def __init__(self, name: str) -> None:
            self.name, self.slow = name, name == "slow"

        @contextmanager
        def ready(self):
            yield lambda ids, cache: (passes[self.name].append(ids.shape[1]), [])

    time_rounds([Noted("fast"), Noted("slow")], torch.zeros(2, 64 + 8 + 1, dtype=torch.long), 8, 1)
    assert passes == {"fast": [64, *[1] * 9] * 2, "slow": [64, *[1] * 3] * 2}  # a round to warm up, and one


def test_every_way_of_every_case_is_timed_in_every_round(base: BaseModel) -> None:
    kept: list[list[str]] = []
    cases = {"several": CASE, "one": replace(CASE, distinct=1)}
    result = measure(base, cases, Setting(rounds=1), keep=lambda found: kept.append(list(found["cases"])))
    assert kept == [["several"], ["several", "one"]]  # a case that fails does not take the others with it
    several, one = (case["ways"] for case in result["cases"].values())
    assert set(several) > {name for name in one if "folded" not in name}
    assert "merge into the weights and restore, row by row" in several  # the slow ways, on the first case alone
    assert "merge into the weights and restore, row by row" not in one
    assert several["base model"]["ratio_to_base"]["decode"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert several["PEFT add_weighted_adapter(cat), then adapter_names"]["once_seconds"] > 0
    assert all(way["seconds"]["decode"]["median"] > 0 for way in several.values())
    assert all(seconds > 0 for case in result["cases"].values() for seconds in case["floor_seconds"].values())


def test_ratios_are_taken_within_a_round() -> None:
    slow_then_fast = Samples(decode=[10.0, 1.0])
    base = Samples(decode=[5.0, 0.5])
    assert compared(slow_then_fast.decode, base.decode) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_composing_is_compared_on_equal_results(base: BaseModel) -> None:
    result = measure_composing(
        base, rounds=1, slow_rounds=1, case=Case(rows=1, k=2, distinct=1, ranks=(4,), targets="all")
    )
    assert result["linear"]["difference"] < 1e-4
    assert all(part["inertia_ratio"] <= 1.01 for part in result["lego"]["efforts"].values())
    assert {"lego", "ties", "linear"} <= set(result["seconds"])


def test_a_stream_prefers_popular_adapters_and_is_the_same_every_time() -> None:
    stream = Stream(prompts=400, k=2)
    sets = list(stream.sets(100))
    assert sets == list(stream.sets(100))
    assert all(len(set(members)) == 2 for members in sets)
    drawn = [member for members in sets for member in members]
    assert drawn.count(0) > 10 * drawn.count(60)


def test_adapters_of_a_pool_differ_and_are_written_once(base: BaseModel, tmp_path: Path) -> None:
    from loracompose import load_adapter

    folders = write_pool(tmp_path, 20, base.model)
    prints = {load_adapter(folder, base=base.model).fingerprint for folder in folders}
    assert len(prints) == 20
    before = [folder.stat().st_mtime_ns for folder in folders]
    assert [folder.stat().st_mtime_ns for folder in write_pool(tmp_path, 20, base.model)] == before


def test_peft_reads_the_adapters_that_are_written(base: BaseModel, tmp_path: Path) -> None:
    from loracompose import load_adapter

    made = make_adapters(CASE, base.model)
    for adapter, folder in zip(made, write_adapters(made, tmp_path), strict=True):
        assert set(load_adapter(folder, base=base.model).factors) == set(adapter.factors)


def test_a_large_pool_serves_the_same_stream_from_a_small_store(tmp_path: Path) -> None:
    base = str(base_folder(tmp_path / "base"))
    stream = Stream(prompts=6, k=2, rows=3, new_tokens=2, store_bytes=20_000)
    result = measure_stream(base, tmp_path / "pool", [3, 12], stream)
    small, large = result["pools"]["3"], result["pools"]["12"]
    assert result["seconds_to_smallest"]["3"] == 1.0
    assert large["distinct_adapters"] > small["distinct_adapters"]
    assert large["reads"] >= large["distinct_adapters"]
    assert large["store_mb"] <= 0.02
    assert {"load", "compose", "generate"} <= set(large["stages_seconds"])
    again = measure_stream(base, tmp_path / "pool", [3], stream, before=result)
    assert list(again["pools"]) == ["3", "12"]
    assert again["pools"]["12"] == large
    assert again["seconds_to_smallest"]["12"] == large["seconds"] / again["pools"]["3"]["seconds"]
    with pytest.raises(ValueError, match="choose another file"):
        measure_stream(base, tmp_path / "pool", [3], Stream(prompts=7), before=result)


def test_the_stages_of_an_answer_are_those_of_sets_composed_anew_and_again(tmp_path: Path) -> None:
    asked = Asked(composers=("lego", "mixture"), k=2, rows=3, new_tokens=2, rounds=2)
    with build_engine(tmp_path) as engine:
        result = measure_answers(engine, asked)
        stats = engine.cache.stats
    assert list(result["composers"]) == ["lego", "mixture"]
    assert stats.hits >= 2  # LEGO's sets of the second pass of every round were composed before
    assert stats.misses >= 2
    for passes in result["composers"].values():
        assert set(passes) == {"anew", "again"}
        for part in passes.values():
            assert list(part["seconds"]) == ["retrieve", "load", "compose", "generate"]
            assert 0 < part["share_before_the_model"]["median"] < 1
            assert all(stage["median"] > 0 for stage in part["seconds"].values())


def test_answers_are_not_timed_without_prompts_or_with_nothing_to_time(tmp_path: Path) -> None:
    with build_engine(tmp_path) as engine, pytest.raises(ValueError, match="needs an index"):
        measure_answers(replace(engine, retriever=None), Asked())
    with pytest.raises(ValueError, match="new_tokens must be at least 1"):
        Asked(new_tokens=0)
    with pytest.raises(ValueError, match="no composer"):
        Asked(composers=())


@pytest.mark.parametrize(
    ("name", "draw", "shown"),
    [
        ("speed", draw, "PEFT set_adapter, row by row"),
        ("composing", draw_composing, "PEFT add_weighted_adapter(svd), for linear"),
        ("answers", draw_answers, "sets composed before"),
        ("stream", draw_stream, "prompts a second"),
    ],
)
def test_equal_results_give_equal_figures_that_name_what_they_show(name, draw, shown, tmp_path: Path) -> None:
    result = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    for file in ("first.svg", "second.svg"):
        draw(result, tmp_path / file)
    first, second = ((tmp_path / file).read_text(encoding="utf-8") for file in ("first.svg", "second.svg"))
    assert first == second
    assert shown in first
    for method in result.get("composers", {}) if name == "answers" else result.get("seconds", {}):
        assert f">{method}<" in first
