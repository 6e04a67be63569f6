"""Thresholds: exactly the sorted entry, however they are found."""

from __future__ import annotations

import math

import pytest
import torch

import loracompose.composition.thresholds as module
from loracompose.composition.sparsity import trim
from loracompose.composition.thresholds import magnitude_thresholds, radix_thresholds


@pytest.fixture(params=["whole sample", "bracket", "unlucky bracket", "crowded bracket"], autouse=True)
def how(request, monkeypatch):
    """The ways in which a threshold is found: every entry sampled, a bracket that holds it, and two that do not."""
    if request.param != "whole sample":
        monkeypatch.setattr(module, "SAMPLE", 300)
    if request.param == "unlucky bracket":
        monkeypatch.setattr(module, "SURE", -1.0)
    if request.param == "crowded bracket":
        monkeypatch.setattr(module, "MOST", 2)
    return request.param


def test_a_bracket_makes_the_radix_select_needless(how, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "radix_thresholds", lambda *a: calls.append(1) or radix_thresholds(*a))
    entries = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    magnitude_thresholds(pieces(entries, 700), [entries.numel()], 0.2, torch.float32)
    assert len(calls) == (how in ("unlucky bracket", "crowded bracket"))


def test_picked_entries_spare_a_pass_and_need_not_be_the_right_ones(how):
    entries = torch.randn(20000, generator=torch.Generator().manual_seed(0))
    passes = []
    sweep = lambda: passes.append(1) or pieces(entries, 700)()  # noqa: E731
    wanted = entries.abs().sort(descending=True).values[3999].item()
    pick = lambda strides: [(0, entries[:: strides[0]] * (1 + 1e-6))]  # noqa: E731
    assert magnitude_thresholds(sweep, [20000], 0.2, torch.float32, pick) == [pytest.approx(wanted, rel=0, abs=0)]
    assert len(passes) == (1 if how in ("whole sample", "bracket") else 3)
    astray = lambda strides: [(0, entries[:: strides[0]] * 5)]  # noqa: E731
    assert magnitude_thresholds(sweep, [20000], 0.2, torch.float32, astray) == [pytest.approx(wanted, rel=0, abs=0)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("density", [0.1, 0.3, 0.5, 0.9])
def test_many_equal_entries_have_the_threshold_of_the_sorted_ones(density, seed):
    generator = torch.Generator().manual_seed(seed)
    others = torch.rand(2003, generator=generator)
    entries = torch.cat([torch.zeros(4000), torch.ones(3000), torch.full((2000,), -2.0), others])
    entries = entries[torch.randperm(len(entries), generator=generator)]
    (threshold,) = magnitude_thresholds(pieces(entries, 700), [entries.numel()], density, torch.float32)
    keep = math.ceil(density * entries.numel())
    assert threshold == entries.abs().sort(descending=True).values[keep - 1].item()


def pieces(entries, size):
    return lambda: ((0, entries[i : i + size]) for i in range(0, len(entries), size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("density", [1e-6, 0.01, 0.2, 0.5, 0.999])
def test_the_threshold_is_exactly_the_magnitude_of_the_last_entry_kept(dtype, density):
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(5003, generator=generator, dtype=torch.float64).to(dtype)
    entries = entries * 10.0 ** torch.randint(-9, 9, entries.shape, generator=generator)
    (threshold,) = magnitude_thresholds(pieces(entries, 700), [entries.numel()], density, dtype)
    keep = math.ceil(density * entries.numel())
    assert threshold == entries.abs().sort(descending=True).values[keep - 1].item()
    assert (entries.abs() >= threshold).sum() == keep


def test_each_adapter_has_a_threshold_of_its_own():
    small, large = torch.arange(1.0, 11.0), torch.arange(100.0, 2000.0, 100.0)
    sweep = lambda: [(1, large[:9]), (0, small), (1, large[9:])]  # noqa: E731
    assert magnitude_thresholds(sweep, [10, 19], 0.5, torch.float32) == [6.0, 1000.0]


def test_entries_equal_to_the_last_one_kept_stay_too():
    entries = torch.tensor([3.0, -2.0, 2.0, 2.0, 1.0])
    (threshold,) = magnitude_thresholds(pieces(entries, 2), [5], 0.4, torch.float32)
    assert trim(entries, threshold).tolist() == [3.0, -2.0, 2.0, 2.0, 0.0]


def test_density_one_keeps_everything_and_an_adapter_without_entries_is_no_error():
    assert magnitude_thresholds(lambda: [], [4, 0], 1.0, torch.float32) == [0.0, 0.0]
    entries = torch.tensor([1.0, 2.0])
    assert magnitude_thresholds(pieces(entries, 2), [2, 0], 0.5, torch.float32) == [2.0, 0.0]


def test_narrow_entries_among_wide_ones_keep_their_value():
    narrow, wide = torch.tensor([0.1, 0.7]), torch.tensor([0.3, 0.9], dtype=torch.float64)
    (threshold,) = magnitude_thresholds(lambda: [(0, narrow), (0, wide)], [4], 0.5, torch.float64)
    assert threshold == narrow[1].item()
