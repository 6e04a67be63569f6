"""BeamLoRA's schedule: the authors' numbers at their length, the same shape at any other, and refusals."""

from __future__ import annotations

import pytest

from loracompose.training.beam_settings import BeamSettings


def test_at_the_authors_length_the_schedule_is_theirs():
    settings = BeamSettings()
    assert settings.period_of(37_031) == 3_000
    assert settings.event_steps(37_031) == tuple(range(3_000, 24_001, 3_000))
    thresholds = [settings.threshold_at(step, 37_031) for step in settings.event_steps(37_031)]
    assert thresholds == pytest.approx([0.952, 0.957, 0.965, 0.974, 0.983, 0.992, 0.997, 1.0], abs=6e-4)


@pytest.mark.parametrize("steps", [40, 60, 500])
def test_a_shorter_run_has_about_as_many_events_at_the_same_shares_of_it(steps):
    events = BeamSettings().event_steps(steps)
    assert 7 <= len(events) <= 9
    assert events[0] / steps == pytest.approx(3_000 / 37_031, abs=0.02)
    assert events[-1] <= 2 / 3 * steps


def test_the_threshold_rises_from_its_first_value_to_1_and_stays_there():
    settings = BeamSettings(threshold=0.8, end=0.5)
    values = [settings.threshold_at(step, 100) for step in range(101)]
    assert values[0] == pytest.approx(0.8)
    assert values[25] == pytest.approx(0.9)
    assert values == sorted(values)
    assert values[49] < 1 == values[50] == values[100]


def test_an_event_leaves_a_period_to_train():
    assert BeamSettings(period=5, end=1.0).event_steps(21) == (5, 10, 15)
    assert BeamSettings(period=5, end=1.0).event_steps(20) == (5, 10, 15)
    assert BeamSettings(period=5, end=1.0).event_steps(19) == (5, 10)


def test_the_temperature_follows_the_learning_rate_unless_given():
    assert (BeamSettings().temperature_at(1e-4), BeamSettings().temperature_at(9e-5)) == (0.05, 0.03)
    assert BeamSettings(temperature=0.2).temperature_at(1e-4) == 0.2


@pytest.mark.parametrize(("settings", "steps"), [(BeamSettings(), 3), (BeamSettings(period=8), 15)])
def test_a_run_in_which_nothing_could_be_pruned_is_refused(settings, steps):
    with pytest.raises(ValueError, match=f"would prune nothing in {steps} steps"):
        settings.event_steps(steps)


def test_a_threshold_of_1_asks_for_no_event():
    assert BeamSettings(threshold=1.0).event_steps(60) == ()


@pytest.mark.parametrize(
    "field",
    [
        {"threshold": 0.0},
        {"threshold": 1.1},
        {"threshold": float("nan")},
        {"end": 0.0},
        {"end": 2.0},
        {"period": 1},
        {"temperature": 0.0},
        {"temperature": float("inf")},
    ],
)
def test_a_value_out_of_range_is_refused_by_name(field):
    with pytest.raises(ValueError, match=next(iter(field))):
        BeamSettings(**field)
