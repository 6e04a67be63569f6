"""A study moves one setting on the same rows, and its file and picture hold what was measured."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from loracompose.adapters.checkpoint import load_adapter
from loracompose.composers import Lego
from loracompose.evaluation.results import MethodResult, ProtocolResult, Results, RowRecord
from loracompose.evaluation.sensitivity import STUDIES, Curve, Study, curves, read_curves, study_of, write_curves
from loracompose.evaluation.sensitivity_figure import sensitivity
from loracompose.evaluation.specification import parse_methods
from loracompose.marked import fill
from tests.engines import build_pool
from tests.evaluation.material import CLUSTERS, task_rows

ROOT = Path(__file__).parent.parent.parent
STUDY = Study("size", "ranks", (2, 4), {"a": "lego set.k={x}", "b": "mixture k={x}"}, pools=("small", "large"))
ROWS = tuple(RowRecord(f"{task}{i}", task, "c", "accuracy", 0) for task in ("x", "y") for i in range(3))


def results(pool, level, rows=ROWS):
    x = {"small": 2, "large": 4}[pool]
    methods = tuple(
        MethodResult(f"{label} @ {x}", "", tuple(level + 10.0 * i for i in range(len(rows))), None, 0)
        for label in ("a", "b")
    )
    protocols = tuple(
        ProtocolResult(name, rows, ("x",) * len(rows), (1,) * len(rows), 1.0, methods)
        for name in ("in-domain", "masked")
    )
    return Results({}, {}, {}, protocols)


def test_each_point_asks_its_own_pool_with_its_own_setting():
    assert STUDY.asked("small") == {"a @ 2": "lego set.k=2 label='a @ 2'", "b @ 2": "mixture k=2 label='b @ 2'"}
    (lego, mixture) = parse_methods(list(STUDY.asked("large").values()))[2:]
    assert (lego.label, lego.composer, mixture.k) == ("a @ 4", Lego(k=4), 4)
    with pytest.raises(ValueError, match="2 points and 3 pools"):
        replace(STUDY, pools=("p", "q", "r"))


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_every_line_of_every_study_is_a_method(study):
    for pool in set(study.pools):
        lines = study.asked(pool)
        assert set(lines) <= {method.label for method in parse_methods(list(lines.values()))}
    assert study_of(study.name) is study


def test_curves_hold_the_scores_of_every_row_and_compare_points_row_by_row():
    found = curves(STUDY, {"small": results("small", 5.0), "large": results("large", 25.0)})
    assert [(curve.protocol, curve.label) for curve in found] == [
        ("in-domain", "a"),
        ("in-domain", "b"),
        ("masked", "a"),
        ("masked", "b"),
    ]
    low, high = found[0].estimates()
    assert (low.value, high.value) == (30.0, 50.0)
    gain = found[0].against(4, 2).difference
    assert (gain.value, gain.low, gain.high) == pytest.approx((20.0, 20.0, 20.0))  # the same gain on every row


def test_pools_that_were_asked_different_rows_are_not_compared():
    with pytest.raises(ValueError, match="asked different rows under 'in-domain'"):
        curves(STUDY, {"small": results("small", 5.0), "large": results("large", 5.0, ROWS[:4])})


def test_curves_are_read_back_as_they_were_written(tmp_path):
    found = curves(STUDY, {"small": results("small", 5.0), "large": results("large", 25.0)})
    write_curves(found, tmp_path / "s.json", {"seed": 0})
    assert read_curves(tmp_path / "s.json") == ({"seed": 0}, found)
    (tmp_path / "s.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"s\.json holds no curves"):
        read_curves(tmp_path / "s.json")
    with pytest.raises(LookupError, match="no study 'depth'; there are k, budget"):
        study_of("depth")


def test_the_picture_has_a_panel_a_study_and_names_every_line():
    chance = np.random.default_rng(0)
    tasks = tuple(row.task for row in ROWS)
    made = [
        Curve(s.name, protocol, label, s.points, tasks, tuple(tuple(chance.uniform(0, 90, 6)) for _ in s.points))
        for s in map(study_of, ("seeds", "harm"))
        for protocol in s.protocols
        for label in s.lines
    ]
    drawn = sensitivity(made, STUDIES)
    for word in ("seeds of the adapters", "one harmful adapter in the pool", "rank gating", "in-domain", "masked"):
        assert re.search(f"<!-- {word} -->", drawn)
    assert "temperature" not in drawn
    assert drawn == sensitivity(made, STUDIES)


def script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sensitivity_document_and_its_figure_are_made_from_its_results():
    made = script("sensitivity_report")
    file = ROOT / "benchmarks" / "results" / "sensitivity.json"
    document = ROOT / "docs" / "sensitivity.md"
    if not file.exists():
        assert not document.exists()  # numbers without results would be typed by hand
        return
    _, found = read_curves(file)
    text = document.read_text(encoding="utf-8")
    assert fill(text, {made.BLOCK: made.table(found)}) == text
    assert (ROOT / "docs" / "sensitivity.svg").exists()


def test_a_random_adapter_is_ten_times_as_large_and_claims_every_task(tmp_path):
    made = script("sensitivity")
    like = build_pool(tmp_path / "pool") / "sql"
    noise = made.noise(like, tmp_path / "random" / made.HARMFUL, task_rows(), 0)
    assert len(json.loads((noise / "card.json").read_text())["examples"]) == len(CLUSTERS)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (like, noise))
    assert before.keys() == after.keys()
    ratios = [(after[name].std() / before[name].std()).item() for name in before]
    assert 9 < np.mean(ratios) < 11
    pool = made.linked({"sql": like, made.HARMFUL: noise}, tmp_path / "linked")
    assert load_adapter(pool / made.HARMFUL).name == made.HARMFUL


@pytest.mark.parametrize("other", [{"seed": 1}, {"dtype": "float32"}, {"adapters": "elsewhere"}, {"reseeded": "a"}])
def test_what_a_study_made_on_the_way_is_not_taken_for_another_seed_or_pool(tmp_path, other):
    made = script("sensitivity")
    asked = {"seed": 0, "dtype": "auto", "tasks": "tasks", "adapters": "adapters", "reseeded": None}

    def given(**changed):
        paths = {"tasks", "adapters", "reseeded"}
        values = {k: Path(v) if k in paths and v else v for k, v in {**asked, **changed}.items()}
        return argparse.Namespace(**values)

    def refused(**changed):
        return made.made_otherwise(tmp_path, made.settings_of_work(given(**changed)))

    assert refused() is None
    assert "seed 0, dtype auto, tasks " in refused(**other)
    assert refused() is None


def test_the_table_says_where_each_line_is_best_and_how_its_ends_differ():
    made = script("sensitivity_report")
    line = Curve("k", "masked", "lego", STUDIES[0].points, ("t",) * 16, tuple((x + 3.0,) * 16 for x in range(8)))
    row = made.table([line]).splitlines()[-1]
    assert "| 10: 10.0 [10.0, 10.0] | 1: 3.0 [3.0, 3.0] | 10 − 1: 7.0 [7.0, 7.0] |" in row
    named = Curve("harm", "masked", "lego", ("none", "a", "b"), ("t",) * 16, ((3.0,) * 16, (1.0,) * 16, (4.0,) * 16))
    row = made.table([named]).splitlines()[-1]
    assert "| a − none: -2.0 [-2.0, -2.0]<br>b − none: 1.0 [1.0, 1.0] |" in row


def test_a_pool_of_equal_ranks_keeps_the_largest_directions_and_the_cards(tmp_path):
    made = script("sensitivity")
    own = build_pool(tmp_path / "pool") / "sql"
    before = load_adapter(own)
    turned, equal = (
        load_adapter(made.rewritten(own, tmp_path / name / "sql", rank)) for name, rank in (("t", None), ("e", 1))
    )
    for module, f in before.factors.items():
        update = f.B @ f.A
        same, kept = (a.factors[module].B @ a.factors[module].A for a in (turned, equal))
        assert turned.factors[module].rank == f.rank > equal.factors[module].rank == 1
        assert (same - update).norm() < 1e-5 * update.norm()
        U, S, Vt = np.linalg.svd(update.double().numpy())
        np.testing.assert_allclose(kept, S[0] * np.outer(U[:, 0], Vt[0]), atol=1e-5 * S[0])
        assert not np.allclose(f.A, turned.factors[module].A, atol=1e-3)
    assert (tmp_path / "e" / "sql" / "card.json").read_bytes() == (own / "card.json").read_bytes()
    assert turned.base_model == before.base_model
