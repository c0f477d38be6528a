"""Distances between sets of features."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastgen import metrics
from fastgen.metrics import distances
from tests.metrics.samples import normal, seeded


def whitened(n, dims, seed=0):
    """Samples with mean 0 and identity covariance, up to rounding."""
    x = normal(n, dims, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


def test_frechet_distance_of_known_gaussians():
    real = whitened(200, 3)
    scale = torch.tensor([[2.0, 0, 0], [0, 3.0, 0], [0, 0, 0.5]], dtype=torch.float64)
    rotation = torch.linalg.qr(normal(3, 3, 9)).Q
    generated = whitened(300, 3, seed=1) @ scale @ rotation + torch.tensor([1.0, -2.0, 0.0])
    # |difference of means|^2 + sum (standard deviation - 1)^2, in any basis
    assert metrics.frechet_distance(real, generated) == pytest.approx(5 + 1 + 4 + 0.25)
    assert metrics.frechet_distance(generated, real) == pytest.approx(10.25)
    assert metrics.frechet_distance(real, real) == pytest.approx(0, abs=1e-12)
    assert metrics.frechet_distance(real, real + 3) == pytest.approx(27)


class IdentityFeatures(nn.Module):
    """Identity feature extractor for torchmetrics."""

    num_features = 8

    def forward(self, x):
        return x


@pytest.mark.filterwarnings("ignore")
def test_frechet_and_kernel_distance_match_torchmetrics():
    fid, kid = (pytest.importorskip(f"torchmetrics.image.{name}") for name in ("fid", "kid"))
    real, generated = normal(90), normal(90, seed=1, scale=1.2, shift=0.2)
    frechet = fid.FrechetInceptionDistance(feature=IdentityFeatures(), normalize=True).set_dtype(torch.float64)
    kernel = kid.KernelInceptionDistance(feature=IdentityFeatures(), subsets=1, subset_size=90)
    for metric in (frechet, kernel):
        metric.update(real, real=True)
        metric.update(generated, real=False)
    assert metrics.frechet_distance(real, generated) == pytest.approx(float(frechet.compute()), rel=1e-9)
    assert metrics.kernel_distance(real, generated) == pytest.approx(float(kernel.compute()[0]), rel=1e-9)


def test_kernel_distance_is_unbiased_for_equal_distributions():
    found = torch.tensor([metrics.kernel_distance(normal(20, 3, 2 * i), normal(30, 3, 2 * i + 1)) for i in range(400)])
    assert float(found.min()) < 0
    assert abs(float(found.mean())) < 4 * float(found.std()) / 20


def test_resampling_counts_are_equivalent_to_repeated_items():
    real, generated = normal(12), normal(15, seed=1)
    counts = [torch.randint(0, 4, (3, n), generator=seeded(n)).double() for n in (12, 15)]
    frechet = distances.resampled_frechet(real, generated, *counts)
    kernel = distances.resampled_kernel(real, generated, *counts)
    for r in range(3):
        a, b = (c[r].long() for c in counts)
        repeated = real.repeat_interleave(a, 0), generated.repeat_interleave(b, 0)
        assert float(frechet[r]) == pytest.approx(metrics.frechet_distance(*repeated))
        items = torch.arange(12).repeat_interleave(a), torch.arange(15).repeat_interleave(b)
        within = []
        for x, which in zip(repeated, items, strict=True):
            different = which[:, None] != which
            within.append(((x @ x.T / 8 + 1) ** 3)[different].mean())
        cross = ((repeated[0] @ repeated[1].T / 8 + 1) ** 3).mean()
        assert float(kernel[r]) == pytest.approx(float(within[0] + within[1] - 2 * cross))


def test_neighborhoods_of_points_on_a_line():
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    found = metrics.neighborhoods(real, torch.tensor([[0.5], [20.0]]), k=1)
    assert found.precise.tolist() == [True, False]  # 20 is beyond 11 + 1
    assert found.recalled.tolist() == [True] * 4  # all within 19.5 of 0.5
    assert found.covered.tolist() == [True, True, False, False]
    assert found.spheres.tolist() == [2, 0]
    assert (found.precision, found.recall, found.density, found.coverage) == (0.5, 1, 1, 0.5)


def test_neighborhoods_match_full_distance_matrices_for_any_block_size(monkeypatch):
    real, generated = normal(40, 3, shift=100), normal(50, 3, 1, scale=0.8, shift=100)
    within, others, between = (torch.cdist(a, b) for a, b in ((real, real), (generated, generated), (generated, real)))
    radii, reach = within.sort(1).values[:, 5], others.sort(1).values[:, 5]
    inside = between <= radii
    for numbers in (2**22, 130):
        monkeypatch.setattr(distances, "MAX_ELEMENTS", numbers)
        found = metrics.neighborhoods(real, generated)
        assert torch.equal(found.precise, inside.any(1))
        assert torch.equal(found.covered, inside.any(0))
        assert torch.equal(found.recalled, (between <= reach[:, None]).any(0))
        assert torch.equal(found.spheres, inside.sum(1).double() / 5)
        assert metrics.kernel_distance(real / 100, generated / 100) == pytest.approx(1.8e-4, abs=5e-3)


def test_equal_sets_have_precision_recall_and_coverage_one():
    real = normal(50, 16, shift=50)
    real[10:20] = real[0]  # more copies than k: a sphere of radius 0
    found = metrics.neighborhoods(real, real[torch.randperm(50, generator=seeded())])
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_points_on_a_sphere_are_inside_despite_rounding():
    real = normal(200, 64, shift=5)
    assert metrics.neighborhoods(real, real.flip(0)).density == pytest.approx(6 / 5)  # itself, and 5 on average


def test_neighborhoods_are_translation_invariant():
    real, generated = normal(60, 8), normal(70, 8, 1)
    near, far = metrics.neighborhoods(real, generated), metrics.neighborhoods(real + 1e6, generated + 1e6)
    for name in ("precise", "recalled", "spheres", "covered"):
        assert torch.equal(getattr(near, name), getattr(far, name))


def test_mode_dropping_lowers_recall_and_coverage_but_not_precision():
    modes = torch.cat([normal(100, 4), normal(100, 4, 1, shift=20)])
    whole = metrics.neighborhoods(modes, torch.cat([normal(100, 4, 2), normal(100, 4, 3, shift=20)]))
    half = metrics.neighborhoods(modes, normal(200, 4, 4))
    assert half.precision > whole.precision - 0.05
    assert whole.recall > 0.9
    assert half.recall <= 0.5
    assert whole.coverage > 0.9
    assert 0.45 < half.coverage <= 0.5


def test_copies_of_one_real_item_have_low_recall_and_coverage():
    real = normal(100, 4)
    found = metrics.neighborhoods(real, real[:1].expand(60, -1))
    assert found.precision == 1
    assert found.recalled.nonzero().tolist() == [[0]]
    assert found.coverage < 0.2
