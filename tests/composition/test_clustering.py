from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from loracompose.composition.clustering import kmeans

SETTINGS = {"n_init": 10, "max_iter": 100, "seed": 0}


def random_points(groups, points, width, *, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, points, width, generator=generator, dtype=torch.float64) + shift


def cluster(points, k, weights=None, **settings):
    weights = torch.ones(points.shape[:2], dtype=torch.float64) if weights is None else weights
    return kmeans(points @ points.mT, weights, k, **{**SETTINGS, **settings})


def inertia_of(points, labels, signs, weights):
    """Weighted inertia of one cloud, from its points in a loop."""
    total = 0.0
    for j in set(labels.tolist()):
        own = labels == j
        signed = points[own] * signs[own][:, None]
        w = weights[own][:, None]
        centre = (w * signed).sum(0) / w.sum()
        total += (w * (signed - centre).square()).sum().item()
    return total


@pytest.mark.parametrize("k", [3, 8])
def test_inertia_is_that_of_sklearn_where_all_points_point_the_same_way(k):
    # a common shift makes all inner products positive, so no sign is ever turned and both minimise the same sum
    points = random_points(6, 48, 20, shift=3.0)
    weights = torch.rand(6, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.2
    got = cluster(points, k, weights)
    assert (got.signs == 1).all()
    for g in range(6):
        oracle = KMeans(k, n_init=10, random_state=0).fit(points[g].numpy(), sample_weight=weights[g].numpy())
        assert got.inertia[g].item() <= oracle.inertia_ * 1.015


def test_the_reported_inertia_is_that_of_the_labels_and_signs():
    points, weights = random_points(4, 30, 12), torch.rand(4, 30, dtype=torch.float64) + 0.1
    got = cluster(points, 5, weights)
    for g in range(4):
        assert got.inertia[g].item() == pytest.approx(inertia_of(points[g], got.labels[g], got.signs[g], weights[g]))


def test_well_separated_clusters_are_those_of_sklearn():
    centres = 20 * random_points(3, 5, 16, seed=1)
    points = centres.repeat_interleave(8, dim=1) + random_points(3, 40, 16, seed=2)
    got = cluster(points, 5)
    for g in range(3):
        oracle = KMeans(5, n_init=10, random_state=0).fit(points[g].numpy()).labels_
        same = got.labels[g][:, None] == got.labels[g][None]
        assert np.array_equal(same.numpy(), oracle[:, None] == oracle[None])


def test_turning_points_round_changes_no_cluster():
    points = random_points(3, 30, 12)
    turned = points * torch.where(torch.rand(3, 30, 1, generator=torch.Generator().manual_seed(5)) < 0.5, -1.0, 1.0)
    one, other = cluster(points, 5), cluster(turned, 5)
    assert torch.equal(one.labels, other.labels)
    assert torch.allclose(one.inertia, other.inertia)


def test_a_point_and_its_negative_are_one_cluster_with_opposite_signs():
    point, far = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-9.0, 9.0, 0.0])
    got = cluster(torch.stack([point, -point, far]).double()[None], 2)
    assert got.labels[0, 0] == got.labels[0, 1] != got.labels[0, 2]
    assert got.signs[0, 0] == -got.signs[0, 1]
    assert got.inertia.item() == pytest.approx(0.0, abs=1e-12)


def test_every_point_is_its_own_cluster_from_k_equal_to_their_number_on():
    points = torch.ones(2, 4, 3, dtype=torch.float64)  # even if all are equal
    for k in (4, 100):
        assert cluster(points, k).labels.tolist() == [[0, 1, 2, 3]] * 2


def test_fewer_distinct_points_than_clusters_leave_clusters_empty():
    points = torch.eye(3, dtype=torch.float64)[[0, 0, 1, 1, 2, 2]][None]
    got = cluster(points, 5)
    assert got.inertia.item() == pytest.approx(0.0, abs=1e-12)
    assert got.labels.unique().numel() == 3
    assert (got.labels[0, ::2] == got.labels[0, 1::2]).all()


@pytest.mark.parametrize("k", [1, 2, 7, 29])
def test_no_cluster_is_empty_where_the_points_are_distinct(k):
    got = cluster(random_points(5, 30, 4), k, n_init=1)
    assert all(labels.unique().numel() == k for labels in got.labels)


def test_a_cloud_is_clustered_as_it_would_be_alone():
    points = random_points(4, 20, 6)
    together = cluster(points, 4)
    for g in range(4):
        assert torch.equal(cluster(points[g : g + 1], 4).labels[0], together.labels[g])


def test_more_starts_are_never_worse_and_a_seed_gives_the_same_clusters_again():
    points = random_points(8, 40, 10)
    one, many = cluster(points, 6, n_init=1), cluster(points, 6, n_init=10)
    assert many.inertia.sum() < one.inertia.sum()
    state = torch.random.get_rng_state()
    assert torch.equal(cluster(points, 6).labels, many.labels)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not torch.equal(cluster(points, 6, n_init=1, seed=1).labels, one.labels)


def test_steps_lower_the_inertia():
    points = random_points(8, 40, 10)
    assert (
        cluster(points, 6, n_init=1, max_iter=50).inertia.sum() < cluster(points, 6, n_init=1, max_iter=1).inertia.sum()
    )


def test_single_moves_never_raise_the_inertia():
    points = random_points(60, 40, 10)
    steps = [cluster(points, 12, n_init=1, max_iter=step).inertia for step in range(12, 30)]  # Lloyd is over
    assert all((later <= earlier * (1 + 1e-12)).all() for earlier, later in pairwise(steps))
    assert (steps[-1] < steps[0]).any()


def test_a_tie_goes_to_the_lower_index():
    # whatever the first seed is, the corners of a simplex are alike: the first of them that are left are drawn apart
    corners = torch.eye(40, dtype=torch.float64)[None]
    got = cluster(corners, 39, n_init=1)
    shared = [label for label in got.labels[0].tolist() if got.labels[0].tolist().count(label) == 2]
    assert shared == [0, 0]


def test_points_of_zero_are_a_cluster_like_any_other():
    points = torch.cat([torch.zeros(1, 3, 5, dtype=torch.float64), random_points(1, 3, 5)], dim=1)
    got = cluster(points, 2)
    assert torch.isfinite(got.inertia).all()
    assert torch.equal(got.signs[0, :3], torch.ones(3, dtype=torch.float64))
