"""Bits per dimension, perplexity and importance-weighted bounds."""

from __future__ import annotations

import math

import pytest
import torch

from fastgen import metrics
from tests.metrics.samples import seeded


def test_bits_per_dim_and_perplexity_of_uniform_distributions():
    assert metrics.bits_per_dim(64 * math.log(2), 64) == pytest.approx(1)
    assert metrics.perplexity(math.log(50)) == pytest.approx(50)
    assert metrics.perplexity(1e4) == math.inf
    assert math.isnan(metrics.perplexity(math.nan))
    torch.testing.assert_close(metrics.bits_per_dim(torch.tensor([0.0, 8.0]), 8), torch.tensor([0, 1 / math.log(2)]))


def linear_gaussian(x, samples, mean, variance, seed=1):
    """log weights (K, B) of z ~ N(0, 1), x ~ N(z, 1), q(z | x) = N(mean x, variance); p(x) is N(0, 2)."""
    q = torch.distributions.Normal(mean * x, variance**0.5)
    z = mean * x + variance**0.5 * torch.randn(samples, len(x), generator=seeded(seed), dtype=x.dtype)
    unit = torch.distributions.Normal(torch.zeros_like(x), 1.0)
    return unit.log_prob(z) + unit.log_prob(x - z) - q.log_prob(z)


def test_importance_weighted_bound_is_exact_for_the_true_posterior_and_tightens_with_samples():
    x = 2**0.5 * torch.randn(2000, generator=seeded(), dtype=torch.float64)
    exact = torch.distributions.Normal(0.0, 2**0.5).log_prob(x)
    torch.testing.assert_close(metrics.importance_weighted_bound(linear_gaussian(x, 3, 0.5, 0.5)), exact)
    log_weights = linear_gaussian(x, 64, 0.3, 0.6)
    bounds = [float(metrics.importance_weighted_bound(log_weights[:k]).mean()) for k in (1, 2, 4, 16, 64)]
    assert bounds == sorted(bounds)
    assert bounds[0] < float(exact.mean()) - 0.02
    assert bounds[-1] == pytest.approx(float(exact.mean()), abs=0.005)


def test_importance_weighted_bound_is_streaming_and_numerically_stable():
    log_weights = torch.tensor([[-2000.0, 3000.0, -math.inf], [-2001.0, 3001.0, 0.0]])
    streamed = metrics.importance_weighted_bound(row for row in log_weights)
    expected = torch.tensor([-2000 + math.log1p(math.exp(-1)), 3001 + math.log1p(math.exp(-1)), 0.0]) - math.log(2)
    torch.testing.assert_close(streamed, expected.double())
    torch.testing.assert_close(streamed, metrics.importance_weighted_bound(log_weights))
