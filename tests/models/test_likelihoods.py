"""Log-probabilities are accurate and finite where plain formulas cancel or overflow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from benchmarks.likelihoods import OncePerImage, bounds
from fastgen import functional
from fastgen.metrics import importance_weighted_bound
from fastgen.models.audio_levels import level_borders, logistics_level_logits, logistics_log_prob
from fastgen.models.conv_vae import ConvVAE, ConvVAEConfig
from fastgen.models.flow_vae import FlowVAE, FlowVAEConfig, planar
from fastgen.models.vae import VAE, VAEConfig
from fastgen.models.variational import (
    beta_binomial_log_prob,
    binomial_log_prob,
    gaussian_log_prob,
    log_normal,
    sample_and_log_prob,
)

LIKELIHOODS = {
    "beta-binomial": lambda logits, spread, counts, levels: beta_binomial_log_prob(logits, spread, counts, levels - 1),
    "binomial": lambda logits, spread, counts, levels: binomial_log_prob(logits + 0 * spread, counts, levels - 1),
    "gaussian": gaussian_log_prob,
}


@pytest.mark.parametrize("levels", [256, 65536])
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_pixel_log_probabilities_are_accurate_with_many_levels(likelihood: str, levels: int) -> None:
    function = LIKELIHOODS[likelihood]
    logits, spread = 4 * torch.randn(4000), 3 * torch.randn(4000)
    counts = ((logits + 0.3 * torch.randn(4000)).sigmoid() * (levels - 1)).round()

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (logits, spread)]
        log_prob = function(*leaves, counts.to(dtype), levels)
        assert log_prob.dtype == dtype
        return [log_prob.detach(), *torch.autograd.grad(log_prob.sum(), leaves)]

    expected = results(torch.float64)
    for result, exact in zip(results(torch.float32), expected, strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=3e-4, atol=5e-4)
    bias = (results(torch.float32)[0].double() - expected[0]).mean()
    assert abs(float(bias)) < 4e-6  # it accumulates over the pixels of an image


@pytest.mark.parametrize("center", [0.5, 1e3, 1e5])
@pytest.mark.parametrize("log_scale", [-10.0, 3.0])
def test_logistics_far_from_a_level_have_finite_log_probabilities_and_gradients(
    center: float, log_scale: float
) -> None:
    borders = level_borders()

    def results(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [torch.full((256, 1), value, dtype=dtype, requires_grad=True) for value in (center, log_scale)]
        low, high, weight = borders[:-1].to(dtype), borders[1:].to(dtype), torch.zeros(256, 1, dtype=dtype)
        log_prob = logistics_log_prob(*leaves, weight, low, high)
        logits = logistics_level_logits(*(t[0] for t in (*leaves, weight)), borders.to(dtype))
        return [log_prob.detach(), logits.detach(), *torch.autograd.grad(log_prob.sum(), leaves)]

    for result, exact in zip(results(torch.float32), results(torch.float64), strict=True):
        torch.testing.assert_close(result.double(), exact, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("along", [-1000.0, -200.0, -50.0, 3.0])
def test_the_log_determinant_of_a_barely_invertible_planar_flow_is_accurate(along: float) -> None:
    w = torch.tensor([[3.0, -1.0, 0.5]]).repeat(5, 1)
    u = along * w / w.square().sum(1, keepdim=True)
    z = torch.randn(5, 3)
    parameters = torch.cat([u, w, -(w * z).sum(1, keepdim=True) + torch.linspace(-2, 2, 5)[:, None]], dim=1)
    parameters[2, -1] = -(w * z)[2].sum()  # the steepest part of tanh
    parameters.requires_grad_()
    _, log_det = planar(z, parameters)
    _, exact = planar(z.double(), parameters.detach().double())
    torch.testing.assert_close(log_det.double(), exact, rtol=1e-4, atol=0.1 if along < 0 else 1e-5)
    assert bool(torch.autograd.grad(log_det.sum(), parameters)[0].isfinite().all())


@pytest.mark.parametrize("logvar", [-200.0, -60.0, -30.0, 1.0])
def test_the_density_of_a_sample_is_accurate_with_small_deviations(logvar: float) -> None:
    mu, logvars = 1 + torch.randn(6, 50).abs(), torch.full((6, 50), logvar)
    torch.manual_seed(5)
    z, log_prob = sample_and_log_prob(mu, logvars)
    torch.manual_seed(5)
    noise = functional.reparameterize(torch.zeros(6, 50), torch.zeros(6, 50)).double()
    expected = -0.5 * (noise.square() + logvar + math.log(2 * math.pi)).sum(1)
    torch.testing.assert_close(log_prob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(5)
    torch.testing.assert_close(z, functional.reparameterize(mu, logvars))


def test_a_normal_density_of_small_variance_is_finite_at_its_mean() -> None:
    x = torch.tensor([[0.0, 1e-30]])
    log_prob = log_normal(x, torch.zeros(1, 2), torch.full((1, 2), -100.0))
    torch.testing.assert_close(log_prob, torch.tensor([100.0 - math.log(2 * math.pi)]))


def test_importance_weights_under_autocast_are_close_to_those_in_float32() -> None:
    torch.manual_seed(0)
    model = ConvVAE(ConvVAEConfig(image_size=4, width=4, hidden_dim=8, latent_dim=32, levels=3))
    with torch.no_grad():
        model.posterior[-1].bias[:32] = 5.0
        model.posterior[-1].bias[32:] = -14.0  # a deviation of 0.001: less than the steps of bfloat16 beside 5
    batch: dict[str, Any] = {"images": torch.randint(0, 3, (8, 1, 4, 4)) / 2}

    def weights() -> torch.Tensor:
        return model.log_weights(batch, generator=torch.Generator().manual_seed(1))

    with torch.autocast("cpu", torch.bfloat16):
        low = weights()
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, weights(), rtol=0, atol=6.0)


QUADRATURE = {
    "vae": lambda: VAE(VAEConfig(image_size=3, levels=2, likelihood="bernoulli", latent_dim=2, width=8)),
    "flow-vae": lambda: FlowVAE(
        FlowVAEConfig(image_size=3, levels=2, likelihood="bernoulli", latent_dim=2, width=8, flow_width=8, flows=2)
    ),
}


@pytest.mark.parametrize("name", QUADRATURE)
def test_the_importance_weighted_bound_approaches_the_integral_over_the_latents(name: str) -> None:
    """log p(x) = log of the integral of N(z; 0, 1) p(x | z), on a grid of z, by torch.distributions."""
    torch.manual_seed(0)
    model = QUADRATURE[name]().double()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn_like(weight))
    images = torch.randint(2, (4, 1, 3, 3)).double()
    axis = torch.linspace(-6, 6, 121, dtype=torch.float64)
    z = torch.cartesian_prod(axis, axis)
    prior = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1)
    with torch.no_grad():
        pixels = torch.distributions.Bernoulli(probs=model.decode(z))
        joint = torch.stack([prior + pixels.log_prob(image).flatten(1).sum(1) for image in images])
    exact = joint.logsumexp(1) + 2 * math.log(float(axis[1] - axis[0]))
    assert (model.elbo(images, generator=torch.Generator().manual_seed(1)) - exact).abs().max() > 0.05
    with torch.no_grad():
        weights = model.log_weight(images.repeat(20_000, 1, 1, 1)).view(-1, len(images))
    torch.testing.assert_close(importance_weighted_bound(weights), exact, rtol=0, atol=0.03)
    model.encoder = OncePerImage(model.encoder)
    torch.testing.assert_close(bounds(model.log_weight, images, 20_000), exact, rtol=0, atol=0.03)
