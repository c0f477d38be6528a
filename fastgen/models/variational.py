"""The evidence lower bound (ELBO) of variational autoencoders: loss, likelihoods of pixels, tighter bounds.

Kingma and Welling, "Auto-encoding variational Bayes" (2014):

    log p(x) >= ELBO(x) = E_q(z|x) [log p(x | z)] - KL(q(z | x) || p(z)),        loss = -log p(x | z) + beta KL

beta: Higgins et al., "beta-VAE" (2017); 1 is the ELBO. Free bits: Kingma et al., "Improved variational inference with
inverse autoregressive flow" (2016), appendix C. The importance-weighted bound of K posterior samples,
log 1/K sum_k p(x, z_k) / q(z_k | x), is tighter than the ELBO: Burda, Grosse and Salakhutdinov, "Importance weighted
autoencoders" (2016).

A pixel is a count, 0 .. levels - 1, stored as count / (levels - 1). The four likelihoods are probability mass functions
over the counts, so that -log p(x), in nats, is comparable between models and likelihoods:

    bernoulli      two levels
    binomial       levels - 1 trials with one probability
    beta-binomial  the same, the probability itself being sampled from a Beta distribution
    gaussian       a normal distribution, integrated over the interval of each level; the outer intervals are open
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgen import functional
from fastgen.batch import RANGE_TOLERANCE, can_read_values, require_images
from fastgen.checks import require_choice, require_count, require_positive, require_shape
from fastgen.models.base import Batch, GenerativeModel, Images, Samples, StepContext, image_rows, upcast
from fastgen.models.conditioning import tempered_noise
from fastgen.models.interpolation import great_circles, row_labels
from fastgen.models.sizes import DataSize

Likelihood = Literal["beta-binomial", "binomial", "bernoulli", "gaussian"]

MAX_CONCENTRATION = 500.0
FLOAT32_TRIALS = 255  # with more, terms of opposite sign grow so large that their sum is computed in float64
LOG_STD_BOUNDS = (-5.0, 2.0)
NARROW = 0.3  # the next term of the expansion is below 3e-9 then


class Bound(NamedTuple):
    """loss: scalar. nll, kl: (B,) in nats per image; -(nll + kl) is the ELBO, or an unbiased estimate of it."""

    loss: Tensor
    nll: Tensor
    kl: Tensor


class VariationalAutoencoder(GenerativeModel):
    """Training protocol of variational autoencoders: loss, scores, bounds, reconstructions.

    A subclass defines these methods; ``conditions`` are labels, or nothing:

        forward(images, *conditions, beta=1.0, generator=None) -> Bound
        encode(images, *conditions) -> parameters of the posterior, mu and logvar of z first
        decode(z, *conditions) -> expected pixels (B, C, S, S) in [0, 1]
        reconstruct(images, *conditions) -> ``decode`` of the mean of the posterior
        log_weight(images, *conditions, generator=None) -> (B,) log p(images, z) - log q(z | images) of a sample z

    Its config has the fields image_size, channels, levels, likelihood, beta, free_bits and kl_warmup.
    """

    kind = "images"
    default_data = "digits"
    encode: Callable[..., Any]
    decode: Callable[..., Tensor]
    reconstruct: Callable[..., Tensor]
    log_weight: Callable[..., Tensor]

    @classmethod
    def suggested(cls, data: DataSize, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """As ``GenerativeModel.suggested``; pixels of two levels have the Bernoulli likelihood, which costs less. The
        warm-up of the KL takes at most a quarter of the steps that are suggested."""
        found = super().suggested(data, given)
        if data.scale != "small" and data.levels == 2:
            found["model.likelihood"] = "bernoulli"
        steps, warmup = found.get("steps"), cls.config_class.kl_warmup  # type: ignore[attr-defined]
        if steps and steps < 4 * warmup:
            found["model.kl_warmup"] = steps // 4
        return found

    def conditions(self, batch: Batch) -> tuple[Tensor, ...]:
        """The tensors of a batch that the networks receive besides the images."""
        return ()

    def loss(self, phase: str, batch: Batch, context: StepContext) -> dict[str, Tensor]:
        """The loss, in which the weight of the KL grows to beta in ``kl_warmup`` steps; mean nll and kl in nats."""
        beta = self.config.beta * min(1.0, context.step / max(1, self.config.kl_warmup))
        out: Bound = self(batch["images"], *self.conditions(batch), beta=beta)
        return {"loss": out.loss, "nll": out.nll.mean(), "kl": out.kl.mean()}

    @torch.no_grad()
    def score(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """elbo, nll and kl (B,) in nats, from one posterior sample per image."""
        out: Bound = self(batch["images"], *self.conditions(batch), generator=generator)
        return {"elbo": -(out.nll + out.kl), "nll": out.nll, "kl": out.kl}

    @torch.no_grad()
    def log_weights(self, batch: Batch, *, generator: torch.Generator | None = None) -> Tensor:
        """(B,) importance weights of one posterior sample per image, as logarithms in nats. Their mean is the ELBO."""
        return self.log_weight(batch["images"], *self.conditions(batch), generator=generator)

    @torch.no_grad()
    def elbo(
        self, images: Tensor, *conditions: Tensor, samples: int = 1, generator: torch.Generator | None = None
    ) -> Tensor:
        """A lower bound of log p(images), (B,) in nats.

        Args:
            images: (B, C, S, S) in [0, 1]; ``conditions`` as in ``forward``.
            samples: number of posterior samples per image. 1: the ELBO; more: the importance-weighted bound.
            generator: source of the noise; default torch's global one.

        Raises:
            TypeError, ValueError: images or conditions of another dtype or shape; samples is not a positive integer.
        """
        require_positive("samples", samples)
        if samples == 1:
            out: Bound = self(images, *conditions, generator=generator)
            return -(out.nll + out.kl)
        weights = [self.log_weight(images, *conditions, generator=generator) for _ in range(samples)]
        return torch.stack(weights).logsumexp(0) - math.log(samples)

    @torch.no_grad()
    def visualize(self, batch: Batch, *, generator: torch.Generator | None = None) -> dict[str, Samples]:
        """Rows of held-out images, each above the row of its reconstructions."""
        images = batch["images"]
        return {"reconstructions": image_rows(images, self.reconstruct(images, *self.conditions(batch)))}

    @torch.no_grad()
    def interpolate(self, rows: int, columns: int, options: Any, *, generator: torch.Generator | None = None) -> Images:
        """As ``GenerativeModel.interpolate``: expected pixels, from a latent of the prior to another."""
        require_positive("rows", rows)
        ends = normal_noise((2 * rows, self.config.latent_dim), next(self.parameters()), generator, options)
        z, label = great_circles(ends, columns), getattr(options, "label", None)
        if label is None:
            return Images(self.decode(z), columns)
        labels = row_labels(rows, columns, label, self.config.classes)
        return Images(self.decode(z, labels.to(z.device)), columns, labels)

    def log_likelihood(self, parameters: Tensor, images: Tensor) -> Tensor:
        """(B,) log p(images | z) in nats; ``parameters`` as in ``pixels_log_prob``."""
        return pixels_log_prob(parameters, images, self.config.likelihood, self.config.levels)


def check_images(images: Tensor, config: Any) -> None:
    """Raises TypeError, ValueError unless images are (B, channels, image_size, image_size), floating, in [0, 1]."""
    require_images("images", images, config.channels, config.image_size)


def check_latents(z: Tensor, config: Any) -> None:
    """Raises ValueError unless z is (B, latent_dim)."""
    require_shape("z", z, (*z.shape[:1], config.latent_dim), "(B, latent_dim)")


def normal_noise(
    shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None, options: Any = None
) -> Tensor:
    """N(0, 1) of ``like``'s dtype and device, or N(0, temperature^2) with sampling options that have a ``temperature``.

    A CPU generator gives the same noise on every device.
    """
    device = like.device if generator is None else generator.device
    return tempered_noise(torch.randn(shape, generator=generator, device=device).to(like), options)


# Posteriors


def sample_posterior(
    mu: Tensor,
    logvar: Tensor,
    free_bits: float,
    *,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A sample z of N(mu, exp(logvar)), its KL (B,) in nats, and the KL's term in the loss, a scalar.

    The term is the mean of the KL over the batch; with free bits it is the sum over the channels of
    max(mean KL, free_bits), so that no channel collapses to the prior.

    Args:
        mu, logvar, prior_mu, prior_logvar: (B, C, *); the default prior is N(0, 1).
    """
    if not free_bits:
        z, kl = functional.reparameterize_kl(
            mu, logvar, prior_mu=prior_mu, prior_logvar=prior_logvar, generator=generator
        )
        return z, kl, kl.mean()
    # One row for each channel, so that the KL is summed per channel.
    rows = [None if t is None else t.reshape(mu.size(0) * mu.size(1), -1) for t in (mu, logvar, prior_mu, prior_logvar)]
    mus, logvars = cast(Tensor, rows[0]), cast(Tensor, rows[1])
    z, kl = functional.reparameterize_kl(mus, logvars, prior_mu=rows[2], prior_logvar=rows[3], generator=generator)
    kl = kl.view(mu.shape[:2])
    return z.view(mu.shape), kl.sum(1), kl.mean(0).clamp(min=free_bits).sum()


def sample_and_log_prob(
    mu: Tensor, logvar: Tensor, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A sample z of N(mu, exp(logvar)) and log N(z; mu, exp(logvar)), (B,) in nats, both float32 at least.

    The density is computed from the noise: z - mu has lost its digits where the deviation is small beside mu.
    """
    mu, logvar = upcast(mu), upcast(logvar)
    zero = torch.zeros_like(mu)
    noise = functional.reparameterize(zero, zero, generator=generator)
    log_density = log_standard_normal(noise) - 0.5 * logvar.flatten(1).sum(dim=1)
    return mu + noise * torch.exp(0.5 * logvar), log_density


def log_normal(x: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """(B,) log N(x; mu, exp(logvar)), summed over all dims but the first; float32 at least."""
    x, mu, logvar = upcast(x), upcast(mu), upcast(logvar)
    scaled = (x - mu) * torch.exp(-0.5 * logvar)  # its square overflows later than exp(-logvar)
    log_density = -0.5 * (scaled.square() + logvar + math.log(2 * math.pi))
    return log_density.flatten(1).sum(dim=1)


def log_standard_normal(x: Tensor) -> Tensor:
    """(B,) log N(x; 0, 1), summed over all dims but the first; float32 at least."""
    return (-0.5 * (upcast(x).square() + math.log(2 * math.pi))).flatten(1).sum(dim=1)


# Likelihoods of pixels


def check_likelihood(likelihood: str, levels: int) -> None:
    """Raises ValueError unless the config's fields of these names fit together."""
    require_choice("likelihood", likelihood, get_args(Likelihood))
    require_count("levels", levels, 2)
    if likelihood == "bernoulli" and levels != 2:
        raise ValueError(f"levels: expected 2 with likelihood 'bernoulli', got {levels} (binomial takes any)")


def parameters_per_pixel(likelihood: str) -> int:
    """Number of values that a decoder computes for each pixel and channel."""
    return 2 if likelihood in ("beta-binomial", "gaussian") else 1


def pixels_log_prob(parameters: Tensor, images: Tensor, likelihood: str, levels: int) -> Tensor:
    """(B,) log P(images) in nats.

    Args:
        parameters: (B, parameters_per_pixel * C, H, W), float32 or float64.
        images: (B, C, H, W), multiples of 1 / (levels - 1) from 0 to 1, which ``check_images`` ensures on the CPU;
            other values are rounded. On other devices log P is -inf where pixels are out of range. NaN gives NaN.

    Raises:
        ValueError: the shape of the images does not fit the parameters.
    """
    channels = parameters.size(1) // parameters_per_pixel(likelihood)
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
    if not can_read_values(images):  # else ``check_images`` has checked their values
        tolerance = RANGE_TOLERANCE * (levels - 1)
        log_prob = log_prob.masked_fill((exact < -tolerance) | (exact > levels - 1 + tolerance), -math.inf)
    return log_prob.flatten(1).sum(dim=1)


def pixels_mean(parameters: Tensor, likelihood: str) -> Tensor:
    """The expected pixels (B, C, H, W), in [0, 1]; for gaussian the center of the distribution."""
    return torch.sigmoid(parameters.chunk(parameters_per_pixel(likelihood), dim=1)[0])


def binomial_log_prob(logits: Tensor, counts: Tensor, trials: int) -> Tensor:
    """log P(counts) of ``trials`` independent trials, each 1 with probability sigmoid(logits)."""
    dtype = logits.dtype
    if trials > FLOAT32_TRIALS:
        logits, counts = _to_float64(logits), _to_float64(counts)
    successes = counts * F.logsigmoid(logits) + (trials - counts) * F.logsigmoid(-logits)
    return (_log_binomial_coefficient(trials, counts) + successes).to(dtype)


def beta_binomial_parameters(logits: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, beta) with mean alpha / (alpha + beta) = sigmoid(logits); the binomial is alpha + beta -> inf.

    The sum is bounded: lgamma of larger numbers would cost float32 its last digits.
    """
    concentration = F.softplus(spread + 3).clamp(max=MAX_CONCENTRATION)
    return concentration * torch.sigmoid(logits) + 1e-6, concentration * torch.sigmoid(-logits) + 1e-6


def beta_binomial_log_prob(logits: Tensor, spread: Tensor, counts: Tensor, trials: int) -> Tensor:
    """log P(counts) of ``trials`` trials whose common probability is itself sampled from Beta(alpha, beta).

    It models correlated trials, such as the neighboring bits of one stroke that a pixel counts. Skellam (1948).
    """
    dtype = logits.dtype
    if trials > FLOAT32_TRIALS:
        logits, spread, counts = (_to_float64(x) for x in (logits, spread, counts))
    alpha, beta = beta_binomial_parameters(logits, spread)
    with_counts = (
        torch.lgamma(counts + alpha) + torch.lgamma(trials - counts + beta) - torch.lgamma(trials + alpha + beta)
    )
    without = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (_log_binomial_coefficient(trials, counts) + with_counts - without).to(dtype)


def gaussian_log_prob(logits: Tensor, log_std: Tensor, counts: Tensor, levels: int) -> Tensor:
    """log P(counts) under N(sigmoid(logits), exp(log_std - 1)^2), integrated over half a level to either side.

    The interval of the first level is open below, that of the last level above. The standard deviation is bounded.
    """
    precision = torch.exp(-(log_std - 1).clamp(*LOG_STD_BOUNDS))
    center = (counts / (levels - 1) - torch.sigmoid(logits)) * precision
    half = 0.5 / (levels - 1) * precision
    # Both ends in the lower tail, where differences of the distribution function keep their digits.
    away = center.abs()
    upper, lower = torch.special.log_ndtr(half - away), torch.special.log_ndtr(-half - away)
    # For a narrow interval, where the difference has no digits left: the density's integral, expanded at the center.
    narrow = 2 * half * (1 + away) < NARROW
    between = upper + torch.log(-torch.expm1(torch.where(narrow, -1.0, lower - upper)))
    squared, width = away.square(), (2 * half).square()
    bend = width * (squared - 1) / 24 + width.square() * (squared.square() - 6 * squared + 3) / 1920
    density = -0.5 * (squared + math.log(2 * math.pi)) + torch.log(2 * half)
    between = torch.where(narrow, density + torch.log1p(torch.where(narrow, bend, 0.0)), between)
    below, above = torch.special.log_ndtr(center + half), torch.special.log_ndtr(half - center)
    return torch.where(counts == 0, below, torch.where(counts == levels - 1, above, between))


def _log_binomial_coefficient(trials: int, counts: Tensor) -> Tensor:
    """In float64 where the device has it: the terms are large, and their errors would be the same in every image.

    Computed once for each count; NaN gives NaN.
    """
    every = _to_float64(torch.arange(trials + 1, device=counts.device, dtype=counts.dtype))
    table = (math.lgamma(trials + 1) - torch.lgamma(every + 1) - torch.lgamma(trials - every + 1)).to(counts.dtype)
    return table[counts.nan_to_num(0).long()] + 0 * counts


def _to_float64(x: Tensor) -> Tensor:
    return x if x.device.type == "mps" else x.double()
