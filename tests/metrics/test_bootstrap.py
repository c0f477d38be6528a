"""Confidence intervals."""

from __future__ import annotations

import pytest
import torch

from fastgen import metrics
from fastgen.metrics import distances
from tests.metrics.samples import normal, seeded

pytest.importorskip("scipy")


def test_bootstrap_interval_of_a_skewed_mean_has_nominal_coverage():
    samples = torch.empty(200, 60, dtype=torch.float64).exponential_(generator=seeded())
    found = [metrics.bootstrap_interval(row, resamples=300, confidence=0.9) for row in samples]
    covered = sum(one.low <= 1 <= one.high for one in found) / len(found)
    assert 0.84 <= covered <= 0.95
    assert all(one.low < one.estimate < one.high for one in found)


def test_bootstrap_sets_interval_covers_the_expected_distance():
    def pair(seed):
        return normal(60, 4, 2 * seed), normal(80, 4, 2 * seed + 1, scale=1.3, shift=0.3)

    truth = sum(metrics.frechet_distance(*pair(seed)) for seed in range(300)) / 300
    hits = 0
    for seed in range(1000, 1060):
        real, generated = pair(seed)
        found = metrics.bootstrap_sets(
            lambda *counts, sets=(real, generated): distances.resampled_frechet(*sets, *counts), (60, 80), resamples=60
        )
        hits += found.low <= truth <= found.high
        assert found.estimate == pytest.approx(metrics.frechet_distance(real, generated))
    assert 49 <= hits <= 60


def test_paired_values_are_resampled_together():
    x = torch.rand(50, generator=seeded()) + 1
    found = metrics.bootstrap_interval([3 * x, x], lambda a, b: a.sum(-1) / b.sum(-1))
    assert [found.low, found.estimate, found.high] == pytest.approx([3, 3, 3])


def test_percentile_interval_is_the_fallback_of_bca():
    values = torch.tensor([0.0] * 30 + [1.0])
    found = metrics.bootstrap_interval(values, lambda v: v.amax(-1))
    assert (found.estimate, found.low, found.high) == (1, 0, 1)


def test_proportion_interval_of_all_hits_has_nonzero_width():
    found = metrics.proportion_interval(torch.ones(20, dtype=torch.bool))
    assert (found.estimate, found.high) == (1, 1)
    assert found.low == pytest.approx(20 / (20 + 1.959964**2))  # Wilson's lower end at n of n


def test_intervals_depend_on_the_seed_only():
    values = torch.rand(30, generator=seeded())
    torch.manual_seed(1)
    first = metrics.bootstrap_interval(values, seed=3)
    torch.manual_seed(2)
    assert metrics.bootstrap_interval(values, seed=3) == first
    assert metrics.bootstrap_interval(values, seed=4) != first
