"""Metrics: likelihoods, confidence intervals, distances between sets, feature spaces, and formatting."""

from __future__ import annotations

import doctest
import hashlib
import json
import math
import sys
import types

import pytest
import torch
from torch import nn

from fastgen import metrics
from fastgen.metrics import bootstrap, distances, features, likelihood, sounds, summary, translations

pytest.importorskip("scipy")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(n, dims=8, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, dims, generator=seeded(seed), dtype=torch.float64) * scale + shift


def whitened(n, dims, seed=0):
    """Samples with mean 0 and identity covariance, up to rounding."""
    x = normal(n, dims, seed)
    x = x - x.mean(0)
    return x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T


MODULES = [bootstrap, distances, features, likelihood, sounds, summary, translations]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_docstring_examples(module):
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed


# --------------------------------------------------------------------------------------------------
# Likelihoods


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


# --------------------------------------------------------------------------------------------------
# Intervals


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


# --------------------------------------------------------------------------------------------------
# Distances


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


def test_neighbourhoods_of_points_on_a_line():
    real = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    found = metrics.neighbourhoods(real, torch.tensor([[0.5], [20.0]]), k=1)
    assert found.precise.tolist() == [True, False]  # 20 is beyond 11 + 1
    assert found.recalled.tolist() == [True] * 4  # all within 19.5 of 0.5
    assert found.covered.tolist() == [True, True, False, False]
    assert found.spheres.tolist() == [2, 0]
    assert (found.precision, found.recall, found.density, found.coverage) == (0.5, 1, 1, 0.5)


def test_neighbourhoods_match_full_distance_matrices_for_any_block_size(monkeypatch):
    real, generated = normal(40, 3, shift=100), normal(50, 3, 1, scale=0.8, shift=100)
    within, others, between = (torch.cdist(a, b) for a, b in ((real, real), (generated, generated), (generated, real)))
    radii, reach = within.sort(1).values[:, 5], others.sort(1).values[:, 5]
    inside = between <= radii
    for numbers in (2**22, 130):
        monkeypatch.setattr(distances, "MAX_ELEMENTS", numbers)
        found = metrics.neighbourhoods(real, generated)
        assert torch.equal(found.precise, inside.any(1))
        assert torch.equal(found.covered, inside.any(0))
        assert torch.equal(found.recalled, (between <= reach[:, None]).any(0))
        assert torch.equal(found.spheres, inside.sum(1).double() / 5)
        assert metrics.kernel_distance(real / 100, generated / 100) == pytest.approx(1.8e-4, abs=5e-3)


def test_equal_sets_have_precision_recall_and_coverage_one():
    real = normal(50, 16, shift=50)
    real[10:20] = real[0]  # more copies than k: a sphere of radius 0
    found = metrics.neighbourhoods(real, real[torch.randperm(50, generator=seeded())])
    assert (found.precision, found.recall, found.coverage) == (1, 1, 1)


def test_points_on_a_sphere_are_inside_despite_rounding():
    real = normal(200, 64, shift=5)
    assert metrics.neighbourhoods(real, real.flip(0)).density == pytest.approx(6 / 5)  # itself, and 5 on average


def test_neighbourhoods_are_translation_invariant():
    real, generated = normal(60, 8), normal(70, 8, 1)
    near, far = metrics.neighbourhoods(real, generated), metrics.neighbourhoods(real + 1e6, generated + 1e6)
    for name in ("precise", "recalled", "spheres", "covered"):
        assert torch.equal(getattr(near, name), getattr(far, name))


def test_mode_dropping_lowers_recall_and_coverage_but_not_precision():
    modes = torch.cat([normal(100, 4), normal(100, 4, 1, shift=20)])
    whole = metrics.neighbourhoods(modes, torch.cat([normal(100, 4, 2), normal(100, 4, 3, shift=20)]))
    half = metrics.neighbourhoods(modes, normal(200, 4, 4))
    assert half.precision > whole.precision - 0.05
    assert whole.recall > 0.9
    assert half.recall <= 0.5
    assert whole.coverage > 0.9
    assert 0.45 < half.coverage <= 0.5


def test_copies_of_one_real_item_have_low_recall_and_coverage():
    real = normal(100, 4)
    found = metrics.neighbourhoods(real, real[:1].expand(60, -1))
    assert found.precision == 1
    assert found.recalled.nonzero().tolist() == [[0]]
    assert found.coverage < 0.2


# --------------------------------------------------------------------------------------------------
# Feature spaces


@pytest.fixture(scope="module")
def digits():
    """Images (N, 1, 8, 8) and labels: the first 1400 to train on, the rest held out."""
    load = pytest.importorskip("sklearn.datasets").load_digits
    loaded = load()
    order = torch.randperm(1797, generator=seeded())
    return torch.from_numpy(loaded.images).float()[order, None] / 16, torch.from_numpy(loaded.target).long()[order]


@pytest.fixture(scope="module")
def space(digits):
    images, labels = digits
    held_out = images[1400:], labels[1400:]
    return metrics.classifier_features(images[:1400], labels[:1400], held_out=held_out, data="digits", steps=120)


def test_classifier_features_of_digits(space, digits):
    images, labels = digits
    accuracy = float((space.predict(images[1400:]) == labels[1400:]).double().mean())
    assert accuracy > 0.93
    assert space.name == f"classifier-digits-64d ({accuracy:.1%} held-out accuracy)"
    found = space(images[:1400])
    assert found.shape == (1400, space.dims)
    torch.testing.assert_close(found.mean(0), torch.zeros(64), atol=1e-4, rtol=0)
    torch.testing.assert_close(found.std(0), torch.ones(64), atol=1e-4, rtol=0)


def upright(n=60, size=9, channels=2):
    """Images that are dark at the top."""
    ramp = torch.linspace(0, 1, size)[:, None].expand(channels, size, size)
    return (0.8 * ramp + 0.2 * torch.rand(n, channels, size, size, generator=seeded())).contiguous()


def test_rotation_features_need_no_labels():
    found = metrics.rotation_features(upright(), data="ramps", dims=5, steps=40)
    assert found.name == "rotations-ramps-5d (100.0% held-out accuracy)"
    assert found(upright()).shape == (60, 5)
    with pytest.raises(ValueError, match="trained on labels"):
        found.predict(upright())


def test_feature_training_is_reproducible_and_preserves_the_rng_state():
    images, labels = upright(), torch.arange(60) % 3

    def trained(seed):
        return metrics.classifier_features(images, labels, seed=seed, steps=3, dims=4)(images)

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = trained(0)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.inference_mode(), torch.autocast("cpu"):
        images = images.clone()
        torch.rand(1)
        assert torch.equal(trained(0), first)
    assert not torch.equal(trained(1), first)


@pytest.mark.parametrize("size", [1, 5, 28, 40])
def test_feature_networks_support_any_image_size(size):
    images = torch.rand(50, 3, size, size, generator=seeded())
    found = metrics.classifier_features(images, torch.arange(50) % 2, steps=2, dims=3)
    assert found(images).shape == (50, 3)


def test_feature_space_serialization_round_trip(space, digits):
    save, load = (pytest.importorskip("safetensors.torch").__dict__[name] for name in ("save", "load"))
    tensors, meta = space.state()
    before = torch.get_rng_state()
    again = metrics.FeatureSpace.from_state(load(save(tensors)), json.loads(json.dumps(meta)))
    assert torch.equal(torch.get_rng_state(), before)
    assert (again.name, again.dims, again.accuracy) == (space.name, space.dims, space.accuracy)
    images = digits[0][:300]
    assert torch.equal(again(images), space(images))
    assert torch.equal(again.predict(images), space.predict(images))


def test_inception_features_require_torchvision(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="inception_features needs torchvision"):
        metrics.inception_features()


class Inception(nn.Module):
    """Replacement of torchvision's network with the first pixel as features."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2048))
        self.fc = nn.Linear(2048, 1000)

    def forward(self, x):
        assert x.shape[1:] == (3, 299, 299)
        return self.fc(x[:, :1, 0, 0] * self.scale)


def test_inception_features_require_intact_local_weights(monkeypatch, tmp_path):
    content = b"weights"
    file = tmp_path / "checkpoints" / f"inception-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    state = {**Inception().state_dict(), "scale": torch.full((2048,), 2.0)}

    def get_state_dict(progress, weights_only):
        assert weights_only
        return state

    weights = types.SimpleNamespace(url=f"https://example.org/{file.name}", get_state_dict=get_state_dict)
    models = types.ModuleType("torchvision.models")
    models.Inception_V3_Weights = types.SimpleNamespace(IMAGENET1K_V1=weights)
    models.inception_v3 = lambda **options: Inception()
    monkeypatch.setitem(sys.modules, "torchvision", types.ModuleType("torchvision"))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    with pytest.raises(FileNotFoundError, match=r"inception-\w+\.pth: expected torchvision's weights"):
        metrics.inception_features()
    file.parent.mkdir()
    file.write_bytes(b"others")
    with pytest.raises(ValueError, match="expected the weights that torchvision names"):
        metrics.inception_features()
    file.write_bytes(content)
    space = metrics.inception_features()
    assert (space.name, space.dims) == ("inception-v3 (torchvision)", 2048)
    torch.testing.assert_close(space(torch.full((2, 1, 8, 8), 0.75)), torch.ones(2, 2048))
    assert metrics.FeatureSpace.from_state(*space.state()).name == space.name


# --------------------------------------------------------------------------------------------------
# Evaluation and formatting


def test_evaluate_images_ranks_degraded_samples_and_reports_the_space(space, digits):
    images, labels = digits
    real, training = images[1400:], images[:1400]
    noisy = (training[:700] + 0.3 * torch.randn(700, 1, 8, 8, generator=seeded())).clamp(0, 1)
    half = training[labels[:1400] < 5]
    found = {
        name: {
            one.name: one for one in metrics.evaluate_images(real, generated, space, training=training, resamples=60)
        }
        for name, generated in (("real", training[:700]), ("noisy", noisy), ("half", half))
    }
    floor = found["noisy"]["Frechet distance, real against real"]
    assert floor.n == {"training": 700, "held-out": 397}
    assert floor.high < found["noisy"]["Frechet distance"].low
    assert found["real"]["Frechet distance"].high < found["noisy"]["Frechet distance"].low
    assert found["real"]["kernel distance"].high < found["noisy"]["kernel distance"].low
    assert found["noisy"]["precision"].high < found["real"]["precision"].low
    assert found["noisy"]["density"].high < found["real"]["density"].low
    for name in ("recall", "coverage"):
        assert found["half"][name].high < found["real"][name].low - 0.1
    assert found["half"]["precision"].value > found["real"]["precision"].value - 0.05
    for one in found["noisy"].values():
        assert one.low <= one.value <= one.high
        assert space.name in str(one)
        assert "against 397 held-out" in str(one)


def test_evaluate_images_is_reproducible_and_intervals_are_optional(space, digits):
    images = digits[0]
    first, again, other, bare = (
        metrics.evaluate_images(images[1500:], images[:200], space, training=images[200:1400], **options)
        for options in ({"resamples": 20}, {"resamples": 20}, {"resamples": 20, "seed": 1}, {"resamples": 0})
    )
    assert first == again
    assert first != other
    assert [one.value for one in bare] == pytest.approx([one.value for one in first])
    assert bare[0].low is None
    assert "[" not in str(bare[0])


def test_frechet_interval_is_nonnegative(space, digits):
    found = metrics.evaluate_images(digits[0][:100], digits[0][:100], space, resamples=20)[0]
    assert found.value == pytest.approx(0, abs=1e-9)
    assert found.low == 0


def test_too_few_images_for_the_covariance_are_noted(space, digits):
    images = digits[0]
    found = metrics.evaluate_images(images[:64], images[100:200], space, resamples=0)
    assert [bool("covariance of 64 features needs more images" in one.note) for one in found] == [True] + 5 * [False]


def test_class_agreement(space, digits):
    images, labels = digits
    wrong = labels[1400:].clone()
    wrong[:100] = (wrong[:100] + 1) % 10
    right = metrics.class_agreement(images[1400:], labels[1400:], space)
    assert right.value == pytest.approx(space.accuracy)
    assert metrics.class_agreement(images[1400:], wrong, space).value < right.value - 0.2
    assert space.name in str(right)


def test_summarise_reports_likelihood_units():
    nats = 64 * math.log(2) * torch.tensor([1.0, 2.0, 3.0])
    found = {one.name: one for one in metrics.summarise({"elbo": -nats, "nll": nats / 2, "error": nats}, dims=64)}
    assert found["ELBO"].value == pytest.approx(-128 * math.log(2))
    assert found["error"].unit == ""
    assert found["bits per dimension"].value == pytest.approx(2)  # of the bound, not of the reconstruction term
    assert "at most" in found["bits per dimension"].note

    lines = metrics.summarise({"nll": torch.tensor([10.0, 30.0]), "tokens": torch.tensor([10, 10])})
    assert [one.name for one in lines] == ["negative log-likelihood", "nats per token", "perplexity"]
    assert [one.value for one in lines[1:]] == pytest.approx([2, math.exp(2)])
    assert lines[2].high == pytest.approx(math.exp(lines[1].high))
    assert str(lines[1]).endswith("nats/token  20 tokens of 2 held-out items")
    values = {"nll": [10.0, 30.0], "tokens": [10, 10], "characters": [30, 50]}
    lines = metrics.summarise({name: torch.tensor(column) for name, column in values.items()})
    assert lines[3].value == pytest.approx(0.5)
    assert str(lines[3]).endswith("nats/character  80 characters of 20 tokens of 2 held-out items")
    weighted = metrics.summarise({"nll": torch.tensor([10.0, 30.0])}, tokens=torch.tensor([10, 90]))
    assert weighted[1].value == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("metric", "line"),
    [
        (
            metrics.Metric("Frechet distance", 3.2149, 2.9, 3.6, space="pixels", n={"generated": 1000, "held-out": 9}),
            "Frechet distance  3.21 [2.90, 3.60]  in pixels, 1,000 generated against 9 held-out",
        ),
        (metrics.Metric("ELBO", -1234.5, -1240.0, -1229.0, unit="nats"), "ELBO  -1,234.5 [-1,240.0, -1,229.0] nats"),
        (metrics.Metric("x", 1.23456, note="by hand"), "x  1.235 (by hand)"),
        (metrics.Metric("x", 2.0, 2.0, 2.0), "x  2 [2, 2]"),
        (metrics.Metric("perplexity", math.inf, 3.0, math.inf), "perplexity  inf [3, inf]"),
    ],
    ids=["space", "large", "bare", "constant", "infinite"],
)
def test_metric_formatting_uses_significant_digits(metric, line):
    assert str(metric) == line


# --------------------------------------------------------------------------------------------------
# Errors

IMAGES, LABELS = torch.rand(50, 1, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 2
PIXELS = metrics.FeatureSpace("pixels", 36, nn.Flatten())

ERRORS = {
    "dims": (lambda: metrics.bits_per_dim(1.0, 0), ValueError, "dims: expected a whole number of at least 1, got 0"),
    "bound's shape": (
        lambda: metrics.importance_weighted_bound(torch.zeros(3)),
        ValueError,
        r"log_weights: expected shape \(K, B\), got \(3,\)",
    ),
    "bound's rows": (
        lambda: metrics.importance_weighted_bound(iter([torch.zeros(3), torch.zeros(2)])),
        ValueError,
        r"log_weights: expected shape \(3,\) for each sample, got \(2,\)",
    ),
    "bound of NaN": (
        lambda: metrics.importance_weighted_bound(torch.tensor([[0.0, math.nan]])),
        ValueError,
        "got 1 of 2 NaN",
    ),
    "bound of nothing": (lambda: metrics.importance_weighted_bound([]), ValueError, "at least one sample, got none"),
    "bound of integers": (
        lambda: metrics.importance_weighted_bound(torch.zeros(2, 2, dtype=torch.int64)),
        TypeError,
        "floating point, got torch.int64",
    ),
    "one value": (lambda: metrics.bootstrap_interval(torch.zeros(1)), ValueError, r"at least 2, got \[1\]"),
    "values' shape": (lambda: metrics.bootstrap_interval(torch.zeros(2, 2)), ValueError, r"\(N,\), got \(2, 2\)"),
    "values of NaN": (
        lambda: metrics.summarise({"elbo": torch.tensor([0.0, math.inf])}),
        ValueError,
        "elbo: values: expected finite numbers, got 1 of 2",
    ),
    "confidence": (lambda: metrics.bootstrap_interval(torch.rand(9), confidence=95), ValueError, "confidence: .*95"),
    "resamples": (lambda: metrics.bootstrap_interval(torch.rand(9), resamples=0), ValueError, "resamples: .*got 0"),
    "small sets": (
        lambda: metrics.bootstrap_sets(lambda a, b: a.sum(1), (9, 20)),
        ValueError,
        r"sizes: expected at least 10 items in each set, got \(9, 20\)",
    ),
    "hits": (lambda: metrics.proportion_interval(torch.zeros(3)), ValueError, "hits: expected a bool tensor"),
    "features' shape": (
        lambda: metrics.frechet_distance(torch.zeros(3), torch.zeros(3, 2)),
        ValueError,
        r"real: expected features \(N, D\), got \(3,\)",
    ),
    "features' dims": (
        lambda: metrics.kernel_distance(torch.zeros(3, 2), torch.zeros(3, 4)),
        ValueError,
        "generated: expected 2 dims on cpu, as in real, got 4 dims on cpu",
    ),
    "features of NaN": (
        lambda: metrics.frechet_distance(torch.zeros(3, 2), torch.full((3, 2), math.nan)),
        ValueError,
        "generated: expected finite features, got 3 of 3 items",
    ),
    "one item": (
        lambda: metrics.frechet_distance(torch.zeros(1, 2), torch.zeros(3, 2)),
        ValueError,
        "real: expected at least 2 items, got 1",
    ),
    "few neighbours": (
        lambda: metrics.neighbourhoods(torch.zeros(9, 2), torch.zeros(5, 2)),
        ValueError,
        "generated: expected at least 6 items, got 5",
    ),
    "k": (lambda: metrics.neighbourhoods(torch.zeros(9, 2), torch.zeros(9, 2), k=0), ValueError, "k: .*got 0"),
    "few images": (
        lambda: metrics.evaluate_images(IMAGES[:5], IMAGES, PIXELS),
        ValueError,
        r"expected at least 10 items in each set, got \(5, 50\)",
    ),
    "pixels": (lambda: PIXELS(IMAGES * 255), ValueError, r"images: expected pixels in \[0, 1\], got "),
    "integer pixels": (lambda: PIXELS((IMAGES * 255).byte()), TypeError, "floating point, got torch.uint8"),
    "images' shape": (lambda: PIXELS(IMAGES[..., :4]), ValueError, r"\(B, C, S, S\), got \(50, 1, 6, 4\)"),
    "no classes": (
        lambda: metrics.classifier_features(IMAGES, LABELS * 0),
        ValueError,
        "labels: expected from 2 classes .*got 1",
    ),
    "labels' type": (
        lambda: metrics.classifier_features(IMAGES, LABELS.float()),
        TypeError,
        "int64, got torch.float32",
    ),
    "labels' length": (
        lambda: metrics.classifier_features(IMAGES, LABELS[:40]),
        ValueError,
        r"labels: expected labels \(50,\) from 0, got \(40,\)",
    ),
    "held out": (
        lambda: metrics.rotation_features(IMAGES, held_out=IMAGES[..., :5, :5]),
        ValueError,
        r"held_out: expected images \(1, 6, 6\), got \(1, 5, 5\)",
    ),
    "images to train on": (
        lambda: metrics.rotation_features(IMAGES[:49]),
        ValueError,
        "images: expected at least 50 images, got 49",
    ),
    "state of others": (lambda: PIXELS.state(), ValueError, "state: expected a feature space made by fastgen.metrics"),
    "state of another": (
        lambda: metrics.FeatureSpace.from_state(
            {"mean": torch.zeros(2)},
            {
                "kind": "classifier",
                "config": {"channels": 1, "image_size": 8, "dims": 3, "classes": 2},
                "name": "",
                "accuracy": 1,
            },
        ),
        ValueError,
        "got one that fails to load: Error",
    ),
    "network": (
        lambda: metrics.FeatureSpace("pixels", 35, nn.Flatten())(IMAGES),
        ValueError,
        r"network: expected features \(B, 35\), got \(50, 36\)",
    ),
    "steps": (
        lambda: metrics.rotation_features(IMAGES, steps=0),
        ValueError,
        "expected at least 1 and 2, got 64 and 0",
    ),
    "state of nothing": (
        lambda: metrics.FeatureSpace.from_state({}, {"kind": "classifier"}),
        ValueError,
        "state: expected the state of a feature space",
    ),
    "agreement's labels": (
        lambda: metrics.class_agreement(IMAGES, LABELS[:3], PIXELS),
        ValueError,
        r"labels: expected \(50,\), one for each image, got \(3,\)",
    ),
    "tokens": (
        lambda: metrics.summarise({"nll": torch.rand(3)}, tokens=0),
        ValueError,
        "tokens: expected at least 1 in each item, got 0",
    ),
    "no likelihood": (
        lambda: metrics.summarise({"error": torch.rand(3)}, dims=4),
        ValueError,
        r"expected iwae, elbo or nll .*got \['error'\]",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_invalid_arguments_raise_single_line_errors(case):
    call, error, message = ERRORS[case]
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
