"""Distributions of a pixel, given what a decoder says of it.

A pixel is a count, 0 .. levels - 1, shown as count / (levels - 1). All of these are probability mass functions over the
counts, so that -log p(images) is in nats that can be compared between models and likelihoods:

    bernoulli      two levels
    binomial       levels - 1 draws with one probability
    beta-binomial  the same, the probability itself being drawn from a Beta distribution
    gaussian       a normal distribution, integrated over the interval of each level, the outer ones open
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen.batch import SLACK, readable
from fastgen.checks import require_choice, require_count, require_shape
from fastgen.models._norms import widened

Likelihood = Literal["beta-binomial", "binomial", "bernoulli", "gaussian"]

MAX_CONCENTRATION = 500.0
FLOAT32_TRIALS = 255  # with more, terms of opposite sign grow so large that their sum is computed in float64
LOG_STD_BOUNDS = (-5.0, 2.0)
NARROW = 0.3  # the next term of the expansion is below 3e-9 then


def check_likelihood(likelihood: str, levels: int) -> None:
    """Raises ValueError where a config's fields of these names don't fit."""
    require_choice("likelihood", likelihood, get_args(Likelihood))
    require_count("levels", levels, 2)
    if likelihood == "bernoulli" and levels != 2:
        raise ValueError(f"levels: expected 2 with likelihood 'bernoulli', got {levels} (binomial takes any)")


def numbers_per_pixel(likelihood: str) -> int:
    """How many numbers a decoder gives for each pixel and channel."""
    return 2 if likelihood in ("beta-binomial", "gaussian") else 1


def pixels_log_prob(parameters: Tensor, images: Tensor, likelihood: str, levels: int) -> Tensor:
    """(B,) log P(images) in nats.

    Args:
        parameters: (B, numbers_per_pixel * C, H, W), float32 or wider.
        images: (B, C, H, W), multiples of 1 / (levels - 1) from 0 to 1, as ``check_images`` has seen on the CPU;
            others are rounded. On other devices log P is -inf where pixels are out of range. NaN gives NaN.

    Raises:
        ValueError: images of another shape than that of the parameters.
    """
    channels = parameters.size(1) // numbers_per_pixel(likelihood)
    require_shape("images", images, (len(parameters), channels, *parameters.shape[2:]), "(B, C, H, W)")
    exact = (images.to(parameters.dtype) * (levels - 1)).round()
    counts = exact.clamp(0, levels - 1)
    if likelihood == "beta-binomial":
        logits, spread = parameters.chunk(2, dim=1)
        log_prob = beta_binomial_log_prob(logits, spread, counts, levels - 1)
    elif likelihood == "gaussian":
        logits, log_std = parameters.chunk(2, dim=1)
        log_prob = gaussian_log_prob(logits, log_std, counts, levels)
    else:
        log_prob = binomial_log_prob(parameters, counts, levels - 1)
    if not readable(images):  # else ``check_images`` has looked at them
        slack = SLACK * (levels - 1)
        log_prob = log_prob.masked_fill((exact < -slack) | (exact > levels - 1 + slack), -math.inf)
    return log_prob.flatten(1).sum(dim=1)


def pixels_mean(parameters: Tensor, likelihood: str) -> Tensor:
    """The expected pixels (B, C, H, W), in [0, 1]; of a gaussian the centre."""
    return torch.sigmoid(parameters.chunk(numbers_per_pixel(likelihood), dim=1)[0])


def log_binomial_coefficient(trials: int, counts: Tensor) -> Tensor:
    """In float64 where the device has it: the terms are large, and their errors would be the same in every image."""
    wide = _with_more_digits(counts)
    return (math.lgamma(trials + 1) - torch.lgamma(wide + 1) - torch.lgamma(trials - wide + 1)).to(counts.dtype)


def _with_more_digits(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()


def binomial_log_prob(logits: Tensor, counts: Tensor, trials: int) -> Tensor:
    """log P(counts) of ``trials`` independent draws, each 1 with probability sigmoid(logits)."""
    dtype = logits.dtype
    if trials > FLOAT32_TRIALS:
        logits, counts = _with_more_digits(logits), _with_more_digits(counts)
    successes = counts * F.logsigmoid(logits) + (trials - counts) * F.logsigmoid(-logits)
    return (log_binomial_coefficient(trials, counts) + successes).to(dtype)


def beta_binomial_parameters(logits: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, beta) with mean alpha / (alpha + beta) = sigmoid(logits); the binomial is alpha + beta -> inf.

    The sum is bounded: lgamma of larger numbers would cost float32 its last digits.
    """
    concentration = F.softplus(spread + 3).clamp(max=MAX_CONCENTRATION)
    return concentration * torch.sigmoid(logits) + 1e-6, concentration * torch.sigmoid(-logits) + 1e-6


def beta_binomial_log_prob(logits: Tensor, spread: Tensor, counts: Tensor, trials: int) -> Tensor:
    """log P(counts) of ``trials`` draws whose common probability is itself drawn from Beta(alpha, beta).

    It allows for neighbouring draws that agree, as the bits of one stroke do. Skellam (1948).
    """
    dtype = logits.dtype
    if trials > FLOAT32_TRIALS:
        logits, spread, counts = (_with_more_digits(x) for x in (logits, spread, counts))
    alpha, beta = beta_binomial_parameters(logits, spread)
    with_counts = (
        torch.lgamma(counts + alpha) + torch.lgamma(trials - counts + beta) - torch.lgamma(trials + alpha + beta)
    )
    without = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (log_binomial_coefficient(trials, counts) + with_counts - without).to(dtype)


def gaussian_log_prob(logits: Tensor, log_std: Tensor, counts: Tensor, levels: int) -> Tensor:
    """log P(counts) under N(sigmoid(logits), exp(log_std - 1)^2), integrated over half a level to either side.

    The first level takes all that lies below it, the last all above. The standard deviation is bounded.
    """
    precision = torch.exp(-(log_std - 1).clamp(*LOG_STD_BOUNDS))
    middle = (counts / (levels - 1) - torch.sigmoid(logits)) * precision
    half = 0.5 / (levels - 1) * precision
    # Both ends on the side of the lower tail, where differences of the distribution function keep their digits.
    away = middle.abs()
    upper, lower = torch.special.log_ndtr(half - away), torch.special.log_ndtr(-half - away)
    # Of a narrow interval, where the difference has none left: the density's integral, expanded about the middle.
    narrow = 2 * half * (1 + away) < NARROW
    between = upper + torch.log(-torch.expm1(torch.where(narrow, -1.0, lower - upper)))
    squared, width = away.square(), (2 * half).square()
    bend = width * (squared - 1) / 24 + width.square() * (squared.square() - 6 * squared + 3) / 1920
    density = -0.5 * (squared + math.log(2 * math.pi)) + torch.log(2 * half)
    between = torch.where(narrow, density + torch.log1p(torch.where(narrow, bend, 0.0)), between)
    below, above = torch.special.log_ndtr(middle + half), torch.special.log_ndtr(half - middle)
    return torch.where(counts == 0, below, torch.where(counts == levels - 1, above, between))


def log_normal(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """(B,) log N(x; mu, exp(logvar)), summed over all dims but the first; float32 at least."""
    x, mu, logvar = widened(x), widened(mu), widened(logvar)
    scaled = (x - mu) * torch.exp(-0.5 * logvar)  # its square overflows later than exp(-logvar)
    log_density = -0.5 * (scaled.square() + logvar + math.log(2 * math.pi))
    return log_density.flatten(1).sum(dim=1)


def log_standard_normal(x: Tensor) -> Tensor:
    """(B,) log N(x; 0, 1), summed over all dims but the first; float32 at least."""
    return (-0.5 * (widened(x).square() + math.log(2 * math.pi))).flatten(1).sum(dim=1)
